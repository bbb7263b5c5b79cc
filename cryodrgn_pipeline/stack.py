"""The stack on disk: one folder of prepared images, their particle table and their noise, read lazily.

`images.mrcs` (real space, centred, light on dark, cropped, windowed), `particles.parquet` (rows in the order
of the images), `noise.parquet` and `stack.json`. Made by `preprocess`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.ids import read_id_rows
from cryodrgn_pipeline.io.mrc import MrcImages
from cryodrgn_pipeline.io.noise_table import HALF_NOISE
from cryodrgn_pipeline.io.runs import read_json
from cryodrgn_pipeline.io.tables import read_extra, read_particles
from cryodrgn_pipeline.particles import ParticleSet

IMAGES, PARTICLES, NOISE, INFO = "images.mrcs", "particles.parquet", "noise.parquet", "stack.json"
APPLIED_SHIFT_COLUMNS = ("applied_shift_x_a", "applied_shift_y_a")
NOT_CONTENT = ("wall_time_s", "version")  # keys of stack.json that two equal stacks may differ in


@dataclass(frozen=True, kw_only=True)
class Stack:
    """N prepared images of D × D px with their particles; `len(stack)` is N.

    `info` is stack.json; `particles` has zero shifts and contrast sign +1, because both are applied;
    `noise_column` says whose noise `noise` is.
    """

    path: Path
    info: dict[str, Any]
    particles: ParticleSet
    images: MrcImages
    noise_column: str = "noise_power"

    @classmethod
    def open(cls, path: str | Path) -> Stack:
        """Open the stack in folder `path` for reading.

        Raises
        ------
        InputFormatError
            If the folder is no stack, or its files do not fit each other or have changed size.
        """
        path = Path(path)
        info = read_stack_info(path)
        particles = read_particles(path / PARTICLES)
        images = MrcImages(path / IMAGES)
        header, n, d = images.header, info["n_particles"], info["box_size_px"]
        found = (len(particles), header.n_images, header.ny, header.nx, header.dtype.name)
        if found != (n, n, d, d, info["dtype"]):
            raise InputFormatError(
                f"{path}: its files do not belong together: {INFO} says {n} images of {d} x {d} px "
                f"({info['dtype']}), {IMAGES} has {found[1]} of {found[2]} x {found[3]} px ({found[4]}), "
                f"{PARTICLES} has {found[0]} rows; make the stack again with `cryodrgn-pipeline preprocess`"
            )
        return cls(path=path, info=info, particles=particles, images=images)

    def __len__(self) -> int:
        return len(self.particles)

    @property
    def box_size_px(self) -> int:
        """Side D of the images in pixels."""
        return int(self.info["box_size_px"])

    @property
    def pixel_size_a(self) -> float:
        """Å per pixel of the stack: that of most particles; each row's own is in `particles.optics`."""
        return float(self.info["pixel_size_a"])

    @cached_property
    def applied_shift_a(self) -> NDArray[np.float64]:
        """The shifts that preprocess applied, `(N, 2)` as (x, y) in Å."""
        columns = read_extra(self.path / PARTICLES, APPLIED_SHIFT_COLUMNS)
        return np.stack([columns[name] for name in APPLIED_SHIFT_COLUMNS], axis=1)

    @cached_property
    def noise(self) -> dict[int, NDArray[np.float64]]:
        """Noise power |F|² per shell 0 … D/2, `(D/2+1,)`, by optics group, as far as it has such images."""
        spectra = self._spectra(self.noise_column)
        return {group: power for group, power in spectra.items() if not np.isnan(power).all()}

    @cached_property
    def total_power(self) -> dict[int, NDArray[np.float64]]:
        """Power |F|² of the whole images per shell 0 … D/2, `(D/2+1,)`, by optics group."""
        return self._spectra("total_power")

    def with_half_noise(self, half: int) -> Stack:
        """The same stack, its noise that of the images of one half set (0 or 1) alone.

        Raises
        ------
        InputFormatError
            If the stack was made before half sets had noise of their own.
        """
        import pyarrow.parquet as pq

        name = HALF_NOISE[half]
        if name not in pq.read_schema(self.path / NOISE).names:
            raise InputFormatError(
                f"{self.path / NOISE}: lacks {name}, the noise of one half set alone; make the stack again "
                "with `cryodrgn-pipeline preprocess`"
            )
        return replace(self, noise_column=name)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what the stack is: its description (but for run times) and its particle table."""
        content = {key: value for key, value in self.info.items() if key not in NOT_CONTENT}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        with (self.path / PARTICLES).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def read(self, rows: NDArray[np.integer[Any]] | slice) -> NDArray[np.float32]:
        """The images of the given rows, in that order: `(n, D, D)` float32. Sorted rows read fastest."""
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        return self.images.read(rows)

    def _spectra(self, column: str) -> dict[int, NDArray[np.float64]]:
        table = read_extra(self.path / NOISE, ("optics_group", "shell", column))
        groups, shells = table["optics_group"], table["shell"]
        spectra = {}
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            spectra[int(group)] = table[column][rows[np.argsort(shells[rows])]].astype(np.float64)
        return spectra


def stack_rows(path: Path, subset: Path | None) -> tuple[Stack, NDArray[np.int64]]:
    """A stack with poses and the rows of it that an id file names (None: all), ascending.

    Raises
    ------
    InputFormatError
        If there are no poses, or the file has ids that are not in the stack.
    """
    stack = Stack.open(path)
    stack.particles.require_poses("train")
    if subset is None:
        return stack, np.arange(len(stack))
    return stack, read_id_rows(subset, stack.particles.particle_id, f"the stack {path}")


def read_stack_info(path: Path) -> dict[str, Any]:
    """The stack.json of a stack: what can be known of it without its table.

    Raises
    ------
    InputFormatError
        If the folder is no stack.
    """
    info = read_json(path / INFO, "a stack is made with `cryodrgn-pipeline preprocess`")
    missing = [key for key in ("n_particles", "box_size_px", "pixel_size_a", "dtype") if key not in info]
    if missing:
        raise InputFormatError(f"{path / INFO}: lacks {', '.join(missing)}; make the stack again")
    return info
