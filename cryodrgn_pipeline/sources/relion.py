"""RELION particle tables, 3.0 to 5, as a draft of the canonical particle set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.conventions import (
    pixel_size_from_magnification,
    rotation_from_relion,
    shift_from_px,
)
from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.star import StarTable, read_table
from cryodrgn_pipeline.sources.aberrations import MAG_MATRIX, ZERNIKES, record_relion_aberrations
from cryodrgn_pipeline.sources.draft import Draft, number_repeats
from cryodrgn_pipeline.sources.relion_rows import Rows, find_tables, refuse_unsupported

Array = NDArray[np.float64]

ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
STRAIGHT = {
    "voltage_kv": "rlnVoltage",
    "cs_mm": "rlnSphericalAberration",
    "amplitude_contrast": "rlnAmplitudeContrast",
    "defocus_u_a": "rlnDefocusU",
    "defocus_v_a": "rlnDefocusV",
    "defocus_angle_deg": "rlnDefocusAngle",
}
NUMBERS = (
    *STRAIGHT.values(),
    *ANGLES,
    "rlnOriginXAngst",
    "rlnOriginYAngst",
    "rlnOriginX",
    "rlnOriginY",
    "rlnOpticsGroup",
    "rlnImagePixelSize",
    "rlnPixelSize",
    "rlnDetectorPixelSize",
    "rlnMagnification",
    "rlnImageSize",
    "rlnImageDimensionality",
    "rlnPhaseShift",
    "rlnRandomSubset",
    "rlnClassNumber",
    "rlnCtfBfactor",
    "rlnCtfScalefactor",
    "rlnMicrographPreExposure",
    "rlnBeamTiltX",
    "rlnBeamTiltY",
    "rlnCtfDataAreCtfPremultiplied",
    "rlnCtfDataArePhaseFlipped",
    *MAG_MATRIX,
)
TEXTS = ("rlnImageName", "rlnMicrographName", "rlnGroupName", *ZERNIKES)


def read_relion(path: Path, overrides: Mapping[str, float], class_number: int | None) -> Draft:
    """Read a RELION particle file.

    Parameters
    ----------
    path
        `.star` file of RELION 3.0, 3.1, 4 or 5, single particles.
    overrides
        Values of `--set`; the pixel size among them is the one that origins in pixels are taken in.
    class_number
        Keep the particles of this rlnClassNumber only.

    Raises
    ------
    InputFormatError
        If the file is damaged or holds what is not supported: tilt series, CTF-premultiplied images.
    """
    particle_block, optics_block = find_tables(path)
    particles = read_table(path, particle_block, TEXTS, NUMBERS)
    optics = read_table(path, optics_block, ZERNIKES, NUMBERS) if optics_block else None
    rows = Rows(path, particles, optics)
    refuse_unsupported(rows)
    draft = _images(path, particles)
    draft.notes.append(
        "RELION 3.1 or later, with optics table" if optics else "RELION 3.0 or older, one table"
    )
    draft.put("optics_group", rows.group.astype(np.float64), "rlnOpticsGroup" if optics else "one group")
    draft.put("contrast_sign", 1.0, "RELION's rule: light on dark")
    for name, label in STRAIGHT.items():
        draft.lacking[name] = label
        if label in rows:
            draft.put(name, rows.numbers(label), label)
    if "rlnPhaseShift" in rows:
        draft.put("phase_shift_deg", rows.numbers("rlnPhaseShift"), "rlnPhaseShift")
    else:
        draft.put("phase_shift_deg", 0.0, "no rlnPhaseShift: 0")
    if "rlnImageSize" in rows:
        draft.put("box_size_px", rows.integers("rlnImageSize").astype(np.float64), "rlnImageSize")
    _pixel_size(draft, rows, overrides)
    _poses(draft, rows)
    _labels(draft, rows)
    record_relion_aberrations(draft, rows)
    if class_number is not None:
        _choose_class(draft, class_number)
    return draft


def source_ids(path: Path) -> NDArray[np.object_]:
    """The particle ids `(N,)` of all rows of a RELION particle file, in its order."""
    block, _ = find_tables(path)
    return _images(path, read_table(path, block, ["rlnImageName"], ["rlnRandomSubset"])).particle_id


def _images(path: Path, particles: StarTable) -> Draft:
    import pyarrow as pa
    import pyarrow.compute as pc

    names = particles.text("rlnImageName")
    good = pc.match_substring_regex(names, r"^[0-9]{1,15}@.")
    wrong = np.flatnonzero(~good.to_numpy(zero_copy_only=False))
    if len(wrong):
        raise InputFormatError(
            f"{path}: rlnImageName must look like 000001@stack.mrcs, but {len(wrong)} of {len(names)} rows "
            f"do not, first row {wrong[0] + 1} ({names[int(wrong[0])]})"
        )
    parts = pc.split_pattern(names, "@", max_splits=1)
    index = pc.list_element(parts, 0).cast(pa.int64()).to_numpy(zero_copy_only=False) - 1
    if (index < 0).any():
        count = int((index < 0).sum())
        raise InputFormatError(f"{path}: images are counted from 1, but {count} rows have rlnImageName 0@...")
    stacks = pc.list_element(parts, 1).dictionary_encode()
    stack = stacks.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    ids, first = number_repeats(names.to_numpy(zero_copy_only=False).astype(object), stack, index)
    draft = Draft(
        path=path,
        kind="star",
        particle_id=ids,
        stack_paths=tuple(stacks.dictionary.to_pylist()),
        stack=stack,
        index=index,
    )
    draft.origins["particle_id"] = draft.origins["image_path"] = "rlnImageName"
    draft.counts = {"rows": len(ids), "repeated_images": int((first != np.arange(len(ids))).sum())}
    if draft.counts["repeated_images"]:
        _share_half_sets(draft, particles, first)
    return draft


def _share_half_sets(draft: Draft, particles: StarTable, first: NDArray[np.int64]) -> None:
    count = draft.counts["repeated_images"]
    draft.notes.append(
        f"{count} rows repeat an image (symmetry expansion?): their ids end in #2, #3 ..., and all rows of "
        "an image share a half set"
    )
    if "rlnRandomSubset" not in particles:
        return
    halves = particles.integers("rlnRandomSubset")
    draft.half_set = halves[first]
    moved = int((draft.half_set != halves).sum())
    if moved:
        draft.warnings.append(
            f"{moved} rows had another rlnRandomSubset than the first row of the same image and take its own"
        )


def _pixel_size(draft: Draft, rows: Rows, overrides: Mapping[str, float]) -> None:
    draft.lacking["pixel_size_a"] = "rlnImagePixelSize, or rlnDetectorPixelSize and rlnMagnification"
    for label in ("rlnImagePixelSize", "rlnPixelSize"):
        if label in rows:
            draft.put("pixel_size_a", rows.numbers(label), label)
            break
    else:
        if "rlnDetectorPixelSize" in rows and "rlnMagnification" in rows:
            magnification = rows.numbers("rlnMagnification")
            if (magnification <= 0).any():
                raise InputFormatError(f"{rows.path}: rlnMagnification must be positive in all rows")
            pixel_size = pixel_size_from_magnification(rows.numbers("rlnDetectorPixelSize"), magnification)
            draft.put("pixel_size_a", pixel_size, "rlnDetectorPixelSize/rlnMagnification")
    if "pixel_size_a" in overrides:
        draft.put("pixel_size_a", overrides["pixel_size_a"], "--set")


def _poses(draft: Draft, rows: Rows) -> None:
    present = [name for name in ANGLES if name in rows.particles]
    if not present:
        return
    if len(present) < len(ANGLES):
        missing = ", ".join(sorted(set(ANGLES) - set(present)))
        raise InputFormatError(
            f"{rows.path}: has {', '.join(present)} but not {missing}, so its poses are not those of a 3D "
            "refinement; give Refine3D's run_data.star"
        )
    angles = [rows.particles.numbers(name) for name in ANGLES]
    draft.rotation = rotation_from_relion(*angles)
    draft.origins["rotation"] = ", ".join(ANGLES)
    if len(draft) > 1 and not angles[0].any() and not angles[1].any():
        draft.warnings.append(
            "rlnAngleRot and rlnAngleTilt are 0 in all rows, as after a 2D classification: these may not be "
            "the poses of a 3D refinement"
        )
    for axis in ("x", "y"):
        name, label = f"shift_{axis}_a", f"rlnOrigin{axis.upper()}"
        draft.lacking[name] = f"{label}Angst or {label}"
        if f"{label}Angst" in rows.particles:
            draft.put(name, rows.particles.numbers(f"{label}Angst"), f"{label}Angst")
        elif label in rows.particles:
            pixels = rows.particles.numbers(label)[:, None]
            shift = shift_from_px(pixels, draft.pixel_size_a)[:, 0]
            draft.put(name, shift, f"{label} x pixel_size_a")


def _labels(draft: Draft, rows: Rows) -> None:
    if "rlnRandomSubset" in rows.particles:
        if draft.half_set is None:
            draft.half_set = rows.particles.integers("rlnRandomSubset")
        draft.origins["half_set"] = "rlnRandomSubset"
        if not np.isin(draft.half_set, (1, 2)).all():
            found = ", ".join(str(value) for value in np.unique(draft.half_set)[:5])
            draft.warnings.append(
                f"rlnRandomSubset holds {found}, not 1 and 2: half sets are not taken from it"
            )
            draft.half_set = None
            del draft.origins["half_set"]
    if "rlnClassNumber" in rows.particles:
        draft.class_number = rows.particles.integers("rlnClassNumber")
        draft.origins["class"] = "rlnClassNumber"
    if "rlnMicrographName" in rows.particles:
        encoded = rows.particles.text("rlnMicrographName").dictionary_encode()
        names = np.array(encoded.dictionary.to_pylist(), dtype=object)
        draft.micrograph = names[encoded.indices.to_numpy(zero_copy_only=False)]
        draft.origins["micrograph"] = "rlnMicrographName"


def _choose_class(draft: Draft, class_number: int) -> None:
    if draft.class_number is None:
        raise InputFormatError(f"{draft.path}: --class {class_number} needs the column rlnClassNumber")
    mask = draft.class_number == class_number
    if not mask.any():
        classes, counts = np.unique(draft.class_number, return_counts=True)
        known = ", ".join(f"{k} ({count})" for k, count in zip(classes, counts, strict=True))
        raise InputFormatError(f"{draft.path}: no particle of class {class_number}; there are: {known}")
    draft.keep(mask)
