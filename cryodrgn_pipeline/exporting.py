"""Particles back to RELION or cryoSPARC: the original table with fewer rows, or the other package's."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.conventions import (
    Remedies,
    cryosparc_from_rotation,
    relion_from_rotation,
    split_from_half_set,
)
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.io import cs, star
from cryodrgn_pipeline.io.ids import id_rows, is_in, read_id_rows
from cryodrgn_pipeline.io.imported import PARTICLES, read_info
from cryodrgn_pipeline.io.tables import read_extra, read_particles
from cryodrgn_pipeline.particles import UNKNOWN_BOX, ParticleSet
from cryodrgn_pipeline.sources.relion import source_ids
from cryodrgn_pipeline.sources.relion_rows import find_tables
from cryodrgn_pipeline.sources.stacks import plain_path

log = logging.getLogger(__name__)

EXAMPLES = 5
KINDS = {".star": "star", ".cs": "cs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The files that an export wrote, the main one first, and the number of particles in it."""

    files: tuple[Path, ...]
    particles: int


def export_particles(import_dir: Path, output: Path, subset: Path | NDArray[Any] | None = None) -> Exported:
    """Write the imported particles, or some of them, as a `.star` or `.cs` file.

    An output of the source's own kind is the original table with rows taken out: every column, the order and
    each value as written stay. The other kind is written anew from poses and CTF. Beside a `.cs` file goes
    the `.csg` that cryoSPARC imports.

    Parameters
    ----------
    import_dir
        Folder of an import.
    output
        File to write; its suffix says which kind.
    subset
        Text file with one particle id per line, or the ids; None takes all imported particles.

    Raises
    ------
    InputFormatError
        If the subset names unknown ids, or the source changed or vanished since the import.
    ConfigError
        If the suffix is neither `.star` nor `.cs`, or an output would replace a file of the source or a
        group file (`.csg`) that another program wrote.
    """
    import_dir, output = Path(import_dir), Path(output)
    kind = KINDS.get(output.suffix.lower())
    if kind is None:
        raise ConfigError(f"-o {output}: the suffix must be .star (RELION) or .cs (cryoSPARC)")
    info = read_info(import_dir)
    sources = [Path(record["path"]) for record in (info["source"], *info["passthrough"])]
    same_kind = info["source"]["kind"] == kind
    files = [output, *_passthrough_names(output, len(sources) - 1)] if same_kind else [output]
    for file in files:
        if any(file.exists() and source.exists() and file.samefile(source) for source in sources):
            raise ConfigError(
                f"-o {output}: {file} is a file the particles were imported from; choose another name"
            )
    group = output.with_suffix(".csg") if kind == "cs" else None
    if (
        group is not None
        and group.exists()
        and cs.GROUP_DESCRIPTION not in group.read_text("utf-8", "replace")
    ):
        raise ConfigError(f"-o {output}: {group} would be replaced, but is not ours; choose another name")
    ids = read_extra(import_dir / PARTICLES, ["particle_id"])["particle_id"]
    keep = np.ones(len(ids), dtype=bool)
    if subset is not None:
        keep[:] = False
        keep[_chosen(subset, ids, f"the import {import_dir}")] = True
    if same_kind:
        _say_what_stays(info)
        for record in (info["source"], *info["passthrough"]):
            _refuse_changed(record)
        for source, file in zip(sources, files, strict=True):
            (cs.write_masked if kind == "cs" else _write_masked_star)(source, ids[keep], file)
    else:
        particles = _with_source_paths(read_particles(import_dir), info).take(keep)
        (write_cs if kind == "cs" else write_star)(particles, output)
    if group is not None:
        cs.write_group(files, group)
        files.append(group)
    log.info("%d of %d particles written to %s", int(keep.sum()), len(ids), output)
    return Exported(files=tuple(files), particles=int(keep.sum()))


def _chosen(subset: Path | NDArray[Any], ids: NDArray[Any], where: str) -> NDArray[np.int64]:
    if isinstance(subset, np.ndarray):
        return id_rows(subset, ids, where, "the selection")
    return read_id_rows(subset, ids, where)


def _say_what_stays(info: dict[str, Any]) -> None:
    if info["overrides"] or info["conventions"] != asdict(Remedies()):
        log.info("the original rows are written: --set values and remedies of the import are not in them")


def _passthrough_names(output: Path, count: int) -> list[Path]:
    numbers = ["", *(f"_{number}" for number in range(2, count + 1))][:count]
    return [output.with_name(f"{output.stem}_passthrough_particles{number}.cs") for number in numbers]


def _write_masked_star(source: Path, keep: NDArray[Any], output: Path) -> None:
    particles, optics = find_tables(source)
    mask = is_in(source_ids(source), keep)
    masks = {particles.name: mask}
    if optics is not None and "rlnOpticsGroup" in particles.columns:
        groups = star.read_table(source, optics, [], ["rlnOpticsGroup"]).integers("rlnOpticsGroup")
        used = star.read_table(source, particles, [], ["rlnOpticsGroup"]).integers("rlnOpticsGroup")[mask]
        masks[optics.name] = np.isin(groups, used)
    star.write_masked(source, masks, output)


def _refuse_changed(record: dict[str, Any]) -> None:
    path = Path(record["path"])
    if not path.is_file():
        raise InputFormatError(f"{path}: the imported file is gone; import it again from where it is now")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
            raise InputFormatError(f"{path}: has changed since it was imported; import it again")


def _with_source_paths(particles: ParticleSet, info: dict[str, Any]) -> ParticleSet:
    """Image paths as the source had them, relative to its project, instead of where they were found."""
    source = {stack.get("path"): plain_path(stack["source_path"]) for stack in info["image_stacks"]}
    paths = tuple(source.get(path, path) for path in particles.images.stack_paths)
    return replace(particles, images=replace(particles.images, stack_paths=paths))


