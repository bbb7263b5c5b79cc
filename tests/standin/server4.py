"""The face of cryoSPARC 4: JSON-RPC and files on three ports, over the same state; written by hand.

There is no published contract for 4.x. The names and arguments are those that cryosparc-tools 4.7.1 sends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlsplit

from cryosparc.dataset import Dataset
from cryosparc.models.asset import GridFSAsset
from cryosparc.models.job_spec import InputSlot, InputSpec, OutputSlot, OutputSpec

from standin.operations import OPERATIONS
from standin.server import LOOPBACK, BrokenError, Handler, start
from standin.slots import slot_fields
from standin.state import LICENSE, PASSWORD, RefusalError, State, known

PORTS = range(39000, 39500, 10)
CORE, VISUAL, LIVE = 2, 3, 5
Procedures = dict[str, Callable[..., Any]]


def job_document(job: Any) -> dict[str, Any]:
    """A job the way 4.x described it."""
    outputs = job.spec.outputs.root
    return {
        "uid": job.uid,
        "project_uid": job.project_uid,
        "job_type": job.spec.type,
        "title": job.title,
        "description": job.description,
        "status": job.status,
        "parents": job.parents,
        "input_slot_groups": [
            {
                "name": name,
                "type": given.type,
                "connections": [{"job_uid": c.job_uid, "group_name": c.output} for c in given.connections],
            }
            for name, given in job.spec.inputs.root.items()
        ],
        "output_result_groups": [
            {
                "name": name,
                "type": output.type,
                "num_items": output.num_items,
                "contains": [
                    {"name": r.name, "type": f"{output.type}.{r.dtype}", "passthrough": r.passthrough}
                    for r in output.results
                ],
            }
            for name, output in outputs.items()
        ],
        "output_results": [
            {
                "group_name": name,
                "name": r.name,
                "type": f"{output.type}.{r.dtype}",
                "passthrough": r.passthrough,
                "versions": r.versions,
                "metafiles": r.metafiles,
                "num_items": r.num_items,
                "min_fields": [
                    (column.split("/", 1)[1], kind)
                    for column, kind in slot_fields(output.type, r.name, r.dtype)
                ],
            }
            for name, output in outputs.items()
            for r in output.results
        ],
    }


def core_procedures(state: State) -> Procedures:
    call = _caller(state)

    def login(email: str, password: str) -> str:
        if (email, password) != (state.user.emails[0].address, PASSWORD):
            raise RefusalError(401, "Incorrect email or password")
        return state.user.id

    def send_event(
        project_uid: str,
        job_uid: str,
        message: str,
        error: bool = False,
        flags: Any = (),
        imgfiles: Any = (),
    ) -> str:
        if imgfiles:
            images = [GridFSAsset(**image) for image in imgfiles]
            return call("jobs.add_image_log", project_uid, job_uid, images, message).id
        return call("jobs.add_event_log", project_uid, job_uid, message, "error" if error else "text").id

    def set_status(project: str, job: str, status: str) -> None:
        call("jobs.mark_completed" if status == "completed" else "jobs.mark_failed", project, job)

    def make_job(
        job_type: str,
        project_uid: str,
        workspace_uid: str,
        user_id: str,
        title: str | None,
        desc: str | None,
        params: dict[str, Any],
        input_group_connects: dict[str, Any],
    ) -> str:
        named = {"type": job_type, "title": title or "", "description": desc or ""}
        return call("jobs.create", project_uid, workspace_uid, params, **named).uid

    return {
        "get_id_by_email_password": login,
        "get_running_version": lambda: state.version,
        "get_project": lambda project: {"uid": known(state.projects, project, "project").uid},
        "get_project_dir_abs": lambda project: str(state.folder(project)),
        "get_job": lambda project, job: job_document(state.job(project, job)),
        "get_job_dir_abs": lambda project, job: str(state.folder(project) / state.job(project, job).uid),
        "clear_job": lambda project, job: call("jobs.clear", project, job) and None,
        "run_external_job": lambda project, job, status: (
            call("jobs.mark_running", project, job, status) and None
        ),
        "set_job_status": set_status,
        "make_job": make_job,
        "enqueue_job": lambda project_uid, job_uid, lane, user_id, hostname, gpus: (
            call("jobs.enqueue", project_uid, job_uid) and None
        ),
        "job_send_streamlog": send_event,
    }


def visual_procedures(state: State) -> Procedures:
    call = _caller(state)

    def create(project_uid: str, workspace_uid: str, user: str, title: str | None, desc: str | None) -> str:
        named = {"type": "snowflake", "title": title or "", "description": desc or ""}
        return call("jobs.create", project_uid, workspace_uid, **named).uid

    def add_output(
        project_uid: str,
        job_uid: str,
        type: str,
        name: str,
        slots: list[Any],
        passthrough: str | None,
        title: str | None,
    ) -> None:
        spec = OutputSpec(
            type=type, title=title or name, passthrough=passthrough, slots=_slots(OutputSlot, slots)
        )
        call("jobs.add_external_output", project_uid, job_uid, name, spec)

    def connect(
        project_uid: str,
        source_job_uid: str,
        source_output: str,
        target_job_uid: str,
        target_input: str,
        slots: list[Any],
        title: str,
        desc: str,
    ) -> None:
        job = state.job(project_uid, target_job_uid)
        if target_input not in job.spec.inputs.root:
            kind = state.output(project_uid, source_job_uid, source_output).type
            spec = InputSpec(
                type=kind, title=title or target_input, slots=_slots(InputSlot, slots), count_min=1
            )
            call("jobs.add_external_input", project_uid, target_job_uid, target_input, spec)
        call("jobs.connect", project_uid, target_job_uid, target_input, source_output, source_job_uid)

    def make_directory(project_uid: str, path: str, parents: bool = False, exist_ok: bool = False) -> None:
        call("projects.mkdir", project_uid, parents, exist_ok, path)

    return {
        "create_external_job": create,
        "add_external_job_output": add_output,
        "connect_external_job": connect,
        "project_mkdir": make_directory,
        "list_project_files": lambda project_uid, prefix="", recursive=False: call(
            "projects.ls", project_uid, recursive, prefix
        ),
    }


def _caller(state: State) -> Callable[..., Any]:
    def call(name: str, *positional: Any, **named: Any) -> Any:
        with state.lock:
            result = OPERATIONS[name](state, *positional, **named)
        state.calls.append((name, 200))
        return result

    return call


def _slots(kind: Any, slots: list[Any]) -> list[Any]:
    given = [{"prefix": slot, "dtype": slot} if isinstance(slot, str) else slot for slot in slots]
    return [kind(name=slot["prefix"], dtype=slot["dtype"]) for slot in given]


def face(state: State, table: Procedures) -> type[Handler]:
    class Face(Handler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:  # noqa: N802
            self.answer(200, b"ok", "text/plain")

        def do_POST(self) -> None:  # noqa: N802
            raw = self.body()
            is_call = urlsplit(self.path).path == "/api"
            try:
                if self.headers.get("License-ID") != LICENSE:
                    raise RefusalError(401, "wrong license")
                if is_call:
                    self.answer(200, json.dumps({"result": self.called(json.loads(raw))}).encode())
                else:
                    self.served(raw)
            except BrokenError:
                self.break_connection()
            except (RefusalError, TypeError) as error:
                code = error.code if isinstance(error, RefusalError) else 422
                told = {"message": str(error), "code": code}
                answer = json.dumps({"error": told} if is_call else told).encode()
                self.answer(200 if is_call and code != 500 else code, answer)

        def called(self, request: dict[str, Any]) -> Any:
            name, given = request["method"], request["params"]
            if name == "system.describe":
                return {"procs": [{"name": known_name} for known_name in table]}
            if name not in table:
                raise RefusalError(501, f"the stand-in does not implement {name}")
            fault = state.fault_at(name)
            self.misbehave(fault, name, None, b"")
            result = table[name](**given) if isinstance(given, dict) else table[name](*given)
            if fault == "lost_reply":
                raise BrokenError
            return result

        def served(self, raw: bytes) -> None:
            call = _caller(state)
            parts = urlsplit(self.path)
            words = [unquote_plus(word) for word in parts.path.strip("/").split("/")]
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            if parts.path == "/get_project_file":
                asked = json.loads(raw)
                content = call("projects.download_file", asked["project_uid"], asked["path"])
                return self.answer(200, content, "application/octet-stream")
            if words[0] == "external":
                self.misbehave(state.fault_at("jobs.save_output"), "jobs.save_output", None, raw)
                dataset = Dataset.load(BytesIO(raw))
                call("jobs.save_output", words[2], words[4], words[6], dataset)
                return self.answer(200, b"{}")
            if words[0] == "projects" and len(words) == 5:
                asset = call(
                    "assets.upload", words[1], words[3], raw, query.get("filename"), query.get("format")
                )
                return self.answer(200, json.dumps(asset.model_dump()).encode())
            if words[0] == "projects" and len(words) == 3:
                half = state.inside(words[1], query["path"])
                self.misbehave(state.fault_at("projects.upload_file"), "projects.upload_file", half, raw)
                call("projects.upload_file", words[1], raw, "overwrite" in query, query["path"])
                return self.answer(200, b"{}")
            raise RefusalError(404, parts.path)

    Face.state = state
    return Face


@contextmanager
def served(state: State) -> Iterator[int]:
    """Serve within a block; gives the base port."""
    tables = {CORE: core_procedures(state), VISUAL: visual_procedures(state), LIVE: {}}
    for base in PORTS:
        servers = []
        try:
            for offset, table in tables.items():
                servers.append(start(LOOPBACK, base + offset, face(state, table)))
        except OSError:
            for server in servers:
                server.shutdown()
                server.server_close()
            continue
        try:
            yield base
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()
        return
    raise OSError("no three free ports for the stand-in")
