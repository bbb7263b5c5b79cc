"""Circular weights on real-space images: the window of every image, and soft masks of a given radius."""

from __future__ import annotations

from torch import Tensor

from cryodrgn_pipeline.fourier.masks import radius_px, raised_cosine


def linear_window(box_size_px: int, inner: float, outer: float) -> Tensor:
    """Window that falls linearly from 1 at `inner` to 0 at `outer` (fractions of D/2): `(D, D)` float32."""
    if not 0 <= inner < outer:
        raise ValueError(f"a window falls from a smaller to a larger radius, got {inner} and {outer}")
    r = radius_px(box_size_px, ndim=2) / (box_size_px / 2)
    return ((outer - r) / (outer - inner)).clamp(0, 1)


def soft_disc(box_size_px: int, radius: float, edge: float) -> Tensor:
    """Disc that is 1 up to `radius` and falls as a raised cosine to 0 at `radius + edge` (px): `(D, D)`."""
    return raised_cosine(radius_px(box_size_px, ndim=2) - radius, edge)
