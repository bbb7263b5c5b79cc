"""Soft masks: a ball, and the particle's own envelope found in its map."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.fourier.transforms import rfftn_radius


def radius_px(box_size_px: int, ndim: int = 3) -> Tensor:
    """Distance of each voxel from the centre at index D/2, in px: `(D,) * ndim`."""
    axis = (torch.arange(box_size_px) - box_size_px // 2).float() ** 2
    squared = axis
    for _ in range(ndim - 1):
        squared = squared[..., None] + axis
    return torch.sqrt(squared)


def raised_cosine(distance_px: Tensor, width_px: float) -> Tensor:
    """1 at distance ≤ 0, 0 beyond `width_px`, half a cosine between."""
    return 0.5 * (1 + torch.cos(torch.pi * (distance_px / width_px).clamp(0, 1)))


def soft_ball(box_size_px: int, radius: float, edge_px: float = 3.0) -> Tensor:
    """A ball of `radius` px with a raised-cosine edge that ends at `radius` + `edge_px`: `(D, D, D)`."""
    return raised_cosine(radius_px(box_size_px) - radius, edge_px)


def lowpass(volume: Tensor, shell: float) -> Tensor:
    """The map with frequencies damped by a Gaussian that is ½ at `shell` cycles per box: `(D, D, D)`."""
    damping = 0.5 ** (rfftn_radius(volume.shape[0]) / shell) ** 2
    smooth: Tensor = torch.fft.irfftn(torch.fft.rfftn(volume) * damping.to(volume), s=volume.shape)
    return smooth


def particle_mask(
    volume: Tensor,
    *,
    noise: Tensor | None = None,
    resolution_shell: float | None = None,
    threshold: float = 0.08,
    dilation: float = 0.05,
    edge: float = 0.06,
) -> Tensor:
    """A soft mask around the particle: low-pass, threshold, grow, soften.

    Parameters
    ----------
    volume
        `(D, D, D)` map with positive density.
    noise
        `(D, D, D)` map of noise alone (half the difference of the half maps): the threshold stays above
        three of its standard deviations after the same low-pass.
    resolution_shell
        Low-pass in cycles per box; default D/8, at most what is given.
    threshold
        Fraction of the low-passed map's maximum that counts as particle.
    dilation, edge
        Growth and width of the soft edge, as fractions of D (both at least 1.5 px).

    Returns
    -------
    `(D, D, D)` float32 between 0 and 1, zero outside the ball of radius D/2. Specks smaller than a tenth of
    the largest piece are dropped. When no voxel stands out, the ball itself.
    """
    from scipy import ndimage

    d = volume.shape[0]
    shell = min(d / 8, resolution_shell) if resolution_shell else d / 8
    width = max(1.5, edge * d)
    inside = radius_px(d) <= d / 2 - 1
    smooth = lowpass(volume, shell) * inside
    level = threshold * float(smooth.max())
    if noise is not None:
        level = max(level, 3 * float(lowpass(noise, shell)[inside].std()))
    ball = soft_ball(d, d / 2 - 1 - width, width)
    if not float(smooth.max()) > level:
        return ball
    core = _without_specks((smooth > level).numpy())
    distance = torch.from_numpy(ndimage.distance_transform_edt(~core)).float()
    return raised_cosine(distance - max(1.5, dilation * d), width) * (ball > 0)


def _without_specks(core: NDArray[np.bool_]) -> NDArray[np.bool_]:
    from scipy import ndimage

    labels, _ = ndimage.label(core)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    keep: NDArray[np.bool_] = (sizes >= sizes.max() / 10)[labels]
    return keep
