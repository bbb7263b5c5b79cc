"""Clusters of the latent, with centres that are real particles and labels in a stable order.

Where particles fall into distinct groups, those are the clusters; a continuum is cut into even parts.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.landscape.checks import require_finite

# Above this many particles one k-means++ start is as good as ten and ten times faster.
MANY_PARTICLES = 100_000

PARTS = 20  # of a continuum
MOST_GROUPS = 20
PATIENCE = 4  # more groups that are tried in vain before the search ends
GROUPING_PARTICLES = 10_000
SURE = 0.98  # mean probability of a particle's own group, above which groups count as distinct
BETWEEN = 0.5  # share of the variance that lies between distinct groups
NARROWEST = 0.5  # of a particle's own standard deviation: groups have no finer structure than that
SMALLEST_VARIANCE = 1e-4  # of a group, as a share of the coordinate's
UNUSED = 0.05  # of the widest coordinate's spread: a narrower one says nothing


def kmeans_centers(
    z: NDArray[np.floating], n: int, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int64]]:
    """Partition the latent into `n` clusters whose centres are data points.

    The centres are ordered by hierarchical clustering (average linkage, optimal leaf order), so that
    neighbouring labels are neighbouring states; the end with the lower first principal coordinate comes
    first. The same input and seed give the same result, whatever the number of threads.

    Parameters
    ----------
    z
        `(N, J)` latent coordinates, no unit.
    n
        Number of clusters wanted; fewer are made when there are fewer distinct points.
    seed
        Seed of the k-means++ starts.

    Returns
    -------
    centers
        `(k, J)` float32: for each cluster its member nearest to the cluster's mean.
    labels
        `(N,)` int32: cluster of each particle, 0 … k−1.
    rows
        `(k,)` int64: row of `z` at which each centre lies.

    Raises
    ------
    ValueError
        If `n` is below 1, `z` has no rows or is not finite.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    require_finite(z)
    if n < 1:
        raise ValueError(f"{n} clusters asked for, at least 1 is needed")
    points = np.asarray(z, dtype=np.float64)
    starts = 10 if len(points) <= MANY_PARTICLES else 1
    model = KMeans(n_clusters=min(n, len(points)), n_init=starts, random_state=seed)
    # One thread: sums over several threads differ in the last bit from run to run.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer points than clusters
        labels = model.fit_predict(points)
    return labelled_centers(z, labels)


def distinct_groups(
    z: NDArray[np.floating],
    counted: NDArray[np.bool_],
    seed: int = 0,
    *,
    std: NDArray[np.floating] | None = None,
) -> NDArray[np.int64] | None:
    """The discrete states that particles fall into; None where they form a continuum.

    Gaussian mixtures of 1 … 20 groups are fitted to at most 10,000 particles, the integrated completed
    likelihood (Biernacki et al. 2000) chooses. Its groups count as distinct where particles belong to one of
    them with a mean probability above 0.98 and most of the variance lies between them. No group is narrower
    than half of what a particle's own place is uncertain by.

    Parameters
    ----------
    z, counted
        `(N, J)` coordinates, and the `(N,)` particles that make the groups; all are given one.
    std
        `(N, J)` standard deviations of the coordinates, in their unit; None: they are exact.

    Returns
    -------
    `(N,)` the group of each particle, or None.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    require_finite(z)
    some = np.flatnonzero(counted)
    some = np.random.default_rng(seed).permutation(some)[:GROUPING_PARTICLES]
    spread = z[some].std(axis=0) if len(some) else np.zeros(z.shape[1])
    if not spread.any():
        return None
    used = spread > UNUSED * spread.max()
    points = np.asarray(z[:, used], dtype=np.float64) / spread[used]
    least = 0.0 if std is None else np.mean((np.median(std[some][:, used], axis=0) / spread[used]) ** 2)
    narrowest = max(SMALLEST_VARIANCE, NARROWEST**2 * float(least))
    chosen, best, sure = None, np.inf, 0.0
    most = min(MOST_GROUPS, len(some) // (10 * points.shape[1]))
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for count in range(1, most + 1):
            mixture = GaussianMixture(count, n_init=2, random_state=seed, reg_covar=narrowest)
            mixture.fit(points[some])
            probability = mixture.predict_proba(points[some])
            doubt = -(probability * np.log(np.maximum(probability, 1e-300))).sum()
            criterion = mixture.bic(points[some]) + 2 * doubt
            if criterion < best:
                chosen, best, sure = mixture, criterion, float(probability.max(axis=1).mean())
            elif chosen is not None and count > chosen.n_components + PATIENCE:
                break
        if chosen is None or chosen.n_components == 1 or sure < SURE:
            return None
        labels = chosen.predict(points)
    inside = z[some] - _means(z[some], np.unique(labels[some], return_inverse=True)[1])
    if (inside**2).sum() > (1 - BETWEEN) * len(some) * (spread**2).sum():
        return None
    return np.asarray(labels, dtype=np.int64)


def labelled_centers(
    z: NDArray[np.floating], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int64]]:
    """Centres, labels and rows as `kmeans_centers` gives them, of any partition `(N,)`."""
    points = np.asarray(z, dtype=np.float64)
    labels = np.unique(labels, return_inverse=True)[1]
    rows = _nearest_member(points, _means(points, labels), labels)
    order = _neighbours_first(points[rows])
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    rows = rows[order]
    return np.asarray(z, dtype=np.float32)[rows], rank[labels], rows


def _means(points: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The mean of its cluster at each of the points, `(N, J)`."""
    sums = np.stack([np.bincount(labels, column) for column in points.T], axis=1)
    return np.asarray((sums / np.bincount(labels)[:, None])[labels], dtype=np.float64)


def _nearest_member(
    points: NDArray[np.float64], means: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    distance = ((points - means) ** 2).sum(axis=1)
    by_cluster_then_distance = np.lexsort((distance, labels))
    first = np.searchsorted(labels[by_cluster_then_distance], np.arange(labels.max() + 1))
    return by_cluster_then_distance[first].astype(np.int64)


def _neighbours_first(centers: NDArray[np.float64]) -> NDArray[np.int64]:
    """Leaf order of the centres' dendrogram, turned so that the first principal coordinate rises."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(centers) < 3:
        order = np.arange(len(centers))
    else:
        order = leaves_list(linkage(centers, method="average", optimal_ordering=True))
    centred = centers - centers.mean(axis=0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    axis *= np.sign(axis[np.argmax(np.abs(axis))]) or 1.0
    height = centred[order] @ axis
    if height[len(height) // 2 :].mean() < height[: (len(height) + 1) // 2].mean():
        order = order[::-1]
    return np.asarray(order, dtype=np.int64)
