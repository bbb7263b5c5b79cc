"""What the stand-in remembers: projects, jobs, files, tokens, events; and the faults that tests order."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryosparc.dataset import Dataset
from cryosparc.models.job import Job
from cryosparc.models.job_spec import JobSpec, Output, OutputResult, OutputSlot
from cryosparc.models.project import Project
from cryosparc.models.resource import ResourceSpec
from cryosparc.models.user import Email, User
from cryosparc.models.workspace import Workspace

STATUSES = (
    "building",
    "queued",
    "launched",
    "started",
    "running",
    "waiting",
    "completed",
    "killed",
    "failed",
)
EXTERNAL = "snowflake"
LICENSE = "00000000-0000-0000-0000-000000000000"
EMAIL, PASSWORD = "tester@example.org", "secret"


class RefusalError(Exception):
    """An answer with an HTTP status that is no success."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


@dataclass
class Fault:
    """Something that goes wrong once, at the `skip`-th next call of a function (or any, for `*`).

    `drop`: the connection breaks while the body is read, and of a file half is stored. `error`: answer 500,
    nothing done. `lost_reply`: done, but the connection breaks before the answer. `expire`: all tokens are
    void from now on. Or a function to call before the work is done.
    """

    function: str
    kind: str | Callable[[], None]
    skip: int = 0


