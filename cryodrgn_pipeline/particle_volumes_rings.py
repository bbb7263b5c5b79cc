"""Which particles speak for a latent point, and how much: rings by distance, and kernels over them.

Particles are ranked by their distance from each target in the metric of their own posterior and dealt to
rings; within a ring all count alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

SHARES = (1 / 50, 1 / 15, 1 / 4, 1.0)  # of the particles, in kernels from the narrowest to the widest
SMALLEST_RING = 50
METRIC_RIDGE = 0.01  # of the latent's covariance, added to each posterior: no particle is known exactly


@dataclass(frozen=True, slots=True, kw_only=True)
class Rings:
    """N particles around T targets, in R rings by distance.

    `ring` `(N, T)` int64, −1 for none; `size` `(T, R)` particles; `squared` `(T, R)` their mean squared
    distance; `edge` `(T, R)` distance of the outermost one: the kernel widths that there are.
    """

    ring: NDArray[np.int64]
    size: Array
    squared: Array
    edge: Array

    @property
    def widths(self) -> int:
        """R, the number of rings and of kernel widths."""
        return int(self.edge.shape[1])

    @property
    def counted(self) -> NDArray[np.int64]:
        """The particles that stand in the rings."""
        return np.flatnonzero(self.ring[:, 0] >= 0)

    def of(self, targets: slice) -> Rings:
        """Those around some of the targets."""
        return Rings(
            ring=self.ring[:, targets],
            size=self.size[targets],
            squared=self.squared[targets],
            edge=self.edge[targets],
        )

    def weights(self, target: int) -> Tensor:
        """`(R, R)` float64: the Epanechnikov kernel of each width (row) at each ring, 1 at the innermost."""
        edge = np.maximum(self.edge[target], 1e-30)[:, None]
        kernel = np.clip(1 - self.squared[target][None] / edge**2, 1e-3, None)
        kernel = np.tril(kernel / kernel[:, :1])
        return torch.from_numpy(kernel)

    def n_effective(self, target: int) -> Array:
        """`(R,)` (Σ w)² / Σ w² of the kernel of each width."""
        weights = self.weights(target).numpy()
        counted = weights * self.size[target]
        effective: Array = counted.sum(1) ** 2 / (counted * weights).sum(1)
        return effective


def squared_distances(z: Array, covariance: Array, targets: Array) -> Array:
    """(zᵢ − z₀)ᵀ (Cᵢ + 0.01 Cov(z))⁻¹ (zᵢ − z₀) of N particles from T targets: `(N, T)`.

    Parameters
    ----------
    z, covariance
        `(N, J)` and `(N, J, J)` posterior means and covariances. Coordinates that are the same in all
        particles say nothing and are left out.
    targets
        `(T, J)`.
    """
    varies = z.var(axis=0) > 1e-12
    if not varies.any():
        return np.zeros((len(z), len(targets)))
    z, targets = z[:, varies], targets[:, varies]
    metric = covariance[:, varies][:, :, varies] + METRIC_RIDGE * np.atleast_2d(np.cov(z.T))
    precision = np.linalg.inv(metric)
    away = [z - target for target in targets]
    return np.stack([np.einsum("nj,njk,nk->n", d, precision, d) for d in away], axis=1)


def rings_of(squared: Array, shares: tuple[float, ...] = SHARES) -> Rings:
    """Deal particles at squared distances `(N, T)` from the targets to rings that hold these shares of them.

    Particles at an infinite distance belong to none. Rings of fewer than 50 particles are not made.
    """
    ring = np.full(squared.shape, -1, dtype=np.int64)
    counts = np.isfinite(squared).sum(axis=0)
    ends = {max(round(share * int(counts.min())), min(SMALLEST_RING, int(counts.min()))) for share in shares}
    edges, means, sizes = [], [], []
    for target, column in enumerate(squared.T):
        order = np.argsort(column, kind="stable")[: counts[target]]
        stops = [*sorted(ends)[:-1], len(order)]
        parts = [order[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
        for number, part in enumerate(parts):
            ring[part, target] = number
        sizes.append([len(part) for part in parts])
        means.append([column[part].mean() for part in parts])
        edges.append([np.sqrt(column[part[-1]]) for part in parts])
    return Rings(ring=ring, size=np.array(sizes, float), squared=np.array(means), edge=np.array(edges))
