"""A particle file of RELION or cryoSPARC becomes particles.parquet and import.json."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cryodrgn_pipeline import __version__
from cryodrgn_pipeline.conventions import Remedies
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.io.atomic import write_json
from cryodrgn_pipeline.io.imported import INFO, PARTICLES, aberration_note
from cryodrgn_pipeline.io.tables import write_particles
from cryodrgn_pipeline.particles import UNKNOWN_BOX, ParticleSet
from cryodrgn_pipeline.sources.cryosparc import read_cryosparc
from cryodrgn_pipeline.sources.draft import Draft, parse_overrides
from cryodrgn_pipeline.sources.relion import read_relion
from cryodrgn_pipeline.sources.stacks import StackFile, check_stacks, find_stacks, plain_path

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the user says beside the particle file.

    Parameters
    ----------
    passthrough
        cryoSPARC passthrough files of the same job.
    datadir
        Folder that the image paths are relative to; None to look around.
    assignments
        `key=value` texts that overwrite a column for all particles.
    metadata_only
        Do not look for the image files.
    class_number
        The class to take from a classification.
    remedies
        Mends of poses that deviate from their package's convention.
    """

    passthrough: tuple[Path, ...] = ()
    datadir: Path | None = None
    assignments: tuple[str, ...] = ()
    metadata_only: bool = False
    class_number: int | None = None
    remedies: Remedies = field(default_factory=Remedies)


def import_particles(source: Path, output: Path, options: ImportOptions | None = None) -> ParticleSet:
    """Import a particle file: write `output/particles.parquet` and `output/import.json`.

    Parameters
    ----------
    source
        RELION `.star` or cryoSPARC `.cs` file.
    output
        Folder to write into; made if needed.
    options
        See `ImportOptions`.

    Raises
    ------
    InputFormatError
        If the source or its images are unusable.
    ConfigError
        If an option is.
    """
    source, output, options = Path(source), Path(output), options or ImportOptions()
    overrides = parse_overrides(options.assignments)
    if options.datadir is not None and not options.datadir.is_dir():
        raise ConfigError(f"--datadir {options.datadir}: no such folder")
    draft = _read(source, options, overrides)
    draft.override(overrides)
    files: list[StackFile] = []
    if not options.metadata_only:
        files = check_stacks(draft, find_stacks(draft, options.datadir))
    particles = draft.build(options.remedies)
    paths = tuple(str(file.path) for file in files) or tuple(map(plain_path, draft.stack_paths))
    particles = replace(particles, images=replace(particles.images, stack_paths=paths))
    output.mkdir(parents=True, exist_ok=True)
    (output / INFO).unlink(missing_ok=True)  # an interrupted import must not pair old words with new rows
    write_particles(particles, output / PARTICLES)
    info = _record(draft, particles, options, overrides, files)
    write_json(output / INFO, info)
    _say(info, particles)
    return particles


def _read(source: Path, options: ImportOptions, overrides: dict[str, float]) -> Draft:
    suffix = source.suffix.lower()
    if suffix == ".cs":
        return read_cryosparc(source, options.passthrough, overrides, options.class_number)
    if suffix != ".star":
        raise InputFormatError(
            f"{source}: expected a RELION .star or cryoSPARC .cs file, found the suffix {suffix or '(none)'}"
        )
    if options.passthrough:
        raise ConfigError("--passthrough belongs to cryoSPARC .cs files; a .star file has none")
    return read_relion(source, overrides, options.class_number)


def _record(
    draft: Draft,
    particles: ParticleSet,
    options: ImportOptions,
    overrides: dict[str, float],
    files: Sequence[StackFile],
) -> dict[str, Any]:
    stacks = [{**asdict(file), "path": str(file.path)} for file in files]
    return {
        "version": __version__,
        "source": _file_record(draft.path, draft.kind),
        "passthrough": [_file_record(path, "cs") for path in options.passthrough],
        "datadir": str(options.datadir.absolute()) if options.datadir else None,
        "metadata_only": options.metadata_only,
        "class": options.class_number,
        "overrides": overrides,
        "conventions": asdict(options.remedies),
        "columns": draft.origins,
        "n_particles": len(particles),
        "counts": {
            **draft.counts,
            "stacks": len(draft.stack_paths),
            "with_poses": len(particles) if particles.poses else 0,
        },
        "unapplied_aberrations": draft.aberrations,
        "notes": draft.notes,
        "warnings": draft.warnings,
        "image_stacks": stacks or [{"source_path": path} for path in draft.stack_paths],
    }


def _file_record(path: Path, kind: str) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "path": str(path.absolute()),
        "kind": kind,
        "sha256": digest,
        "size_bytes": path.stat().st_size,
    }


def _say(info: dict[str, Any], particles: ParticleSet) -> None:
    for note in info["notes"]:
        log.info("%s", note)
    for item in info["unapplied_aberrations"]:
        log.warning("%s", aberration_note(item))
    for warning in info["warnings"]:
        log.warning("%s", warning)
    if particles.poses is None:
        log.warning("the source has no poses: preprocess can use it, consensus and train cannot")
    if (particles.optics.box_size_px == UNKNOWN_BOX).any():
        log.info("the box size is not known without the images (null in particles.parquet)")
