"""Where in the latent the particles are: a density from nearest neighbours, and the region it bounds.

A decoder draws a map at any z. A point belongs to the region of particles when its k-th nearest particle is
no farther than it is from 99 of 100 particles themselves (support as in Devroye & Wise 1980).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.landscape.checks import require_finite
from cryodrgn_pipeline.landscape.outliers import extreme_rows

NEIGHBOURS = 10
FIT_AT_MOST = 50_000
MEASURED_AT_MOST = 10_000
INSIDE_PERCENTILE = 99.0
DENSEST = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentRegion:
    """The region of particles of one latent.

    `points` (M, J) float64: the particles it is fitted to; `typical` (M,) bool: those that are not extreme;
    `tree` their KD-tree; `neighbours` k; `median` and `limit`: median and 99th percentile of the k-NN
    distances of typical particles, in units of z; `dimensions`: coordinates of z that vary.
    """

    points: NDArray[np.float64]
    typical: NDArray[np.bool_]
    tree: Any
    neighbours: int
    median: float
    limit: float
    dimensions: int

    def distance(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Distance of each point `(P, J)` to its k-th nearest particle, in units of z: `(P,)`."""
        found = self.tree.query(np.asarray(points, dtype=np.float64), k=[self.neighbours])[0]
        return np.asarray(found[:, 0], dtype=np.float64)

    def inside(self, points: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Whether each point `(P, J)` lies where particles are: `(P,)`."""
        return np.asarray(self.distance(points) <= self.limit * (1 + 1e-6))

    def density(self, points: NDArray[np.floating]) -> NDArray[np.float32]:
        """Particles per volume of z at each point `(P, J)`, in units of that at the median particle: `(P,)`.

        It is (median / distance)^dimensions, at most 10⁶: where particles coincide it has no bound.
        """
        distance = self.distance(points)
        ratio = np.full(len(distance), np.inf)
        np.divide(self.median, distance, out=ratio, where=distance > 0)
        return np.asarray(np.minimum(ratio**self.dimensions, DENSEST), dtype=np.float32)


def latent_region(z: NDArray[np.floating], seed: int = 0) -> LatentRegion:
    """Find the region in which particles lie.

    50,000 particles at random stand for all. Particles whose |z| is extreme count as neighbours, so that a
    far but well filled state is inside; towards the limit they do not count.

    Parameters
    ----------
    z
        `(N, J)` latent coordinates of the particles that count (`well_fitted_rows`), no unit.
    seed
        Seed of the random parts.

    Raises
    ------
    ValueError
        If `z` is empty or not finite.
    """
    from scipy.spatial import cKDTree

    require_finite(z)
    rng = np.random.default_rng(seed)
    points, typical = np.asarray(z), ~extreme_rows(z)
    if len(points) > FIT_AT_MOST:
        kept = np.sort(rng.choice(len(points), size=FIT_AT_MOST, replace=False))
        points, typical = points[kept], typical[kept]
    points = points.astype(np.float64)
    tree = cKDTree(points)
    neighbours = max(1, min(NEIGHBOURS, len(points) - 1))
    measured = points[typical]
    if len(measured) > MEASURED_AT_MOST:
        measured = measured[rng.choice(len(measured), size=MEASURED_AT_MOST, replace=False)]
    with_itself = min(neighbours + 1, len(points))
    own = tree.query(measured, k=[with_itself])[0][:, 0]
    return LatentRegion(
        points=points,
        typical=typical,
        tree=tree,
        neighbours=neighbours,
        median=float(np.median(own)),
        limit=float(np.percentile(own, INSIDE_PERCENTILE)),
        dimensions=int((np.ptp(points, axis=0) > 0).sum()),
    )


def inside_region(
    z: NDArray[np.floating], points: NDArray[np.floating]
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which points of the latent lie where particles are, and how dense the particles are there.

    Parameters
    ----------
    z
        `(N, J)` latent coordinates of the particles that count (`well_fitted_rows`), no unit.
    points
        `(P, J)` points to judge.

    Returns
    -------
    inside, latent_density
        `(P,)` bool, and `(P,)` float32 in units of the density at the median particle.
    """
    region = latent_region(z)
    return region.inside(points), region.density(points)
