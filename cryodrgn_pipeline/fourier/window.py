"""Circular weights on real-space images: the window of every image, and soft masks of a given radius."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def radius_px(box_size_px: int) -> Tensor:
    """Distance of every pixel from the box centre at index D/2, in pixels: `(D, D)` float32."""
    axis = torch.arange(box_size_px, dtype=torch.float32) - box_size_px // 2
    return torch.hypot(axis[:, None], axis[None, :])


def linear_window(box_size_px: int, inner: float, outer: float) -> Tensor:
    """Window that falls linearly from 1 at `inner` to 0 at `outer` (fractions of D/2): `(D, D)` float32."""
    if not 0 <= inner < outer:
        raise ValueError(f"a window falls from a smaller to a larger radius, got {inner} and {outer}")
    r = radius_px(box_size_px) / (box_size_px / 2)
    return ((outer - r) / (outer - inner)).clamp(0, 1)


def soft_disc(box_size_px: int, radius: float, edge: float) -> Tensor:
    """Disc that is 1 up to `radius` and falls as a raised cosine to 0 at `radius + edge` (px): `(D, D)`."""
    fall = ((radius_px(box_size_px) - radius) / edge).clamp(0, 1)
    return 0.5 + 0.5 * torch.cos(math.pi * fall)
