"""A run's results as an external job of cryoSPARC: made once, filled whole, refilled when the run changed."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline import __version__
from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.interop.cryosparc_client import Connection, Output, output_of_kind
from cryodrgn_pipeline.interop.cryosparc_content import Content
from cryodrgn_pipeline.interop.cryosparc_import import import_maps
from cryodrgn_pipeline.interop.cryosparc_job import COMPLETED, MAP_FOLDER, ExternalJob, filling
from cryodrgn_pipeline.io.atomic import write_json
from cryodrgn_pipeline.io.output_lock import sole_writer
from cryodrgn_pipeline.io.runs import read_json

log = logging.getLogger(__name__)

JOURNAL, RECEIPT = "job.json", "pushed.json"
INPUT = "particles"
INPUT_SLOTS = ("blob", "ctf", "alignments3D")
MAP_DTYPE = "blob"  # where the refinement has no map to copy it from
MAP_SLOTS = ("map", "map_half_A", "map_half_B")
EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where results go: a workspace of a project; `output` of `job` is what the particles are from."""

    project: str
    workspace: str
    job: str
    output: str = "particles"


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """What a push remembers on disk while it works.

    `mark` is written into the job's description, so that a job can be found whose uid was lost; `job` its
    uid; `digest` that of the content which is or was being filled in; `completed`: it was filled whole;
    `import_job` the uid of cryoSPARC's own job that imports the maps, if that is wanted.
    """

    target: Target
    mark: str
    job: str | None = None
    digest: str | None = None
    completed: bool = False
    import_job: str | None = None


def push(content: Content, target: Target, folder: Path) -> str:
    """Make or refill the external job of a run; does nothing where it holds this content already.

    Parameters
    ----------
    content
        What `cryosparc_content.gather` found.
    target
        Where it goes.
    folder
        Folder for job.json, which a rerun needs, and pushed.json, which appears when all is done.

    Returns
    -------
    The uid of the job, such as J57.

    Raises
    ------
    ExternalJobError
        If cryoSPARC cannot be reached or refuses; the job is then marked as failed.
    InputFormatError
        If particles of the run are not in the output that they are said to be from.
    """
    with sole_writer(folder / JOURNAL):
        connection = Connection.open()
        source = _checked_source(connection, content, target)
        journal, handle = _journal(connection, target, folder / JOURNAL)
        fingerprint = content.digest()
        if handle is None:
            handle = connection.create_external_job(
                target.project, target.workspace, _title(content), _description(content, journal)
            )
        job = ExternalJob(connection, target.project, handle)
        whole = journal.completed and journal.digest == fingerprint and journal.job == job.uid
        if whole and job.status() == COMPLETED:
            log.info("%s holds this content already; nothing to do", job.name)
        else:
            (folder / RECEIPT).unlink(missing_ok=True)
            journal = replace(journal, job=job.uid, digest=fingerprint, completed=False)
            write_json(folder / JOURNAL, asdict(journal))
            job.clear()
            with filling(job):
                _define(job, content, target, source)
                job.start()
                _fill(job, content)
            if content.states and content.import_maps:
                journal = _imported(connection, job, content, journal, folder / JOURNAL)
            journal = replace(journal, completed=True)
            write_json(folder / JOURNAL, asdict(journal))
            log.info("%d particles, %d volumes are in %s", len(content.uid), len(content.states), job.name)
        write_json(folder / RECEIPT, _receipt(journal, content, connection))
        return job.uid


def source_output(outputs: dict[str, Output], target: Target) -> Output:
    """The output that the particles are from; an `ExternalJobError` where there is no such one."""
    return output_of_kind(outputs, target.output, "particle", f"{target.project} {target.job}")


def _checked_source(connection: Connection, content: Content, target: Target) -> dict[str, Output]:
    outputs = connection.outputs(target.project, target.job)
    slots = source_output(outputs, target).slots
    slot = next((name for name in reversed(INPUT_SLOTS) if name in slots), next(iter(slots)))
    there = np.asarray(connection.load(target.project, target.job, target.output, [slot])["uid"])
    lacking = content.uid[~np.isin(content.uid, there.astype(np.uint64))]
    if len(lacking):
        examples = ", ".join(str(uid) for uid in lacking[:EXAMPLES])
        raise InputFormatError(
            f"{content.run}: {len(lacking)} of its {len(content.uid)} particles are not in {target.output} "
            f"of {target.project} {target.job}, such as uid {examples}; name the job that they are from"
        )
    return outputs


def _journal(connection: Connection, target: Target, path: Path) -> tuple[Journal, Any | None]:
    """What an earlier push to the same target remembered, and its job if that still exists."""
    journal = _read_journal(path)
    if journal is not None and journal.target != target:
        log.info("%s is about another target (%s); a new job is made", path, journal.target)
        journal = None
    if journal is None:
        journal = Journal(target=target, mark=secrets.token_hex(8))
        write_json(path, asdict(journal))
        return journal, None
    if journal.job is None:
        return journal, connection.find_by_description(target.project, target.workspace, journal.mark)
    handle = connection.find_job(target.project, journal.job, external=True)
    if handle is None:
        journal = Journal(target=target, mark=journal.mark)
        write_json(path, asdict(journal))
    return journal, handle


