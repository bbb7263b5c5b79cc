"""What only a running cryoSPARC can tell: asked in a scratch workspace, with the calls that `push` makes."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryodrgn_pipeline import __version__
from cryodrgn_pipeline.errors import CryodrgnPipelineError, ExternalJobError
from cryodrgn_pipeline.interop.cryosparc_client import Connection, Output
from cryodrgn_pipeline.interop.cryosparc_import import import_maps
from cryodrgn_pipeline.interop.cryosparc_job import BUILDING, COMPLETED, ExternalJob, filling
from cryodrgn_pipeline.interop.cryosparc_push import (
    INPUT,
    INPUT_SLOTS,
    MAP_DTYPE,
    MAP_SLOTS,
    Target,
    component_slots,
    connect_particles,
    fill_components,
    map_dtypes,
    source_output,
    upload_maps,
)
from cryodrgn_pipeline.io.mrc import write_volume

YES, NO, FAILED = "yes", "no", "failed"
MODES, ROWS_AT_MOST = 2, 1000
MAP_PX, VOXEL_A = 8, 1.5
MAPS = {"volume": 1, "volume_with_halves": 3}  # output → how many slots
GREY_PIXEL_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63680000"
    "0082008177cd72b60000000049454e44ae426082"
)


class _OtherwiseError(Exception):
    """It works, but not as this package assumes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The answer to a question: yes, no (it works, but otherwise than assumed) or failed; what was seen."""

    question: str
    answer: str
    seen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    target: Target
    connection: Connection
    outputs: dict[str, Output]
    particles: Any
    mark: str
    job: ExternalJob
    folder: Path


def live_check(target: Target) -> tuple[str, list[Finding]]:
    """Go through all that `read-cryosparc` and `push` rely on, in one external job of a scratch workspace.

    Parameters
    ----------
    target
        The scratch workspace, and a refinement to connect to; at most 1000 of its particles are used.

    Returns
    -------
    job, findings
        The uid of the job that was made, and one finding a question, up to the first that failed.

    Raises
    ------
    ExternalJobError
        If there is no connection, no such refinement or workspace: nothing can be asked then.
    """
    connection = Connection.open()
    outputs = connection.outputs(target.project, target.job)
    source_output(outputs, target)
    particles = connection.load(target.project, target.job, target.output)
    if not len(particles):
        raise ExternalJobError(f"{target.project} {target.job}: {target.output} holds no particles")
    mark = secrets.token_hex(8)
    description = f"Written by cryodrgn_pipeline {__version__} live-check; delete it. {mark}"
    handle = connection.create_external_job(
        target.project, target.workspace, "cryodrgn_pipeline live-check", description
    )
    job = ExternalJob(connection, target.project, handle)
    with tempfile.TemporaryDirectory() as folder:
        look = _Look(
            target=target,
            connection=connection,
            outputs=outputs,
            particles=particles,
            mark=mark,
            job=job,
            folder=Path(folder),
        )
        findings: list[Finding] = []
        try:
            with filling(job):
                _ask(WHILE_FILLING, look, findings)
            _ask(AFTERWARDS, look, findings)
        except ExternalJobError as error:
            if not findings or findings[-1].answer != FAILED:
                findings.append(Finding(question="does it complete?", answer=FAILED, seen=str(error)))
    return job.uid, findings


def _ask(questions: dict[str, Callable[[_Look], str]], look: _Look, findings: list[Finding]) -> None:
    for question, answered in questions.items():
        try:
            answer, seen = YES, answered(look)
        except _OtherwiseError as difference:
            answer, seen = NO, str(difference)
        except CryodrgnPipelineError as error:
            findings.append(Finding(question=question, answer=FAILED, seen=str(error)))
            raise
        findings.append(Finding(question=question, answer=answer, seen=seen))


def _loads_all_slots(look: _Look) -> str:
    said = look.outputs[look.target.output]
    found = {name.split("/")[0] for name in look.particles.fields()} - {"uid"}
    if len(look.particles) != said.rows or not found >= set(said.slots):
        raise _OtherwiseError(
            f"{len(look.particles)} rows with {', '.join(sorted(found))}; the job says {said.rows} with "
            f"{', '.join(said.slots)}"
        )
    return f"{len(look.particles)} rows with {', '.join(sorted(found))}"


def _sees_images(look: _Look) -> str:
    if "blob/path" not in look.particles.fields():
        raise _OtherwiseError("these particles have no images")
    path = look.connection.project_folder(look.target.project) / str(look.particles["blob/path"][0])
    if not path.is_file():
        raise _OtherwiseError(
            f"{path} is not visible on this machine: read-cryosparc needs it, push does not"
        )
    return str(path)


def _maps_have_the_dtype(look: _Look) -> str:
    told = map_dtypes(look.outputs)
    found = ", ".join(f"{slot} {dtype}" for slot, dtype in told.items()) or "the job has no map"
    if told.get("map") != MAP_DTYPE:
        raise _OtherwiseError(found)
    return found


def _is_found_by_description(look: _Look) -> str:
    found = look.connection.find_by_description(look.target.project, look.target.workspace, look.mark)
    if found is None:
        raise _OtherwiseError("a push that is killed while it makes its job leaves an empty one behind")
    return str(found.uid)


def _takes_outputs(look: _Look) -> str:
    connect_particles(look.job, look.target, look.outputs)
    look.job.add_output("particle", "particles", component_slots(MODES), "All", passthrough=INPUT)
    known = map_dtypes(look.outputs)
    for name, count in MAPS.items():
        slots = {slot: known.get(slot, MAP_DTYPE) for slot in MAP_SLOTS[:count]}
        look.job.add_output("volume", name, slots, name)
    return f"particles with {', '.join(component_slots(MODES))}; volumes with {', '.join(MAP_SLOTS)}"


def _latents(look: _Look, uid: Any = None) -> Any:
    uid = np.asarray(look.particles["uid"])[:ROWS_AT_MOST] if uid is None else uid
    z = np.random.default_rng(0).normal(size=(len(uid), MODES)).astype(np.float32)
    return fill_components(look.job, "particles", uid, z)


def _components_are_as_in_3dva(look: _Look) -> str:
    dataset = look.job.allocate("particles", 1)
    found = {name: np.asarray(dataset[name]).dtype.str for name in dataset.fields() if name != "uid"}
    kinds = {"component": "<u4", "value": "<f4"}
    wanted = {f"{slot}/{name}": kind for slot in component_slots(MODES) for name, kind in kinds.items()}
    told = ", ".join(f"{name} {kind}" for name, kind in found.items())
    if found != wanted:
        raise _OtherwiseError(told)
    return told


def _saving_is_refused_before_the_start(look: _Look) -> str:
    return _refusal(look, _latents(look), "an output is saved before the job runs")


def _foreign_uids_are_refused(look: _Look) -> str:
    foreign = _latents(look, np.array([1, 2], dtype=np.uint64))
    return _refusal(look, foreign, "rows are taken whose uids are not in the input")


def _refusal(look: _Look, dataset: Any, otherwise: str) -> str:
    try:
        look.job.save("particles", dataset)
    except ExternalJobError as refused:
        return str(refused)
    raise _OtherwiseError(otherwise)


def _starts(look: _Look) -> str:
    look.job.start()
    return look.job.status()


def _particles_come_back(look: _Look) -> str:
    sent = _latents(look)
    look.job.save("particles", sent)
    back = look.connection.load(look.target.project, look.job.uid, "particles")
    place = {uid: row for row, uid in enumerate(np.asarray(back["uid"]).tolist())}
    row = np.array([place.get(uid, -1) for uid in np.asarray(sent["uid"]).tolist()])
    if len(back) != len(sent) or (row < 0).any():
        raise ExternalJobError(f"{len(sent)} rows were saved; {len(back)} came back, or other uids")
    for name in (f"{slot}/value" for slot in component_slots(MODES)):
        if np.asarray(back[name])[row].tobytes() != np.asarray(sent[name]).tobytes():
            raise ExternalJobError(f"{name} came back changed")
    passed = {name.split("/")[0] for name in back.fields()} & set(INPUT_SLOTS)
    if not passed >= set(INPUT_SLOTS) & set(look.outputs[look.target.output].slots):
        told = ", ".join(passed) or "nothing"
        raise _OtherwiseError(f"uids and z come back; of what is passed through only {told}")
    return f"{len(back)} rows, z bit for bit; passed through: {', '.join(sorted(passed))}"


def _takes_maps(look: _Look) -> str:
    file = look.folder / "map.mrc"
    write_volume(file, np.ones((MAP_PX,) * 3, dtype=np.float32), VOXEL_A, "live-check")
    for name, count in MAPS.items():
        look.job.save(name, upload_maps(look.job, name, (file,) * count, MAP_PX, VOXEL_A))
    return f"{', '.join(MAP_SLOTS)}, of the size they were sent with"


def _takes_events(look: _Look) -> str:
    image = look.folder / "pixel.png"
    image.write_bytes(GREY_PIXEL_PNG)
    look.job.log("live-check")
    look.job.progress("progress 1 of 2")
    look.job.progress("progress 2 of 2")
    look.job.show(image, "a grey pixel")
    look.job.set_tile(image)
    return "a line, progress, an image, from 5 on a tile"


def _is_filled_again(look: _Look) -> str:
    look.job.fail("live-check: failed on purpose, to be filled again")
    look.job.clear()
    if look.job.status() != BUILDING:
        raise ExternalJobError(f"the job is {look.job.status()} after clearing, not {BUILDING}")
    kept = bool(look.job.inputs().get(INPUT)) and set(MAPS) <= set(look.job.output_names())
    _takes_outputs(look)
    look.job.start()
    look.job.save("particles", _latents(look))
    _takes_maps(look)
    if not kept:
        raise _OtherwiseError("clearing takes inputs or outputs away; they are added again")
    return "inputs and outputs stay"


def _is_complete(look: _Look) -> str:
    if (status := look.job.status()) != COMPLETED:
        raise ExternalJobError(f"the job is {status}")
    outputs = look.connection.outputs(look.target.project, look.job.uid)
    return "; ".join(f"{name}: {output.rows} rows" for name, output in outputs.items())


def _are_imported(look: _Look) -> str:
    made: list[str] = []
    try:
        import_maps(look.connection, look.target.workspace, look.job, len(MAPS), None, made.append)
    except ExternalJobError as error:
        raise _OtherwiseError(f"{error}: use push without --import-volumes") from error
    return f"{made[0]}, delete it as well"


WHILE_FILLING: dict[str, Callable[[_Look], str]] = {
    "do particles load with all slots, also those passed through?": _loads_all_slots,
    "are image stacks visible on this machine?": _sees_images,
    f"do maps have slots of dtype {MAP_DTYPE}?": _maps_have_the_dtype,
    "is a job found by its description?": _is_found_by_description,
    "can inputs and outputs be added?": _takes_outputs,
    "do latent coordinates have the columns of 3D Variability?": _components_are_as_in_3dva,
    "is saving refused before the start?": _saving_is_refused_before_the_start,
    "does the job start?": _starts,
    "are foreign uids refused?": _foreign_uids_are_refused,
    "do particles come back as they were sent?": _particles_come_back,
    "does the job take maps and half maps?": _takes_maps,
    "does it take log lines and images?": _takes_events,
    "can it be failed, cleared and filled again?": _is_filled_again,
}
AFTERWARDS: dict[str, Callable[[_Look], str]] = {
    "is it completed in the end?": _is_complete,
    "do its maps come in by Import 3D Volumes?": _are_imported,
}
