"""Gaussian blobs: densities and projections in closed form, for tests of everything that projects."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.spatial.transform import Rotation

CENTRES = np.array([[4.0, 1.0, -2.0], [-3.0, 2.5, 1.0], [0.5, -4.0, 3.0], [-1.0, -1.5, -4.5]])  # (x, y, z) px
WEIGHTS = np.array([1.0, 0.7, 1.3, 0.5])
SIGMA = 1.6


def rotations(count: int, seed: int = 0) -> torch.Tensor:
    """Random rotations `(count, 3, 3)` float32, object to image."""
    return torch.from_numpy(Rotation.random(count, rng=np.random.default_rng(seed)).as_matrix()).float()


def density(box: int, centres: np.ndarray = CENTRES) -> torch.Tensor:
    """The blobs on a grid, index order [z, y, x], centre at D/2: `(D, D, D)`."""
    x = np.arange(box) - box // 2
    z, y, x = np.meshgrid(x, x, x, indexing="ij")
    total = np.zeros((box,) * 3)
    for centre, weight in zip(centres, WEIGHTS, strict=True):
        squared = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
        total += weight * np.exp(-squared / (2 * SIGMA**2))
    return torch.from_numpy(total).float()


def projections(box: int, rotation: torch.Tensor, shift_px: np.ndarray | None = None) -> torch.Tensor:
    """Sums along z of the rotated blobs, moved by −shift: `(B, D, D)`, index order [y, x]."""
    x = np.arange(box) - box // 2
    y, x = np.meshgrid(x, x, indexing="ij")
    images = np.zeros((len(rotation), box, box))
    for i, matrix in enumerate(rotation.double().numpy()):
        for centre, weight in zip(CENTRES @ matrix.T, WEIGHTS, strict=True):
            moved = centre[:2] - (0 if shift_px is None else shift_px[i])
            squared = (x - moved[0]) ** 2 + (y - moved[1]) ** 2
            images[i] += weight * SIGMA * math.sqrt(2 * math.pi) * np.exp(-squared / (2 * SIGMA**2))
    return torch.from_numpy(images).float()
