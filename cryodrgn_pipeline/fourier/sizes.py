"""How many numbers images and grids hold, by formula: for planning, without importing torch."""

from __future__ import annotations

import math

PADDING = 2  # a volume is transformed in a box so many times as wide


def half_grid_points(size: int) -> int:
    """Points of the half spectrum of a `size`³ box."""
    return size * size * (size // 2 + 1)


def ball_points(box_size_px: int) -> int:
    """V of a `Ball`, to within a few parts in a thousand."""
    size = PADDING * box_size_px
    return round(2 / 3 * math.pi * (size / 2 + math.sqrt(3)) ** 3 + math.pi / 2 * (size / 2) ** 2)


def half_plane_points(box_size_px: int) -> int:
    """P, Fourier coefficients of an image within |k| < D/2, half of them by symmetry; to within a few."""
    return math.ceil(math.pi / 8 * box_size_px**2)
