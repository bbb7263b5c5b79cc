"""cryoSPARC particle tables as a draft of the canonical particle set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.conventions import half_set_from_split, rotation_from_cryosparc, shift_from_px
from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.cs import CsTable
from cryodrgn_pipeline.sources.aberrations import record_cryosparc_aberrations
from cryodrgn_pipeline.sources.draft import Draft

EXPORTED = ">"
"""In exported .cs files: the path is relative to the folder of the .cs file."""

CLASS_POSE = re.compile(r"alignments_class_(\d+)/pose")
STRAIGHT = {
    "pixel_size_a": "blob/psize_A",
    "voltage_kv": "ctf/accel_kv",
    "cs_mm": "ctf/cs_mm",
    "amplitude_contrast": "ctf/amp_contrast",
    "defocus_u_a": "ctf/df1_A",
    "defocus_v_a": "ctf/df2_A",
    "contrast_sign": "blob/sign",
}
RADIANS = {"defocus_angle_deg": "ctf/df_angle_rad", "phase_shift_deg": "ctf/phase_shift_rad"}


def read_cryosparc(
    path: Path, passthrough: Sequence[Path], overrides: Mapping[str, float], class_number: int | None
) -> Draft:
    """Read a cryoSPARC particle file.

    Parameters
    ----------
    path
        `.cs` file with particles, either encoding.
    passthrough
        Further `.cs` files of the same job with the columns that `path` lacks, in any row order.
    overrides
        Values of `--set`; the pixel size among them is the one that shifts without a psize_A are taken in.
    class_number
        For ab initio and heterogeneous refinement: take this class's poses, and the particles whose most
        probable class it is.

    Raises
    ------
    InputFormatError
        If the file is damaged, lacks a column, or has poses of several classes and none was chosen.
    """
    table = CsTable(path, passthrough)
    for name in ("blob/path", "blob/idx"):
        if name not in table:
            raise InputFormatError(f"{path}: {_no_column(name, bool(passthrough))}")
    stacks = table.text("blob/path")
    draft = Draft(
        path=path,
        kind="cs",
        particle_id=table.uid,
        stack_paths=tuple(stacks.dictionary.to_pylist()),
        stack=stacks.indices.to_numpy(zero_copy_only=False).astype(np.int64),
        index=table.integers("blob/idx"),
    )
    draft.counts = {"rows": len(table)}
    draft.origins |= {"particle_id": "uid", "image_path": "blob/path", "image_index": "blob/idx"}
    for name, label in (STRAIGHT | RADIANS).items():
        draft.lacking[name] = f"{label}{'' if passthrough else ', or add --passthrough'}"
        if label in table:
            values = table.numbers(label)
            draft.put(name, np.rad2deg(values) if name in RADIANS else values, label)
    if "pixel_size_a" in overrides:
        draft.put("pixel_size_a", overrides["pixel_size_a"], "--set")
    if "phase_shift_deg" not in draft.columns:
        draft.put("phase_shift_deg", 0.0, "no ctf/phase_shift_rad: 0")
    group = table.integers("ctf/exp_group_id") if "ctf/exp_group_id" in table else np.zeros(len(table))
    draft.put("optics_group", group.astype(float), "ctf/exp_group_id" if group.any() else "one group")
    _box(draft, table)
    if "location/micrograph_path" in table:
        draft.micrograph = table.column("location/micrograph_path").astype(object)
        draft.origins["micrograph"] = "location/micrograph_path"
    record_cryosparc_aberrations(draft, table)
    _poses(draft, table, class_number, bool(passthrough))
    return draft


def _no_column(name: str, joined: bool) -> str:
    where = "the file and its passthrough files lack" if joined else "lacks"
    cure = "" if joined else f"; if the job's passthrough file has {name}, add it with --passthrough"
    return f"{where} the column {name}{cure}"


def _box(draft: Draft, table: CsTable) -> None:
    if "blob/shape" not in table:
        return
    shape = table.integers("blob/shape")
    oblong = int((shape[:, 0] != shape[:, 1]).sum())
    if oblong:
        raise InputFormatError(
            f"{table.path}: blob/shape must be square, but {oblong} of {len(table)} images are not"
        )
    draft.put("box_size_px", shape[:, 0].astype(float), "blob/shape")


def _poses(draft: Draft, table: CsTable, class_number: int | None, joined: bool) -> None:
    classes = sorted(int(found.group(1)) for name in table.fields if (found := CLASS_POSE.fullmatch(name)))
    if class_number is None:
        prefix = _only_poses(table, classes, joined)
        mask = None
    else:
        prefix, mask = _poses_of_class(table, classes, class_number)
    if prefix is None:
        return
    pose, shift = (table.numbers(_needed(table, f"{prefix}/{name}")) for name in ("pose", "shift"))
    draft.rotation = rotation_from_cryosparc(pose)
    draft.origins["rotation"] = f"{prefix}/pose"
    _shift(draft, table, prefix, shift)
    for split in (f"{prefix}/split", "alignments3D/split"):
        if split in table and draft.half_set is None:
            draft.half_set = half_set_from_split(table.integers(split))
            draft.origins["half_set"] = f"{split} + 1"
    if class_number is not None:
        draft.class_number = np.full(len(table), class_number)
    elif "alignments3D/class" in table:
        draft.class_number = table.integers("alignments3D/class")
    if draft.class_number is not None:
        draft.origins["class"] = "--class" if class_number is not None else "alignments3D/class"
    if mask is not None:
        draft.keep(mask)


def _shift(draft: Draft, table: CsTable, prefix: str, shift_px: NDArray[np.float64]) -> None:
    unit = f"{prefix}/psize_A"
    if unit in table:
        pixel_size = table.numbers(unit)
    else:
        pixel_size = draft.pixel_size_a
        draft.warnings.append(
            f"there is no {unit}, so shifts are taken in pixels of the images; the convention check of "
            "consensus judges that"
        )
        unit = "pixel_size_a"
    shift_a = shift_from_px(shift_px, pixel_size)
    for axis, name in enumerate(("shift_x_a", "shift_y_a")):
        draft.put(name, shift_a[:, axis], f"{prefix}/shift x {unit}")


def _needed(table: CsTable, name: str) -> str:
    if name not in table:
        raise InputFormatError(f"{table.path}: {_no_column(name, False)}")
    return name


def _only_poses(table: CsTable, classes: list[int], joined: bool) -> str | None:
    """The one set of 3D poses in the file; None if it has no alignments at all."""
    if "alignments3D/pose" in table:
        return "alignments3D"
    if classes:
        best = _best_class(table, classes)
        sizes = [f"{k} ({int((best == k).sum())} particles)" if best is not None else str(k) for k in classes]
        raise InputFormatError(
            f"{table.path}: holds poses of {len(classes)} classes (ab initio or heterogeneous refinement): "
            f"choose one with --class K; there are {', '.join(sizes)}"
        )
    if any(name.startswith("alignments3D_multi/") for name in table.fields):
        raise InputFormatError(
            f"{table.path}: holds the poses of several classes in alignments3D_multi; give the file of one "
            "class (particles_class_K) instead"
        )
    if any(name.startswith("alignments2D/") for name in table.fields):
        cure = "" if joined else ", or if the passthrough file has them, add --passthrough"
        raise InputFormatError(
            f"{table.path}: holds 2D alignments only, which say nothing of the viewing direction; a 3D "
            f"refinement is needed: run homogeneous or non-uniform refinement and give its particles{cure}"
        )
    return None


def _poses_of_class(table: CsTable, classes: list[int], class_number: int) -> tuple[str, NDArray[np.bool_]]:
    if class_number in classes:
        best = _best_class(table, classes)
        if best is None:
            raise InputFormatError(
                f"{table.path}: lacks class_posterior of some classes among {', '.join(map(str, classes))}: "
                "the particles of a class cannot be told; the passthrough file may have it: --passthrough"
            )
        mask = best == class_number
    elif classes:
        raise InputFormatError(
            f"{table.path}: there is no class {class_number}; its classes are {', '.join(map(str, classes))}"
        )
    elif "alignments3D/class" in table:
        found = table.integers("alignments3D/class")
        mask = found == class_number
        if not mask.any():
            known = ", ".join(str(k) for k in np.unique(found))
            raise InputFormatError(f"{table.path}: no particle of class {class_number}; there are: {known}")
        return "alignments3D", mask
    else:
        raise InputFormatError(f"{table.path}: --class {class_number} was given, but the file has no classes")
    if not mask.any():
        raise InputFormatError(f"{table.path}: class {class_number} is no particle's most probable class")
    return f"alignments_class_{class_number}", mask


def _best_class(table: CsTable, classes: list[int]) -> NDArray[np.int64] | None:
    """Each particle's class of the highest posterior, or None where the posteriors are missing."""
    names = [f"alignments_class_{k}/class_posterior" for k in classes]
    if any(name not in table for name in names):
        return None
    posterior = np.stack([table.numbers(name) for name in names])
    best: NDArray[np.int64] = np.array(classes)[np.argmax(posterior, axis=0)]
    return best
