"""Exact projections and volumes of Gaussian atoms, in Fourier space.

The transform of a Gaussian atom is a product of one factor per axis, so a slice is a small matrix product:
no grid is projected, and nothing but the numbers' own precision limits the truth. Everything at or beyond
Nyquist is cut off, which makes the images and the volumes band-limited by construction.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.fourier.ctf import ctf
from cryodrgn_pipeline.particles import Ctf, Optics

LARGEST_FACTOR = 2**24  # numbers held at once per axis of a batch: images x atoms x frequencies


def frequencies(box_size_px: int) -> tuple[Tensor, Tensor]:
    """Rows `(D,)` and columns `(D/2+1,)` of the real transform, in cycles per box, as rfft2 lays them out."""
    return torch.fft.fftfreq(box_size_px, 1 / box_size_px), torch.fft.rfftfreq(box_size_px, 1 / box_size_px)


def _axis_factor(position_px: Tensor, k: Tensor, box_size_px: int, sigma_px: Tensor) -> Tensor:
    """exp(−2πi k x/D) (−1)^k exp(−2π² σ² k²/D²): `(..., A)` and `(K,)` → `(..., A, K)` complex."""
    phase = (-2 * math.pi / box_size_px) * (position_px + box_size_px / 2)[..., None] * k
    envelope = torch.exp((-2 * math.pi**2 / box_size_px**2) * sigma_px[..., None, None] ** 2 * k**2)
    return torch.polar(envelope.expand_as(phase), phase)


def slices(
    position_a: Tensor, weight: Tensor, *, pixel_size_a: Tensor, sigma_a: float, box_size_px: int
) -> Tensor:
    """Transforms of the projections along z, band-limited: `(B, D, D/2+1)` complex, origin at D/2.

    Parameters
    ----------
    position_a, weight
        `(B, A, 3)` atoms in Å in the image's frame, from the box centre, and `(B, A)` their weights.
    pixel_size_a
        `(B,)` in Å.
    sigma_a
        Standard deviation of an atom in Å.
    """
    ky, kx = frequencies(box_size_px)
    at_px = position_a / pixel_size_a[:, None, None]
    sigma_px = sigma_a / pixel_size_a
    inside = ky[:, None] ** 2 + kx**2 < (box_size_px / 2) ** 2
    summed = []
    at_once = max(1, LARGEST_FACTOR // (weight.shape[1] * box_size_px))
    parts = (torch.split(each, at_once) for each in (at_px, sigma_px, weight))
    for at, sigma, mass in zip(*parts, strict=True):
        rows = _axis_factor(at[..., 1], ky, box_size_px, sigma)
        columns = _axis_factor(at[..., 0], kx, box_size_px, sigma) * mass[..., None]
        summed.append(torch.matmul(rows.transpose(1, 2), columns))
    return torch.cat(summed) * inside


def volume(
    position_a: NDArray[np.float64],
    weight: NDArray[np.float64],
    *,
    sigma_a: float,
    box_size_px: int,
    pixel_size_a: float,
) -> NDArray[np.float32]:
    """The density of atoms, band-limited: `(D, D, D)` float32, indexed [z, y, x].

    Parameters
    ----------
    position_a, weight
        `(A, 3)` in Å from the box centre, and `(A,)`.
    sigma_a
        Standard deviation of an atom in Å.
    """
    d = box_size_px
    at_px = torch.from_numpy(position_a / pixel_size_a).float()
    sigma_px = torch.tensor(sigma_a / pixel_size_a)
    k, kx = frequencies(d)
    z, y = (_axis_factor(at_px[:, axis], k, d, sigma_px) for axis in (2, 1))
    x = _axis_factor(at_px[:, 0], kx, d, sigma_px) * torch.from_numpy(weight).float()[:, None]
    spectrum = torch.empty(d, d, d // 2 + 1, dtype=torch.complex64)
    for plane in range(d):
        inside = k[plane] ** 2 + k[:, None] ** 2 + kx**2 < (d / 2) ** 2
        spectrum[plane] = ((y * z[:, plane, None]).T @ x) * inside
    return torch.fft.irfftn(spectrum, s=(d, d, d)).numpy()  # type: ignore[no-any-return]


def ctf_plane(optics: Optics, defocus: Ctf, *, b_factor_a2: float) -> Tensor:
    """CTF with its envelope exp(−B s²/4) as rfft2 lays it out: `(B, D, D/2+1)`."""
    d = int(optics.box_size_px[0])
    ky, kx = (axis.double() for axis in frequencies(d))
    per_a = 1 / (d * torch.from_numpy(optics.pixel_size_a))[:, None]
    y, x = (plane.reshape(1, -1) * per_a for plane in torch.meshgrid(ky, kx, indexing="ij"))
    columns = ("defocus_u_a", "defocus_v_a", "defocus_angle_deg", "phase_shift_deg")
    values = {name: torch.from_numpy(getattr(defocus, name)) for name in columns}
    values |= {
        name: torch.from_numpy(getattr(optics, name))
        for name in ("voltage_kv", "cs_mm", "amplitude_contrast")
    }
    transfer = ctf(y, x, **values) * torch.exp(-b_factor_a2 / 4 * (y**2 + x**2))
    return transfer.reshape(-1, d, d // 2 + 1).float()


def noise_filter(box_size_px: int, colour: float) -> Tensor:
    """Amplitude of the noise per frequency, `(D, D/2+1)`, of mean power 1.

    `colour` is how many times stronger the noise power is at the origin than at high frequency, less one:
    0 is white; a Gaussian of a quarter of Nyquist carries the excess, as solvent and support film do.
    """
    ky, kx = frequencies(box_size_px)
    squared = (ky[:, None] ** 2 + kx**2) / (box_size_px / 2) ** 2
    power = 1 + colour * torch.exp(-squared / (2 * 0.25**2))
    copies = torch.full((len(kx),), 2.0)  # rfft2 keeps one of each pair except on its two edge columns
    copies[0] = copies[-1] = 1.0
    return torch.sqrt(power / ((power * copies).sum() / box_size_px**2))
