"""The images of a stack as a reconstruction needs them: Fourier coefficients, CTFs, directions, noise."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.fourier.ctf import ctf
from cryodrgn_pipeline.fourier.transforms import HalfPlane, half_plane_coefficients

if TYPE_CHECKING:
    from cryodrgn_pipeline.particles import ParticleSet
    from cryodrgn_pipeline.stack import Stack

CHUNK_BYTES = 32 * 2**20
SMALLEST_NOISE = 1e-3  # of the median over the shells


@dataclass(frozen=True, slots=True, kw_only=True)
class FourierImages:
    """B images as a reconstruction needs them: half-plane coefficients, CTFs and directions.

    `coefficients` `(B, P)` complex64; `ctf` `(B, P)` float32, what the density's slice is multiplied by (the
    CTF times the square of volume over image pixel size); `rotation` `(B, 3, 3)` float32, object to image;
    `scale` `(B,)` float32, volume over image pixel size; `noise_group` `(B,)` int64.
    """

    plane: HalfPlane
    coefficients: Tensor
    ctf: Tensor
    rotation: Tensor
    scale: Tensor
    noise_group: Tensor

    def __len__(self) -> int:
        return len(self.coefficients)

    def part(self, rows: slice) -> FourierImages:
        """Some of these images."""
        names = ("coefficients", "ctf", "rotation", "scale", "noise_group")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def noise_weights(noise: dict[int, NDArray[np.float64]], plane: HalfPlane) -> tuple[Tensor, dict[int, int]]:
    """One over the noise power of each optics group at the half plane.

    Parameters
    ----------
    noise
        Optics group → `(D/2+1,)` noise power of unnormalised Fourier coefficients per shell.

    Returns
    -------
    `(G, P)` float32, scaled to mean 1, and the row of each optics group.

    Raises
    ------
    InputFormatError
        If the power of a group is not positive at most shells.
    """
    radius = plane.radius.numpy()
    rows = {group: row for row, group in enumerate(sorted(noise))}
    table = np.empty((len(rows), len(plane)))
    for group, row in rows.items():
        power = noise[group]
        # images that were low-passed hold next to nothing at high shells: no weight without bound for those
        power = np.maximum(power, SMALLEST_NOISE * np.median(power))
        if not (np.isfinite(power).all() and power.min() > 0):
            raise InputFormatError(
                f"the noise power of optics group {group} in the stack's noise.parquet must be positive: its "
                "images are blank, or the file is damaged; leave the group out or make the stack again"
            )
        table[row] = np.interp(radius, np.arange(len(power)), power)
    weight = 1 / table
    return torch.from_numpy(weight / weight.mean()).float(), rows


def image_ctf(particles: ParticleSet, rows: NDArray[Any], plane: HalfPlane, pixel_size_a: float) -> Tensor:
    """What a slice of the density is multiplied by to give each image: CTF times (p / p_image)², `(B, P)`."""
    optics, defocus = particles.optics, particles.ctf

    def column(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.asarray(values[rows], dtype=np.float32)).to(plane.kx.device)

    spacing = 1 / (column(optics.pixel_size_a) * plane.box_size_px)
    if len(torch.unique(spacing)) == 1:
        ky, kx = plane.ky * spacing[0], plane.kx * spacing[0]
    else:
        ky, kx = plane.ky * spacing[:, None], plane.kx * spacing[:, None]
    values = ctf(
        ky,
        kx,
        defocus_u_a=column(defocus.defocus_u_a),
        defocus_v_a=column(defocus.defocus_v_a),
        defocus_angle_deg=column(defocus.defocus_angle_deg),
        voltage_kv=column(optics.voltage_kv),
        cs_mm=column(optics.cs_mm),
        amplitude_contrast=column(optics.amplitude_contrast),
        phase_shift_deg=column(defocus.phase_shift_deg),
    )
    scale = pixel_size_a / column(optics.pixel_size_a)
    return values if bool((scale == 1).all()) else values * scale[:, None] ** 2


def stream(
    stack: Stack, rows: NDArray[np.int64], plane: HalfPlane, groups: dict[int, int], *, first: int = 0
) -> Iterator[tuple[slice, FourierImages]]:
    """Images of the given rows (sorted reads fastest) in chunks: their place in `rows`, and their data.

    They are transformed, and lie, on the device of `plane`. `first`: where to start, the end of a chunk.
    """
    device = plane.kx.device
    particles, p = stack.particles, stack.pixel_size_a
    poses = particles.require_poses("reconstruction")
    found, place = np.unique(particles.optics.optics_group[rows], return_inverse=True)
    group_row = np.array([groups[int(group)] for group in found], dtype=np.int64)[place]
    chunk = max(1, CHUNK_BYTES // (4 * stack.box_size_px**2))
    starts = range(first, len(rows), chunk)
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(stack.read, rows[first : first + chunk])
        for start in starts:
            images = torch.from_numpy(coming.result()).to(device)
            part = slice(start, min(start + chunk, len(rows)))
            coming = reader.submit(stack.read, rows[part.stop : part.stop + chunk])
            here = rows[part]
            scale = p / particles.optics.pixel_size_a[here]
            yield (
                part,
                FourierImages(
                    plane=plane,
                    coefficients=half_plane_coefficients(images, plane),
                    ctf=image_ctf(particles, here, plane, p),
                    rotation=torch.from_numpy(poses.rotation[here].astype(np.float32)).to(device),
                    scale=torch.from_numpy(scale.astype(np.float32)).to(device),
                    noise_group=torch.from_numpy(group_row[part]).to(device),
                ),
            )
