"""Images turned in their plane, in Fourier space."""

from __future__ import annotations

import torch
from torch import Tensor

from cryodrgn_pipeline.fourier.transforms import HalfPlane, centred_fft, symmetrise

PADDING = 2  # zeros around the image make its spectrum smooth enough for linear interpolation


def in_plane_angle(rotation: Tensor) -> Tensor:
    """The angle `(B,)`, radians, of the last turn of `(B, 3, 3)` rotations: R = Rz(angle) · Ry · Rz."""
    return torch.atan2(rotation[:, 1, 2], rotation[:, 0, 2])


def turned_half_plane(plane: HalfPlane, angle: Tensor) -> Tensor:
    """Where the points lie in images that are to be turned back by `angle`: `(B, P, 2)`, (kx, ky)."""
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    kx, ky = plane.kx.to(angle), plane.ky.to(angle)
    return torch.stack([cos * kx - sin * ky, sin * kx + cos * ky], dim=-1)


def coefficients_at(images: Tensor, k: Tensor) -> Tensor:
    """Centred Fourier coefficients of images between the lattice points, by linear interpolation.

    Parameters
    ----------
    images
        `(B, D, D)` real.
    k
        `(B, P, 2)` frequencies (kx, ky) in cycles per box, |k| ≤ D/2 on each axis.

    Returns
    -------
    `(B, P)` complex.
    """
    edge = images.shape[-1] // 2
    padded = torch.nn.functional.pad(images, ((PADDING - 1) * edge,) * 4)
    spectrum = torch.view_as_real(symmetrise(centred_fft(padded))).permute(0, 3, 1, 2)
    sampled = torch.nn.functional.grid_sample(spectrum, k[:, None] / edge, align_corners=True)
    return torch.complex(sampled[:, 0, 0], sampled[:, 1, 0])