def _read_journal(path: Path) -> Journal | None:
    if not path.is_file():
        return None
    content = read_json(path, "remove it; the next push then makes a new job")
    try:
        return Journal(**{**content, "target": Target(**content["target"])})
    except (KeyError, TypeError) as error:
        raise InputFormatError(
            f"{path}: not what push writes ({error}); remove it, and the next push makes a new job"
        ) from error


def _define(job: ExternalJob, content: Content, target: Target, source: dict[str, Output]) -> None:
    connect_particles(job, target, source)
    components = component_slots(content.z.shape[1])
    for group in content.groups:
        job.add_output("particle", group.name, components, group.title, passthrough=INPUT)
    known = map_dtypes(source)
    for state in () if content.import_maps else content.states:
        slots = {slot: known.get(slot, MAP_DTYPE) for slot in MAP_SLOTS[: len(state.files)]}
        job.add_output("volume", state.name, slots, state.title)


def connect_particles(job: ExternalJob, target: Target, source: dict[str, Output]) -> None:
    """Connect the output that the particles are from, unless it is connected."""
    if (target.job, target.output) not in job.inputs().get(INPUT, []):
        slots = source[target.output].slots
        required = {name: slots[name] for name in INPUT_SLOTS if name in slots}
        job.connect(INPUT, target.job, target.output, required or slots)


def component_slots(modes: int) -> dict[str, str]:
    """The slots that 3D Variability gives its particles, with their dtype."""
    return {f"components_mode_{mode}": "components" for mode in range(modes)}


def map_dtypes(source: dict[str, Output]) -> dict[str, str]:
    """The slots of the refinement's own map with their dtypes; empty where it has none."""
    return next((o.slots for o in source.values() if o.kind == "volume" and "map" in o.slots), {})


def _fill(job: ExternalJob, content: Content) -> None:
    stale = [name for name in job.output_names() if name not in content.output_names()]
    job.log(f"cryodrgn_pipeline {__version__}: {content.run.resolve()}")
    if stale:
        job.log(f"outputs of an earlier push that stay empty: {', '.join(stale)}")
    for number, group in enumerate(content.groups, start=1):
        job.progress(f"particles {number} of {len(content.groups)}: {group.title}, {len(group.rows)} rows")
        rows = fill_components(job, group.name, content.uid[group.rows], content.z[group.rows])
        job.save(group.name, rows)
    for number, state in enumerate(content.states, start=1):
        job.progress(f"volume {number} of {len(content.states)}: {state.title}")
        if content.import_maps:
            job.upload(_map_path(state.name, MAP_SLOTS[0]), state.path)
        else:
            map_row = upload_maps(job, state.name, state.files, state.box_size_px, state.voxel_size_a)
            job.save(state.name, map_row)
    for image, caption in content.images:
        job.show(image, caption)
    if content.images:
        job.set_tile(content.images[0][0])


def fill_components(job: ExternalJob, output: str, uid: NDArray[np.uint64], z: NDArray[np.float32]) -> Any:
    """The dataset of an output of particles: `uid` `(n,)` with coordinates `z` `(n, J)`."""
    dataset = job.allocate(output, uid)
    for mode, slot in enumerate(component_slots(z.shape[1])):
        dataset[f"{slot}/component"] = mode
        dataset[f"{slot}/value"] = z[:, mode]
    return dataset


def upload_maps(
    job: ExternalJob, output: str, files: Sequence[Path], box_size_px: int, voxel_size_a: float
) -> Any:
    """Upload a map, and its half maps if given, and make the one-row dataset of their output."""
    dataset = job.allocate(output, 1)
    for slot, file in zip(MAP_SLOTS, files, strict=False):
        path = _map_path(output, slot)
        job.upload(path, file)
        dataset[f"{slot}/path"] = f"{job.uid}/{path}"
        dataset[f"{slot}/shape"] = [[box_size_px] * 3]
        dataset[f"{slot}/psize_A"] = voxel_size_a
    return dataset


def _map_path(output: str, slot: str) -> str:
    return f"{MAP_FOLDER}/{output}_{slot}.mrc"


def _imported(
    connection: Connection, job: ExternalJob, content: Content, journal: Journal, path: Path
) -> Journal:
    def remember(uid: str) -> None:
        write_json(path, asdict(replace(journal, import_job=uid)))

    workspace, expected = journal.target.workspace, len(content.states)
    uid = import_maps(connection, workspace, job, expected, journal.import_job, remember)
    return replace(journal, import_job=uid)


def _title(content: Content) -> str:
    return f"cryodrgn_pipeline {'/'.join(content.run.resolve().parts[-3:])}"


def _description(content: Content, journal: Journal) -> str:
    return f"Written by cryodrgn_pipeline from {content.run.resolve()}. Push {journal.mark}."


def _receipt(journal: Journal, content: Content, connection: Connection) -> dict[str, Any]:
    states = sorted(content.states, key=lambda state: state.name) if content.import_maps else content.states
    names = [f"imported_volume_{n}" if content.import_maps else s.name for n, s in enumerate(states, start=1)]
    return {
        **asdict(journal.target),
        "external_job": journal.job,
        "import_job": journal.import_job,
        "digest": journal.digest,
        "particles": {group.name: len(group.rows) for group in content.groups},
        "volumes": {name: str(state.path) for name, state in zip(names, states, strict=True)},
        "version": __version__,
        "cryosparc_tools": connection.tools_version,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
