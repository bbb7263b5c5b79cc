"""A cryoSPARC job's particles, consensus map and mask as plain files that the other steps read."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline import __version__
from cryodrgn_pipeline.errors import ExternalJobError, InputFormatError
from cryodrgn_pipeline.interop.cryosparc_client import Connection, output_of_kind
from cryodrgn_pipeline.io.atomic import replacing, write_json
from cryodrgn_pipeline.io.cs import write_dataset

log = logging.getLogger(__name__)

PARTICLES, SUMMARY, PROJECT = "particles.cs", "cryosparc.json", "project"
SLOTS = {"volume": "map", "mask": "mask"}  # by the type of the output
FILES = {"volume": "map.mrc", "mask": "mask.mrc"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where particles are in cryoSPARC.

    `project` such as P3, `job` such as J42, `output` the name of its particle output. `volume` and `mask`
    name outputs with the consensus map and a mask, None for none. `project_folder`: where the project's
    folder is mounted on this machine, None where it has the path that cryoSPARC tells.
    """

    project: str
    job: str
    output: str = "particles"
    volume: str | None = None
    mask: str | None = None
    project_folder: Path | None = None


def read_job(source: Source, output: Path) -> Path:
    """Write a job's particles, all slots joined by uid, and its map and mask into a folder.

    `particles.cs` has the project's own paths, and `project` is a link to its folder, which is what
    `import --datadir` needs. Images are not copied: they are read from there.

    Parameters
    ----------
    source
        Project, job and outputs.
    output
        Folder to write: `particles.cs`, `cryosparc.json`, `project`, and as asked `map.mrc` and `mask.mrc`.

    Returns
    -------
    The path of particles.cs.

    Raises
    ------
    ExternalJobError
        If cryoSPARC cannot be reached, or has no such job or output.
    InputFormatError
        If the project's folder or an image stack is not visible on this machine.
    """
    connection = Connection.open()
    where = f"{source.project} {source.job}"
    outputs = connection.outputs(source.project, source.job)
    output_of_kind(outputs, source.output, "particle", where)
    wanted = {"volume": source.volume, "mask": source.mask}
    named = {kind: name for kind, name in wanted.items() if name is not None}
    for kind, name in named.items():
        output_of_kind(outputs, name, kind, where, f"; name another, or none with `{kind}: null`")
    folder = _visible_folder(connection, source)
    dataset = connection.load(source.project, source.job, source.output)
    if not len(dataset):
        raise ExternalJobError(f"{where}: output {source.output} holds no particles")
    if "blob/path" not in dataset.fields():
        raise InputFormatError(f"{where}: its particles have no images, only {', '.join(dataset.fields())}")
    _refuse_invisible(np.unique(np.asarray(dataset["blob/path"]).astype(str)), folder)
    paths = {
        kind: _path_of(connection.load(source.project, source.job, name), SLOTS[kind], where)
        for kind, name in named.items()
    }
    _refuse_invisible(np.array(list(paths.values())), folder)
    output.mkdir(parents=True, exist_ok=True)
    _link(output / PROJECT, folder)
    copies = {kind: folder / path for kind, path in paths.items()}
    for kind, path in copies.items():
        with replacing(output / FILES[kind]) as temporary:
            shutil.copyfile(path, temporary)
    write_dataset({name: dataset[name] for name in dataset.fields()}, output / PARTICLES)
    write_json(output / SUMMARY, _summary(source, connection, folder, dataset, copies))
    log.info("%d particles of %s %s written to %s", len(dataset), where, source.output, output)
    return output / PARTICLES


def _visible_folder(connection: Connection, source: Source) -> Path:
    told = connection.project_folder(source.project)
    folder = told if source.project_folder is None else source.project_folder
    if not folder.is_dir():
        raise InputFormatError(
            f"{folder}: the folder of project {source.project} is not visible on this machine. Image stacks "
            "are not copied over the network: run this on a machine that shares cryoSPARC's file system, "
            "or say with --project-folder where the project is mounted here"
        )
    return folder.absolute()


def _refuse_invisible(paths: NDArray[np.str_], folder: Path) -> None:
    lacking = [path for path in paths if not (folder / path).is_file()]
    if lacking:
        raise InputFormatError(
            f"{folder / lacking[0]}: not visible on this machine, like {len(lacking)} of {len(paths)} files "
            "that the job names; links in the project must lead to folders that are mounted here"
        )


def _path_of(dataset: Any, slot: str, where: str) -> str:
    """The file of a one-row output: that of the slot, or of the only slot that has one."""
    paths = [name for name in dataset.fields() if name.endswith("/path")]
    column = f"{slot}/path" if f"{slot}/path" in paths else paths[0] if len(paths) == 1 else None
    if column is None or len(dataset) != 1:
        raise ExternalJobError(
            f"{where}: one row with the column {slot}/path expected, found {len(dataset)} with "
            f"{', '.join(dataset.fields())}"
        )
    return str(dataset[column][0])


def _link(link: Path, folder: Path) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.symlink_to(folder)
    temporary.replace(link)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _summary(
    source: Source, connection: Connection, folder: Path, dataset: Any, copies: dict[str, Path]
) -> dict[str, Any]:
    return {
        "version": __version__,
        "cryosparc_tools": connection.tools_version,
        "project": source.project,
        "job": source.job,
        "output": source.output,
        "project_folder": str(folder),
        "n_particles": len(dataset),
        "columns": list(dataset.fields()),
        "copied": {key: {"path": str(path), "sha256": _sha256(path)} for key, path in copies.items()},
    }
