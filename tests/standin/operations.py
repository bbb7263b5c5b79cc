"""What the implemented functions do. `S`: stated by the client's documentation; `I`: inferred."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryosparc import mrc
from cryosparc.dataset import Dataset
from cryosparc.models.asset import GridFSAsset, GridFSFile
from cryosparc.models.event import CheckpointEvent, ImageEvent, TextEvent
from cryosparc.models.job import UiTileImage
from cryosparc.models.job_spec import (
    Connection,
    Input,
    InputResult,
    InputSlot,
    Output,
    OutputResult,
    OutputSlot,
    Params,
)
from cryosparc.spec import ASSET_CONTENT_TYPES

from standin.slots import slot_fields
from standin.state import EXTERNAL, RefusalError, State, known, new_id, now

NAME = re.compile(r"[A-Za-z][0-9A-Za-z_]*")
OPEN = ("building", "running", "waiting")
IMPORT_PARAMETERS = {"volume_blob_path", "volume_out_name", "volume_psize"}  # seen in published scripts
PNG_MAGIC = b"\x89PNG"
OPERATIONS: dict[str, Callable[..., Any]] = {}


def operation(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS[name] = function
        return function

    return register


# ── The instance ──


@operation("health")
def health(state: State) -> str:
    return "OK"


@operation("login")
def login(state: State, username: str, password: str, **_: Any) -> dict[str, str]:
    if (username, password) != (state.user.emails[0].address, state.password_hash):
        raise RefusalError(401, "Incorrect email or password")
    token = secrets.token_hex(16)
    state.tokens.add(token)
    return {"access_token": token, "token_type": "bearer"}


@operation("users.me")
def me(state: State) -> Any:
    return state.user


@operation("config.get_version")
def version(state: State) -> str:
    return state.version


@operation("projects.find_one")
def find_project(state: State, project: str) -> Any:
    return known(state.projects, project, "project")


@operation("projects.get_directory")
def project_directory(state: State, project: str) -> str:
    return str(state.folder(project))


@operation("workspaces.find_one")
def find_workspace(state: State, project: str, workspace: str) -> Any:
    return known(state.workspaces, (project, workspace), "workspace")


# ── Jobs ──


@operation("jobs.find")
def find_jobs(
    state: State,
    project_uid: list[str] | None = None,
    workspace_uid: list[str] | None = None,
    type: list[str] | None = None,
    status: list[str] | None = None,
    order: int = 1,
    after: str | None = None,
    limit: int = 100,
    **_: Any,
) -> list[Any]:
    found = [
        job
        for (project, _uid), job in state.jobs.items()
        if (not project_uid or project in project_uid)
        and (not workspace_uid or set(workspace_uid) & set(job.workspace_uids))
        and (not type or job.spec.type in type)
        and (not status or job.status in status)
    ][::order]
    ids = [job.id for job in found]
    return found[ids.index(after) + 1 if after in ids else 0 :][:limit]


@operation("jobs.find_one")
def find_job(state: State, project: str, job: str) -> Any:
    return state.job(project, job)


@operation("jobs.get_status")
def job_status(state: State, project: str, job: str) -> str:
    return state.job(project, job).status


@operation("jobs.get_directory")
def job_directory(state: State, project: str, job: str) -> str:
    return str(state.folder(project) / state.job(project, job).job_dir)


@operation("jobs.create")
def create_job(
    state: State,
    project: str,
    workspace: str,
    params: Any = None,
    type: str = "",
    title: str = "",
    description: str = "",
    **_: Any,
) -> Any:
    known(state.workspaces, (project, workspace), "workspace")
    if type not in (EXTERNAL, "import_volumes"):
        raise RefusalError(501, f"the stand-in makes no jobs of type {type!r}")
    if unknown := set(params or {}) - IMPORT_PARAMETERS:
        raise RefusalError(422, f"unknown parameters {sorted(unknown)}")
    job = state.new_job(project, workspace, type, title, description)
    job.spec.params = Params(**(params or {}))
    return job


@operation("jobs.enqueue")
def enqueue(state: State, project: str, job: str, **_: Any) -> Any:
    """Import 3D Volumes, carried out at once: one output per file that the path matches, in their order. I"""
    found = state.job(project, job)
    if found.spec.type != "import_volumes" or found.status != "building":
        raise RefusalError(409, f"{job} is a {found.spec.type} and {found.status}; it cannot be queued")
    given = Path(found.spec.params.volume_blob_path)
    files = sorted(given.parent.glob(given.name))
    if not files:
        return state.set_status(found, "failed")
    for number, file in enumerate(files, start=1):
        header, _data = mrc.read(file)
        row = Dataset.allocate(1, slot_fields("volume", "map", "blob"))
        row["map/path"] = str(file.relative_to(state.folder(project)))
        row["map/shape"] = [[header.nz, header.ny, header.nx]]
        row["map/psize_A"] = header.xlen / header.nx
        state.add_output(found, f"imported_volume_{number}", "volume", [("map", "blob", False)], row)
    return state.set_status(found, "completed")


@operation("jobs.set_description")
def set_description(state: State, project: str, job: str, description: str) -> Any:
    state.job(project, job).description = description
    return state.job(project, job)


@operation("jobs.mark_running")
def mark_running(state: State, project: str, job: str, status: str = "running") -> Any:
    found = state.external(project, job, "building")
    for name, given in found.spec.inputs.root.items():
        if len(given.connections) < given.count_min:
            raise RefusalError(409, f"input {name} needs {given.count_min} connections")  # S
    return state.set_status(found, status)


@operation("jobs.mark_completed")
def mark_completed(state: State, project: str, job: str) -> Any:
    return state.set_status(
        state.external(project, job, "running", "waiting", "killed", "failed"), "completed"
    )  # S


@operation("jobs.mark_failed")
def mark_failed(state: State, project: str, job: str, error: str | None = None) -> Any:
    found = state.set_status(state.external(project, job), "failed")
    found.has_error = True
    if error:
        _event(state, project, job, TextEvent, text=error, type="error")
    return found


@operation("jobs.clear")
def clear(state: State, project: str, job: str, **_: Any) -> Any:
    return state.clear(project, job)


# ── Inputs and outputs of external jobs ──


@operation("jobs.add_external_input")
def add_input(state: State, project: str, job: str, name: str, spec: Any) -> Any:
    found = state.external(project, job, *OPEN)  # S
    if not NAME.fullmatch(name):
        raise RefusalError(422, f"bad input name {name!r}")  # S
    required = [getattr(slot, "required", True) for slot in spec.slots]
    found.spec.inputs.root[name] = Input(
        type=spec.type,
        title=spec.title,
        description=spec.description,
        count_min=spec.count_min,
        count_max=spec.count_max,
        slots=[
            InputSlot(name=slot.name, dtype=slot.dtype, required=needed)
            for slot, needed in zip(_known_slots(spec.type, spec.slots), required, strict=True)
        ],
    )
    return found


@operation("jobs.add_external_output")
def add_output(state: State, project: str, job: str, name: str, spec: Any) -> Any:
    found = state.external(project, job, *OPEN)  # S
    if not NAME.fullmatch(name):
        raise RefusalError(422, f"bad output name {name!r}")  # S
    if spec.passthrough is not None:  # S
        given = known(found.spec.inputs.root, spec.passthrough, "input")
        if given.type != spec.type:
            raise RefusalError(422, f"passthrough input {spec.passthrough} is of type {given.type}")  # I
    slots = _known_slots(spec.type, spec.slots)
    found.spec.outputs.root[name] = Output(
        type=spec.type,
        title=spec.title,
        description=spec.description,
        slots=slots,
        passthrough=spec.passthrough,
        results=[OutputResult(name=slot.name, dtype=slot.dtype) for slot in slots],
    )
    return found


def _known_slots(kind: str, slots: list[Any]) -> list[OutputSlot]:
    found = []
    for slot in slots:
        if isinstance(slot, str):
            slot = OutputSlot(name=slot.lstrip("?"), dtype=slot.lstrip("?"))
        try:
            slot_fields(kind, slot.name, slot.dtype)
        except KeyError as error:
            raise RefusalError(422, error.args[0]) from error  # S (InvalidSlotsError of 4.x)
        found.append(OutputSlot(name=slot.name, dtype=slot.dtype))
    return found


@operation("jobs.get_output_fields")
def output_fields(state: State, project: str, job: str, name: str, dtype_params: Any = None) -> Any:
    output = state.output(project, job, name)
    return [column for slot in output.slots for column in slot_fields(output.type, slot.name, slot.dtype)]


@operation("jobs.connect")
def connect(
    state: State, project: str, job: str, name: str, source_output_name: str, source_job_uid: str
) -> Any:
    found = state.external(project, job, *OPEN)
    given = known(found.spec.inputs.root, name, "input")
    output = state.output(project, source_job_uid, source_output_name)
    if output.type != given.type:
        raise RefusalError(422, f"a {output.type} output cannot be connected to a {given.type} input")
    if given.count_max != "inf" and len(given.connections) >= given.count_max:
        raise RefusalError(422, "too many connections")
    there = {result.name for result in output.results}
    lacking = [slot.name for slot in given.slots if slot.required and slot.name not in there]
    if lacking:
        raise RefusalError(422, f"the source output lacks the required slots {lacking}")  # S
    wanted = {slot.name for slot in given.slots}
    given.connections.append(
        Connection(
            job_uid=source_job_uid,
            output=source_output_name,
            results=[
                InputResult(
                    name=result.name if result.name in wanted else None,
                    dtype=result.dtype,
                    job_uid=source_job_uid,
                    output=source_output_name,
                    result=result.name,
                )
                for result in output.results
            ],
        )
    )
    found.parents = sorted({*found.parents, source_job_uid})
    return found


@operation("jobs.save_output")
def save_output(
    state: State,
    project: str,
    job: str,
    name: str,
    dataset: Any,
    filename: str | None = None,
    version: int = 0,
) -> Any:
    found = state.external(project, job, "running", "waiting")  # S
    output = known(found.spec.outputs.root, name, "output")
    wanted = output_fields(state, project, job, name)
    _check_columns(name, dataset, wanted)
    if len(set(dataset["uid"].tolist())) != len(dataset):
        raise RefusalError(422, "repeated uids")  # I
    for column, _ in wanted:
        if column.endswith("/path"):
            for value in set(dataset[column].tolist()):
                if not state.inside(project, value.lstrip(">")).is_file():
                    raise RefusalError(422, f"{column}: there is no {value!r} in project {project}")  # I
    if output.type == "volume" and len(dataset) != 1:
        raise RefusalError(422, "a volume output holds one row")  # I
    file = f"{job}/{filename or f'{job}_{name}.cs'}"
    rows = Dataset({column: dataset[column] for column in ["uid", *(column for column, _ in wanted)]})
    passed = _passed_through(state, project, found, output, dataset["uid"])
    rows.save(state.folder(project) / file)
    output.results = [
        OutputResult(
            name=slot.name, dtype=slot.dtype, versions=[version], metafiles=[file], num_items=[len(dataset)]
        )
        for slot in output.slots
    ]
    if passed is not None:
        through = f"{job}/{job}_passthrough_{name}.cs"
        passed.save(state.folder(project) / through)
        own = {slot.name for slot in output.slots}
        output.results += [
            OutputResult(
                name=result.result,
                dtype=result.dtype,
                versions=[0],
                metafiles=[through],
                num_items=[len(passed)],
                passthrough=True,
            )
            for connection in found.spec.inputs.root[output.passthrough].connections[:1]
            for result in connection.results
            if result.result not in own
        ]
    output.num_items = len(dataset)
    return found


def _check_columns(name: str, dataset: Any, wanted: list[tuple[str, str]]) -> None:
    given = {column[0]: column[1:] for column in dataset.descr()}
    lacking = [column for column, _ in wanted if column not in given]
    if lacking:
        raise RefusalError(422, f"the dataset for {name} lacks the columns {lacking}")  # I
    expected = {column[0]: column[1:] for column in Dataset.allocate(0, wanted).descr()}
    wrong = [f"{column}: {given[column]}" for column, _ in wanted if given[column] != expected[column]]
    if wrong:
        raise RefusalError(422, f"wrong dtypes: {wrong}")  # I


def _passed_through(state: State, project: str, job: Any, output: Any, uids: Any) -> Any | None:
    """The input's other columns of these uids, joined as the client's documentation says."""
    if output.passthrough is None:
        return None
    own = {slot.name for slot in output.slots}
    source = state.input_rows(project, job, output.passthrough)
    others = [f for f in source.fields() if f == "uid" or f.split("/")[0] not in own]
    kept = Dataset.innerjoin_many(Dataset({"uid": uids}), Dataset({f: source[f] for f in others}))
    if len(kept) != len(uids):
        lacking = len(uids) - len(kept)
        raise RefusalError(422, f"{lacking} of {len(uids)} uids are not in input {output.passthrough!r}")  # I
    return kept


@operation("jobs.load_output")
def load_output(
    state: State, project: str, job: str, name: str, version: Any = "F", slots: Any = "default"
) -> Any:
    return state.joined(project, state.output(project, job, name), slots, version)


@operation("jobs.load_input")
def load_input(
    state: State, project: str, job: str, name: str, force_join: Any = "auto", slots: Any = "default"
) -> Any:
    return state.input_rows(project, state.job(project, job), name, slots)


# ── Events and images ──


def _event(state: State, project: str, job: str, kind: Any, **fields: Any) -> Any:
    state.job(project, job)
    event = kind(_id=new_id(), created_at=now(), updated_at=now(), project_uid=project, job_uid=job, **fields)
    state.events[project, job].append(event)
    return event


@operation("jobs.add_event_log")
def add_event(state: State, project: str, job: str, text: str, type: str = "text") -> Any:
    return _event(state, project, job, TextEvent, text=text, type=type)


@operation("jobs.update_event_log")
def update_event(
    state: State, project: str, job: str, event_id: str, text: str | None = None, type: str | None = None
) -> Any:
    for event in state.events[project, job]:
        if event.id == event_id:
            event.text, event.type = text or event.text, type or event.type
            return event
    raise RefusalError(404, f"no event {event_id}")


@operation("jobs.add_checkpoint")
def add_checkpoint(state: State, project: str, job: str, meta: Any = None) -> Any:
    return _event(state, project, job, CheckpointEvent, meta=meta or {}, type="checkpoint")


@operation("jobs.add_image_log")
def add_image(state: State, project: str, job: str, images: Any, text: str, flags: Any = ("plots",)) -> Any:
    for image in images:
        known(state.assets, image.fileid, "asset")
    return _event(
        state, project, job, ImageEvent, imgfiles=images, text=text, flags=list(flags), type="image"
    )


@operation("assets.upload")
def upload_asset(
    state: State,
    project: str,
    job: str,
    stream: bytes,
    filename: str | None = None,
    format: str | None = None,
) -> Any:
    state.job(project, job)
    kind = format or (filename or "").rsplit(".", 1)[-1]
    if kind not in ASSET_CONTENT_TYPES:
        raise RefusalError(422, "filename or format needed")  # S
    if kind == "png" and not stream.startswith(PNG_MAGIC):
        raise RefusalError(422, "not a PNG image")
    file = GridFSFile(
        _id=new_id(),
        filename=filename or f"asset.{kind}",
        contentType=ASSET_CONTENT_TYPES[kind],
        uploadDate=now(),
        length=len(stream),
        chunkSize=2**21,
        project_uid=project,
        job_uid=job,
    )
    state.assets[file.id] = (file, stream)
    return GridFSAsset(fileid=file.id, filename=file.filename, filetype=kind)


@operation("jobs.set_output_image")
def set_output_image(state: State, project: str, job: str, name: str, asset: Any) -> Any:
    output = known(state.external(project, job).spec.outputs.root, name, "output")
    output.image = known(state.assets, asset.fileid, "asset")[0].id
    return state.job(project, job)


@operation("jobs.set_tile_image")
def set_tile_image(state: State, project: str, job: str, asset: Any) -> Any:
    file = known(state.assets, asset.fileid, "asset")[0]
    state.external(project, job).ui_tile_images = [UiTileImage(name="tile0", fileid=file.id)]
    return state.job(project, job)


# ── Files ──


@operation("projects.upload_file")
def upload_file(state: State, project: str, stream: bytes, overwrite: bool = False, path: str = "") -> str:
    place = state.inside(project, path)
    if place.exists() and not overwrite:
        raise RefusalError(409, f"{path} is there already")  # S
    if not place.parent.is_dir():
        raise RefusalError(404, f"no directory {Path(path).parent}")  # I
    place.write_bytes(stream)
    return str(place)


@operation("projects.download_file")
def download_file(state: State, project: str, path: str = "") -> bytes:
    place = state.inside(project, path)
    if not place.is_file():
        raise RefusalError(404, f"no file {path}")
    return place.read_bytes()


@operation("projects.mkdir")
def make_directory(
    state: State, project: str, parents: bool = False, exist_ok: bool = False, path: str = ""
) -> str:
    place = state.inside(project, path)
    try:
        place.mkdir(parents=parents, exist_ok=exist_ok)
    except OSError as error:
        raise RefusalError(409, str(error)) from error
    return str(place)


@operation("projects.ls")
def list_files(state: State, project: str, recursive: bool = False, path: str = "") -> list[str]:
    place, base = state.inside(project, path), state.folder(project)
    return sorted(str(p.relative_to(base)) for p in (place.rglob("*") if recursive else place.iterdir()))
