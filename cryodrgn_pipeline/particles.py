"""The particle set: one frozen, validated table of images, poses and CTFs in canonical form, joined by id.

Canonical form (see docs/conventions.md): rotation R maps object to image coordinates; moving the image
content by +shift centres the particle; CTF in RELION's sign; lengths in Å, angles in degrees.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError

Part = TypeVar("Part", "Optics", "Ctf", "Poses")

UNKNOWN_BOX = 0
"""`Optics.box_size_px` where neither the table nor an image file tells it; null in particles.parquet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """Where each of N images lies: `stack_paths[stack[i]]`, image number `index[i]` (0-based)."""

    stack_paths: tuple[str, ...]
    stack: NDArray[np.int64]
    index: NDArray[np.int64]

    def take(self, rows: NDArray[Any]) -> ImageRef:
        """The given rows (indices or a mask); stacks no longer used stay listed."""
        return replace(self, stack=self.stack[rows], index=self.index[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Optics:
    """What the microscope and the extraction fixed: all `(N,)`."""

    optics_group: NDArray[np.int64]
    pixel_size_a: NDArray[np.float64]
    box_size_px: NDArray[np.int64]
    voltage_kv: NDArray[np.float64]
    cs_mm: NDArray[np.float64]
    amplitude_contrast: NDArray[np.float64]

    def take(self, rows: NDArray[Any]) -> Optics:
        """The given rows (indices or a mask)."""
        return _take(self, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ctf:
    """Per-particle defocus and phase: all `(N,)`; positive defocus is underfocus."""

    defocus_u_a: NDArray[np.float64]
    defocus_v_a: NDArray[np.float64]
    defocus_angle_deg: NDArray[np.float64]
    phase_shift_deg: NDArray[np.float64]

    def take(self, rows: NDArray[Any]) -> Ctf:
        """The given rows (indices or a mask)."""
        return _take(self, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Poses:
    """Rotation `(N, 3, 3)`, object to image, and shift `(N, 2)` in Å as (x, y)."""

    rotation: NDArray[np.float64]
    shift_a: NDArray[np.float64]

    def take(self, rows: NDArray[Any]) -> Poses:
        """The given rows (indices or a mask)."""
        return _take(self, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticleSet:
    """N particles in source order. `particle_id` is uint64 (cryoSPARC uid) or str; it never repeats."""

    particle_id: NDArray[Any]
    images: ImageRef
    optics: Optics
    ctf: Ctf
    poses: Poses | None
    contrast_sign: NDArray[np.float64]
    half_set: NDArray[np.int64] | None = None
    micrograph: NDArray[np.object_] | None = None
    class_number: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.particle_id)

    def __post_init__(self) -> None:
        n = len(self.particle_id)
        columns: dict[str, NDArray[Any]] = {
            "stack": self.images.stack,
            "index": self.images.index,
            "contrast_sign": self.contrast_sign,
        }
        optional = {"half_set": self.half_set, "micrograph": self.micrograph, "class": self.class_number}
        columns |= {name: column for name, column in optional.items() if column is not None}
        for part in (self.optics, self.ctf):
            columns |= {field.name: getattr(part, field.name) for field in fields(part)}
        for name, column in columns.items():
            if column.shape != (n,):
                raise ValueError(f"{name} of shape {column.shape} beside {n} particle ids")
        if self.poses is not None and self.poses.rotation.shape != (n, 3, 3):
            raise ValueError(f"rotations of shape {self.poses.rotation.shape} for {n} particles")
        if self.poses is not None and self.poses.shift_a.shape != (n, 2):
            raise ValueError(f"shifts of shape {self.poses.shift_a.shape} for {n} particles")

    def require_poses(self, verb: str) -> Poses:
        """The poses, or an `InputFormatError` that says what `verb` needs and how to get it."""
        if self.poses is None:
            raise InputFormatError(
                f"no poses: {verb} needs a rotation and a shift per particle, but the {len(self)} imported "
                "particles have none. Import the particles of a 3D refinement (RELION Refine3D "
                "run_data.star, or cryoSPARC homogeneous/non-uniform refinement particles .cs; if the poses "
                "lie in the passthrough file, add --passthrough)."
            )
        return self.poses

    def take(self, rows: NDArray[Any]) -> ParticleSet:
        """The particles of the given rows (indices or a boolean mask), in that order."""
        return replace(
            self,
            particle_id=self.particle_id[rows],
            images=self.images.take(rows),
            optics=self.optics.take(rows),
            ctf=self.ctf.take(rows),
            poses=None if self.poses is None else self.poses.take(rows),
            contrast_sign=self.contrast_sign[rows],
            half_set=None if self.half_set is None else self.half_set[rows],
            micrograph=None if self.micrograph is None else self.micrograph[rows],
            class_number=None if self.class_number is None else self.class_number[rows],
        )


def _take(part: Part, rows: NDArray[Any]) -> Part:
    return replace(part, **{field.name: getattr(part, field.name)[rows] for field in fields(part)})
