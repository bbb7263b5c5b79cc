"""Paths through the latent: along a principal component, straight between points, or where the data lie."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.landscape.checks import require_finite
from cryodrgn_pipeline.landscape.embed import PrincipalComponents

GRAPH_NEIGHBOURS = 10
GRAPH_AT_MOST = 50_000
SHORTEST = 1e-12  # a stored zero would be no edge


def pc_traversal(
    components: PrincipalComponents, pc: int, n: int = 10, percentiles: tuple[float, float] = (5.0, 95.0)
) -> NDArray[np.float32]:
    """Points evenly spaced along one principal component, the other components at their mean.

    Parameters
    ----------
    components
        Principal components of the latent.
    pc
        Number of the component, 1-based.
    n
        Number of points.
    percentiles
        Where on the particles' distribution along the component the path starts and ends, in percent.

    Returns
    -------
    path
        `(n, J)` float32 latent points, no unit.
    """
    if not 1 <= pc <= len(components.components):
        raise ValueError(f"component {pc} asked for, there are {len(components.components)}")
    start, end = np.percentile(components.scores[:, pc - 1], percentiles)
    steps = np.linspace(start, end, n)[:, None]
    return np.asarray(components.mean + steps * components.components[pc - 1], dtype=np.float32)


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
    """Straight lines through the anchors, `n` points evenly spaced by length; empty regions are crossed.

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
