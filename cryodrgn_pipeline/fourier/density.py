"""From Fourier coefficients to a density map, and what is done to a map: filter, mirror, crop, level."""

from __future__ import annotations

import torch
from torch import Tensor

from cryodrgn_pipeline.fourier.masks import radius_px, raised_cosine
from cryodrgn_pipeline.fourier.transforms import rfftn_radius

LOW_PASS_EDGE_SHELLS = 2.0  # half width of the cosine edge, in Fourier shells


def half_ball(box_size_px: int, radius: float | None = None) -> Tensor:
    """Lattice points with kx ≥ 0 and 0 < |k| ≤ `radius` (default D/2): `(P, 3)` int64, (kz, ky, kx)."""
    edge = box_size_px // 2
    radius = float(edge) if radius is None else float(radius)
    k = torch.arange(-edge, edge + 1)
    points = torch.cartesian_prod(k, k, k[edge:])
    squared = (points**2).sum(1)
    return points[(squared > 0) & (squared <= radius**2)]


def density_from_half_ball(coefficients: Tensor, points: Tensor, box_size_px: int) -> Tensor:
    """The real `(D, D, D)` density [z, y, x] with given centred coefficients, 0 elsewhere.

    Parameters
    ----------
    coefficients
        `(P,)` complex, unnormalised (F = Σ ρ exp(−2πi k·x/D)).
    points
        `(P, 3)` lattice points (kz, ky, kx) with kx ≥ 0; both halves of the plane kx = 0 are listed.
    """
    d = box_size_px
    sign = 1.0 - 2.0 * (points.sum(1) % 2)  # moves the origin from index 0 to D/2
    kz, ky, kx = points.unbind(1)
    spectrum = torch.zeros(d, d, d // 2 + 1, dtype=coefficients.dtype, device=coefficients.device)
    spectrum[kz % d, ky % d, kx] = coefficients * sign
    density: Tensor = torch.fft.irfftn(spectrum, s=(d, d, d))
    return density


def low_pass(density: Tensor, pixel_size_a: float, resolution_a: float) -> Tensor:
    """`(D, D, D)` density without detail finer than `resolution_a` (cosine edge of a few shells)."""
    d = density.shape[-1]
    start = pixel_size_a * d / resolution_a - LOW_PASS_EDGE_SHELLS
    kept = raised_cosine(rfftn_radius(d, device=density.device) - start, 2 * LOW_PASS_EDGE_SHELLS)
    filtered: Tensor = torch.fft.irfftn(torch.fft.rfftn(density) * kept, s=density.shape)
    return filtered


def mirror(density: Tensor) -> Tensor:
    """The other hand: z → −z about index D/2."""
    return torch.roll(density.flip(0), 1, 0)


def crop_real(density: Tensor, box_size_px: int) -> Tensor:
    """The central `box_size_px` cube in real space; the centre stays at index D/2."""
    start = density.shape[-1] // 2 - box_size_px // 2
    inner = slice(start, start + box_size_px)
    return density[inner, inner, inner]


def solvent_level(density: Tensor) -> float:
    """Mean density between 0.85 and 1.0 of the half box, where no particle should be."""
    d = density.shape[-1]
    radius = radius_px(d).to(density.device)
    return float(density[(radius >= 0.85 * d / 2) & (radius <= d / 2)].mean())
