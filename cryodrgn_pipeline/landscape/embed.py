"""The latent in fewer dimensions: principal components, and UMAP for the eye."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.landscape.checks import require_finite
from cryodrgn_pipeline.landscape.outliers import extreme_rows

UMAP_NEIGHBOURS = 15
UMAP_FEWEST = 20
UMAP_FIT_AT_MOST = 200_000
UMAP_EPOCHS = 200  # what umap itself takes beyond 10,000 particles
PLACING_NEIGHBOURS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PrincipalComponents:
    """The latent's principal axes.

    `mean` (J,), `components` (K, J) with orthonormal rows, `scores` (N, K), `explained_variance_ratio` (K,).
    """

    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    scores: NDArray[np.float32]
    explained_variance_ratio: NDArray[np.float64]


def principal_components(z: NDArray[np.floating]) -> PrincipalComponents:
    """All principal components of the latent, each turned so that its largest entry is positive.

    They are those of the particles that are not extreme in |z|: a few far-out ones cannot turn the first
    component towards themselves. Every particle gets its scores.

    Parameters
    ----------
    z
        `(N, J)` latent coordinates, no unit. K = min(N, J) components are found.

    Raises
    ------
    ValueError
        If `z` is empty or not finite.
    """
    from sklearn.decomposition import PCA

    require_finite(z)
    points = np.asarray(z, dtype=np.float64)
    bulk = points[~extreme_rows(points)]
    if len(bulk) < min(points.shape):  # too few to give all axes
        bulk = points
    if not np.ptp(bulk, axis=0).any():  # a collapsed latent has no axes of its own
        mean, rank = bulk.mean(axis=0), min(points.shape)
        components, explained = np.eye(rank, points.shape[1]), np.zeros(rank)
    else:
        model = PCA(svd_solver="full").fit(bulk)
        mean, explained = model.mean_, model.explained_variance_ratio_
        largest = np.abs(model.components_).argmax(axis=1)
        sign = np.sign(model.components_[np.arange(len(largest)), largest])
        components = model.components_ * sign[:, None]
    return PrincipalComponents(
        mean=mean,
        components=components,
        scores=((points - mean) @ components.T).astype(np.float32),
        explained_variance_ratio=explained,
    )


def umap_embedding(
    z: NDArray[np.floating], seed: int = 0, fit_at_most: int = UMAP_FIT_AT_MOST
) -> NDArray[np.float32] | None:
    """Two UMAP coordinates per particle, the same for the same input and seed.

    Distances and densities in a UMAP mean little; it shows what neighbours what. Beyond `fit_at_most`
    particles the map is fitted to a random subset and the others are placed at the mean of their nearest
    fitted neighbours in z, weighted by inverse distance.

    Parameters
    ----------
    z
        `(N, J)` latent coordinates, no unit.
    seed
        Seed of the layout and of the subset.
    fit_at_most
        Largest number of particles the layout is computed with.

    Returns
    -------
    umap
        `(N, 2)` float32, or None when there are fewer than 20 particles or all lie at one point.
    """
    require_finite(z)
    points = np.asarray(z, dtype=np.float32)
    if len(points) < UMAP_FEWEST or not np.ptp(points, axis=0).any():
        return None
    if len(points) <= fit_at_most:
        return _fit_umap(points, seed)
    chosen = np.sort(np.random.default_rng(seed).choice(len(points), size=fit_at_most, replace=False))
    layout = _fit_umap(points[chosen], seed)
    placed = _place_among(points, points[chosen], layout)
    placed[chosen] = layout
    return placed


def _fit_umap(points: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    from scipy.spatial import cKDTree

    neighbours = min(UMAP_NEIGHBOURS, len(points) - 1)
    # Exact neighbours from a KD-tree: umap's own search spends most of a minute on compiling itself.
    distance, neighbour = cKDTree(points).query(points, k=neighbours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap warns of optional packages and of its own defaults
        from umap import UMAP

        model = UMAP(
            n_neighbors=neighbours,
            n_epochs=UMAP_EPOCHS,
            min_dist=0.1,
            random_state=seed,
            n_jobs=1,
            # A spectral start needs an eigensolver that may not converge on odd graphs; PCA always works.
            init="pca" if points.shape[1] >= 2 else "random",
            precomputed_knn=(neighbour.astype(np.int32), distance.astype(np.float32)),
            force_approximation_algorithm=True,
        )
        return np.asarray(model.fit_transform(points), dtype=np.float32)


def _place_among(
    points: NDArray[np.float32], fitted: NDArray[np.float32], layout: NDArray[np.float32]
) -> NDArray[np.float32]:
    from scipy.spatial import cKDTree

    distance, neighbour = cKDTree(fitted).query(points, k=PLACING_NEIGHBOURS)
    weight = 1.0 / (distance + 1e-6 * (distance.mean() + 1e-12))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.asarray((layout[neighbour] * weight[:, :, None]).sum(axis=1), dtype=np.float32)
