"""k-means over the latent, with centres that are real particles and labels in a stable order."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.landscape.checks import require_finite

# Above this many particles one k-means++ start is as good as ten and ten times faster.
MANY_PARTICLES = 100_000


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
    used, labels = np.unique(labels, return_inverse=True)
    rows = _nearest_member(points, model.cluster_centers_[used], labels)
    order = _neighbours_first(points[rows])
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    rows = rows[order]
    return np.asarray(z, dtype=np.float32)[rows], rank[labels], rows


def _nearest_member(
    points: NDArray[np.float64], means: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    distance = ((points - means[labels]) ** 2).sum(axis=1)
    by_cluster_then_distance = np.lexsort((distance, labels))
    first = np.searchsorted(labels[by_cluster_then_distance], np.arange(len(means)))
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
