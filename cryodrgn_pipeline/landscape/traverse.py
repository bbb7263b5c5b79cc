"""Paths through the latent: along a principal component, straight between points, or where the data lie.

Only the straight one may leave the region of particles; `LatentRegion.inside` tells where it does.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.landscape.checks import require_finite
from cryodrgn_pipeline.landscape.density import LatentRegion
from cryodrgn_pipeline.landscape.embed import PrincipalComponents

GRAPH_NEIGHBOURS = 10
GRAPH_AT_MOST = 50_000
SHORTEST = 1e-12  # a stored zero would be no edge
FEWEST_AROUND = 20
NO_SPREAD = 1e-6


def pc_traversal(
    components: PrincipalComponents,
    pc: int,
    region: LatentRegion,
    n: int = 10,
    percentiles: tuple[float, float] = (5.0, 95.0),
) -> NDArray[np.float32]:
    """A path along one principal component that stays where particles are.

    Points are evenly spaced along the component; the other coordinates are the mean of the particles with
    about that score. A point that this puts where no particles are (between two branches, in a gap) is moved
    to a particle of the denser half of these, near to it and to the point before. Points that fall
    together are kept once.

    Parameters
    ----------
    components
        Principal components of the latent.
    pc
        Number of the component, 1-based.
    region
        Where the latent's particles are.
    n
        Largest number of points.
    percentiles
        Where on the particles' distribution along the component the path starts and ends, in percent.

    Returns
    -------
    path
        `(≤ n, J)` float32 latent points, no unit.
    """
    if not 1 <= pc <= len(components.components):
        raise ValueError(f"component {pc} asked for, there are {len(components.components)}")
    axis = components.components[pc - 1]
    points = region.points[region.typical]
    scores = (points - components.mean) @ axis
    start, end = np.percentile(components.scores[:, pc - 1], percentiles)
    if end - start <= NO_SPREAD * np.ptp(components.scores):  # an idle coordinate: no path along it
        start = end = scores.mean()
        n = 1
    around = max(FEWEST_AROUND, len(points) // n)
    path: list[NDArray[np.float64]] = []
    for score in np.linspace(start, end, n):
        slab = points[np.argsort(np.abs(scores - score), kind="stable")[:around]]
        mean = slab.mean(axis=0)
        point = mean + (score - (mean - components.mean) @ axis) * axis
        if not region.inside(point[None])[0]:
            point = _dense_member(slab, point, path[-1] if path else point, region)
        path.append(point)
    found = np.asarray(path, dtype=np.float32)
    return found[np.r_[True, (found[1:] != found[:-1]).any(axis=1)]]


def _dense_member(
    slab: NDArray[np.float64],
    point: NDArray[np.float64],
    before: NDArray[np.float64],
    region: LatentRegion,
) -> NDArray[np.float64]:
    """The particle of the denser half of `slab` `(K, J)` nearest to `point` and `before` together."""
    distance = region.distance(slab)
    dense = slab[distance <= min(float(np.median(distance)), max(region.limit, float(distance.min())))]
    way = ((dense - point) ** 2).sum(axis=1) + ((dense - before) ** 2).sum(axis=1)
    return np.asarray(dense[way.argmin()])


def snap(
    path: NDArray[np.floating], z: NDArray[np.floating]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Move each point of a path to the particle nearest to it; points that fall together are kept once.

    Parameters
    ----------
    path, z
        `(M, J)` points and `(N, J)` particles in the latent, no unit.

    Returns
    -------
    snapped, rows
        `(≤ M, J)` float32 and the rows of `z` they are.
    """
    from scipy.spatial import cKDTree

    rows = np.asarray(cKDTree(z).query(path)[1], dtype=np.int64)
    rows = rows[np.r_[True, rows[1:] != rows[:-1]]]
    return np.asarray(z, dtype=np.float32)[rows], rows