class State:
    """One instance of cryoSPARC with one user; every method that fails raises `RefusalError`."""

    def __init__(self, root: Path, version: str) -> None:
        self.root, self.version, self.lock = root, version, threading.RLock()
        self.user = User(
            _id=new_id(),
            name="tester",
            first_name="T",
            last_name="E",
            emails=[Email(address=EMAIL, verified=True)],
        )
        self.password_hash = sha256(PASSWORD.encode()).hexdigest()
        self.tokens: set[str] = set()
        self.projects: dict[str, Project] = {}
        self.workspaces: dict[tuple[str, str], Workspace] = {}
        self.jobs: dict[tuple[str, str], Job] = {}
        self.events: dict[tuple[str, str], list[Any]] = {}
        self.assets: dict[str, tuple[Any, bytes]] = {}
        self.calls: list[tuple[str, int]] = []
        self.faults: list[Fault] = []

    def fault_at(self, function: str) -> str | Callable[[], None] | None:
        """What is to go wrong at this call, if anything."""
        with self.lock:
            for fault in self.faults:
                if fault.function in ("*", function):
                    if fault.skip == 0:
                        self.faults.remove(fault)
                        return fault.kind
                    fault.skip -= 1
        return None

    # ── What a user's instance already holds ──

    def add_project(self, uid: str) -> Path:
        folder = self.root / f"CS-{uid.lower()}"
        folder.mkdir(parents=True)
        self.projects[uid] = Project(
            _id=new_id(),
            uid=uid,
            uid_num=int(uid[1:]),
            title=uid,
            project_dir=str(folder),
            owner_user_id=self.user.id,
            size_last_updated=now(),
        )
        return folder

    def add_workspace(self, project: str, uid: str) -> None:
        self.workspaces[project, uid] = Workspace(
            _id=new_id(),
            uid=uid,
            uid_num=int(uid[1:]),
            project_uid=project,
            project_uid_num=int(project[1:]),
            workspace_type="base",
            title=uid,
        )

    def new_job(self, project: str, workspace: str, kind: str, title: str = "", description: str = "") -> Job:
        number = 1 + max([int(uid[1:]) for owner, uid in self.jobs if owner == project], default=0)
        job = Job(
            _id=new_id(),
            uid=f"J{number}",
            uid_num=number,
            project_uid=project,
            project_uid_num=int(project[1:]),
            workspace_uids=[workspace],
            job_dir=f"J{number}",
            title=title,
            description=description,
            status="building",
            status_num=5,
            created_by_user_id=self.user.id,
            build_errors=[],
            job_dir_size_last_updated=now(),
            created_at=now(),
            updated_at=now(),
            version_created=self.version,
            spec=JobSpec(type=kind, ui_tile_width=1, ui_tile_height=1, resource_spec=ResourceSpec()),
        )
        (self.folder(project) / job.uid).mkdir()
        self.jobs[project, job.uid] = job
        self.events[project, job.uid] = []
        return job

    def add_output(
        self, job: Job, name: str, kind: str, slots: Iterable[tuple[str, str, bool]], dataset: Any
    ) -> None:
        """An output of a native job: (slot, dtype, passthrough); own and passthrough slots in a file each."""
        slots = list(slots)
        own = [OutputSlot(name=slot, dtype=dtype) for slot, dtype, passthrough in slots if not passthrough]
        output = Output(type=kind, title=name, slots=own, num_items=len(dataset))
        for passthrough, prefix in ((False, ""), (True, "passthrough_")):
            group = [(slot, dtype) for slot, dtype, through in slots if through is passthrough]
            if not group:
                continue
            file = f"{job.uid}/{job.uid}_{prefix}{name}.cs"
            names = {slot for slot, _ in group}
            columns = ["uid", *(f for f in dataset.fields() if f.split("/")[0] in names)]
            Dataset({column: dataset[column] for column in columns}).save(self.folder(job.project_uid) / file)
            output.results += [
                OutputResult(
                    name=slot,
                    dtype=dtype,
                    versions=[0],
                    metafiles=[file],
                    num_items=[len(dataset)],
                    passthrough=passthrough,
                )
                for slot, dtype in group
            ]
        job.spec.outputs.root[name] = output

    # ── Looking up ──

    def folder(self, project: str) -> Path:
        return Path(known(self.projects, project, "project").project_dir)

    def job(self, project: str, uid: str) -> Job:
        return known(self.jobs, (project, uid), "job")

    def output(self, project: str, uid: str, name: str) -> Output:
        return known(self.job(project, uid).spec.outputs.root, name, "output")

    def external(self, project: str, uid: str, *allowed: str) -> Job:
        """An external job in one of the allowed statuses."""
        job = self.job(project, uid)
        if job.spec.type != EXTERNAL:
            raise RefusalError(400, f"{uid} is not an external job")
        if allowed and job.status not in allowed:
            raise RefusalError(409, f"{uid} is {job.status}; it must be {' or '.join(allowed)}")
        return job

    def inside(self, project: str, path: str) -> Path:
        """A path of the project; links are not followed."""
        base = self.folder(project).resolve()
        place = Path(os.path.normpath(base / path))
        if place != base and base not in place.parents:
            raise RefusalError(403, f"{path} is not in the directory of project {project}")
        return place

    # ── Changing ──

    def set_status(self, job: Job, status: str) -> Job:
        job.status, job.status_num = status, STATUSES.index(status) * 10 + 5
        job.updated_at = now()
        return job

    def clear(self, project: str, uid: str) -> Job:
        job = self.job(project, uid)
        if job.status in ("running", "waiting", "queued", "launched", "started"):
            raise RefusalError(409, f"{uid} is {job.status} and cannot be cleared")
        shutil.rmtree(self.folder(project) / uid)
        (self.folder(project) / uid).mkdir()
        self.events[project, uid] = []
        job.ui_tile_images = []
        if job.spec.type != EXTERNAL:
            job.spec.outputs.root.clear()
        for output in job.spec.outputs.root.values():
            output.num_items, output.image = 0, None
            output.results = [OutputResult(name=slot.name, dtype=slot.dtype) for slot in output.slots]
        return self.set_status(job, "building")

    def joined(self, project: str, output: Output, which: Any, version: Any = "F") -> Any:
        """The rows of an output: its files joined by uid, as far as the wanted slots need them."""
        results = [result for result in output.results if result.metafiles]
        if isinstance(which, list):
            lacking = set(which) - {result.name for result in results}
            if lacking:
                raise RefusalError(404, f"slots not available: {sorted(lacking)}")
            results = [result for result in results if result.name in which]
        elif which != "all":
            results = [result for result in results if result.passthrough == (which == "passthrough")]
        if not results:
            raise RefusalError(404, "the output is empty")
        files = [result.metafiles[-1 if version == "F" else version] for result in results]
        paths = [self.folder(project) / file for file in dict.fromkeys(files)]
        joined = Dataset.innerjoin_many(*map(Dataset.load, paths))
        wanted = {result.name for result in results}
        columns = [f for f in joined.fields() if f == "uid" or f.split("/")[0] in wanted]
        return Dataset({column: joined[column] for column in columns})

    def input_rows(self, project: str, job: Job, name: str, which: Any = "all") -> Any:
        given = known(job.spec.inputs.root, name, "input")
        if not given.connections:
            raise RefusalError(404, f"input {name} has no connection")
        parts = [
            self.joined(project, self.output(project, connection.job_uid, connection.output), which)
            for connection in given.connections
        ]
        return parts[0] if len(parts) == 1 else Dataset.append_many(*parts)


def known(table: dict[Any, Any], key: Any, what: str) -> Any:
    if key not in table:
        raise RefusalError(404, f"{what} {key} not found")
    return table[key]


def now() -> datetime:
    return datetime.now(UTC)


def new_id() -> str:
    return secrets.token_hex(12)