def write_star(particles: ParticleSet, output: Path) -> None:
    """Write a particle set as a RELION 3.1 file, atomically; optics groups are numbered from 1."""
    optics, ctf, images = particles.optics, particles.ctf, particles.images
    if (particles.contrast_sign == -1).any():
        log.warning(
            "%d of %d particles are dark on light; RELION takes all images for light on dark: invert them",
            *(int((particles.contrast_sign == -1).sum()), len(particles)),
        )
    fields = {
        "rlnVoltage": optics.voltage_kv,
        "rlnSphericalAberration": optics.cs_mm,
        "rlnAmplitudeContrast": optics.amplitude_contrast,
        "rlnImagePixelSize": optics.pixel_size_a,
    }
    if (optics.box_size_px != UNKNOWN_BOX).all():
        fields["rlnImageSize"] = optics.box_size_px.astype(np.float64)
    rows = np.stack([optics.optics_group.astype(np.float64), *fields.values()], axis=1)
    _, first, group = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    numbers = np.arange(1, len(first) + 1)
    groups: dict[str, Any] = {
        "rlnOpticsGroup": numbers,
        "rlnOpticsGroupName": [f"opticsGroup{number}" for number in numbers],
        **{name: values[first] for name, values in fields.items()},
        "rlnImageDimensionality": np.full(len(first), 2),
    }
    if "rlnImageSize" in groups:
        groups["rlnImageSize"] = groups["rlnImageSize"].astype(np.int64)
    paths = images.stack_paths
    table: dict[str, Any] = {
        "rlnImageName": [
            f"{index + 1:06d}@{paths[stack]}" for stack, index in zip(images.stack, images.index, strict=True)
        ],
        "rlnOpticsGroup": numbers[group.reshape(-1)],
        "rlnDefocusU": ctf.defocus_u_a,
        "rlnDefocusV": ctf.defocus_v_a,
        "rlnDefocusAngle": ctf.defocus_angle_deg,
        "rlnPhaseShift": ctf.phase_shift_deg,
    }
    if particles.poses is not None:
        rot, tilt, psi = relion_from_rotation(particles.poses.rotation)
        table |= {"rlnAngleRot": rot, "rlnAngleTilt": tilt, "rlnAnglePsi": psi}
        table |= {f"rlnOrigin{axis}Angst": particles.poses.shift_a[:, i] for i, axis in enumerate("XY")}
    if particles.half_set is not None:
        table["rlnRandomSubset"] = particles.half_set
    if particles.class_number is not None:
        table["rlnClassNumber"] = particles.class_number + 1  # cryoSPARC counts classes from 0
    if particles.micrograph is not None:
        table["rlnMicrographName"] = particles.micrograph
    star.write_tables({"optics": groups, "particles": table}, output)


def write_cs(particles: ParticleSet, output: Path) -> None:
    """Write a particle set as a cryoSPARC file, atomically; ids that are no uid become a hash of theirs."""
    optics, ctf, images = particles.optics, particles.ctf, particles.images
    n = len(particles)
    box = np.repeat(optics.box_size_px[:, None], 2, axis=1)
    columns: dict[str, NDArray[Any]] = {
        "uid": _uids(particles.particle_id),
        "blob/path": np.array(images.stack_paths, dtype=object)[images.stack],
        "blob/idx": images.index.astype(np.uint32),
        "blob/psize_A": optics.pixel_size_a.astype(np.float32),
        "blob/sign": particles.contrast_sign.astype(np.float32),
        "ctf/type": np.full(n, "imported", dtype=object),
        "ctf/exp_group_id": optics.optics_group.astype(np.uint32),
        "ctf/accel_kv": optics.voltage_kv.astype(np.float32),
        "ctf/cs_mm": optics.cs_mm.astype(np.float32),
        "ctf/amp_contrast": optics.amplitude_contrast.astype(np.float32),
        "ctf/df1_A": ctf.defocus_u_a.astype(np.float32),
        "ctf/df2_A": ctf.defocus_v_a.astype(np.float32),
        "ctf/df_angle_rad": np.deg2rad(ctf.defocus_angle_deg).astype(np.float32),
        "ctf/phase_shift_rad": np.deg2rad(ctf.phase_shift_deg).astype(np.float32),
        "ctf/scale": np.ones(n, dtype=np.float32),
    }
    if (optics.box_size_px != UNKNOWN_BOX).all():
        columns["blob/shape"] = box.astype(np.uint32)
    if particles.poses is not None:
        shift_px = particles.poses.shift_a / optics.pixel_size_a[:, None]
        columns |= {
            "alignments3D/pose": cryosparc_from_rotation(particles.poses.rotation).astype(np.float32),
            "alignments3D/shift": shift_px.astype(np.float32),
            "alignments3D/psize_A": optics.pixel_size_a.astype(np.float32),
        }
        if particles.half_set is not None:
            columns["alignments3D/split"] = split_from_half_set(particles.half_set)
        if particles.class_number is not None:
            columns["alignments3D/class"] = np.maximum(particles.class_number - 1, 0).astype(np.uint32)
    if particles.micrograph is not None:
        columns["location/micrograph_path"] = particles.micrograph.astype(object)
    cs.write_dataset(columns, output)


def _uids(ids: NDArray[Any]) -> NDArray[np.uint64]:
    """uint64 ids as they are; texts become the first 8 bytes of their BLAKE2 hash, the same every time."""
    if ids.dtype.kind == "u":
        return ids.astype(np.uint64)
    digests = b"".join(hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in ids)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)