def direct_traversal(anchors: NDArray[np.floating], n: int = 10) -> NDArray[np.float32]:
    """Straight lines through the anchors, `n` points evenly spaced by length; empty space is crossed.

    Parameters
    ----------
    anchors
        `(A, J)` latent points to pass through in order, A ≥ 2, no unit.
    n
        Number of points, ends included.

    Returns
    -------
    path
        `(n, J)` float32.
    """
    points = np.asarray(anchors, dtype=np.float64)
    if len(points) < 2:
        raise ValueError(f"a path needs two points, {len(points)} given")
    return np.asarray(_resample(points, n), dtype=np.float32)


def graph_traversal(
    z: NDArray[np.floating], rows: NDArray[np.integer], n: int = 10, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A path that stays among the particles: shortest in squared steps along the nearest-neighbour graph.

    Squared steps make many short hops cheaper than one long one, so that the path keeps to dense regions.
    Each returned point is a particle. Beyond 50,000 particles the graph is that of a random subset (the
    anchors stay in it).

    Parameters
    ----------
    z
        `(N, J)` latent coordinates, no unit.
    rows
        Rows of `z` to pass through in order, at least two.
    n
        Largest number of points returned, ends included.
    seed
        Seed of the subset.

    Returns
    -------
    path, path_rows
        `(≤ n, J)` float32 and the rows of `z` they are.
    """
    require_finite(z)
    if len(rows) < 2:
        raise ValueError(f"a path needs two particles, {len(rows)} given")
    kept = np.arange(len(z))
    if len(z) > GRAPH_AT_MOST:
        chosen = np.random.default_rng(seed).choice(len(z), size=GRAPH_AT_MOST, replace=False)
        kept = np.unique(np.r_[chosen, rows])
    points = np.asarray(z, dtype=np.float64)[kept]
    hops = kept[_shortest_hops(points, np.searchsorted(kept, rows))]
    travelled = np.asarray(z, dtype=np.float64)[hops]
    length = np.r_[0.0, np.cumsum(np.linalg.norm(np.diff(travelled, axis=0), axis=1))]
    nearest = np.abs(length[None, :] - np.linspace(0.0, length[-1], n)[:, None]).argmin(axis=1)
    path_rows = hops[nearest]
    path_rows = path_rows[np.r_[True, path_rows[1:] != path_rows[:-1]]]
    return np.asarray(z, dtype=np.float32)[path_rows], np.asarray(path_rows, dtype=np.int64)


def _shortest_hops(points: NDArray[np.float64], anchors: NDArray[np.integer]) -> NDArray[np.int64]:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components, dijkstra
    from scipy.spatial import cKDTree
    from sklearn.neighbors import kneighbors_graph

    graph = kneighbors_graph(points, min(GRAPH_NEIGHBOURS, len(points) - 1), mode="distance")
    graph.data = np.maximum(graph.data**2, SHORTEST)
    while True:
        part = connected_components(graph, directed=False)[1]
        here = part == part[anchors[0]]
        if here[anchors].all():
            break
        inside, outside = np.flatnonzero(here), np.flatnonzero(~here)
        distance, nearest = cKDTree(points[inside]).query(points[outside])
        shortest = distance.argmin()  # the bridge to the nearest part that is not connected
        ends = ([inside[nearest[shortest]]], [outside[shortest]])
        length = max(distance[shortest] ** 2, SHORTEST)
        graph = graph + coo_array(([length], ends), shape=graph.shape)
    hops = [int(anchors[0])]
    for start, end in pairwise(anchors):
        before = dijkstra(graph, directed=False, indices=start, return_predecessors=True)[1]
        leg = [int(end)]
        while leg[-1] != start:
            leg.append(int(before[leg[-1]]))
        hops.extend(reversed(leg[:-1]))
    return np.array(hops, dtype=np.int64)


def _resample(points: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    length = np.r_[0.0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
    at = np.linspace(0.0, length[-1], n)
    return np.stack([np.interp(at, length, points[:, j]) for j in range(points.shape[1])], axis=1)
