"""The latent in fewer dimensions: principal components, and UMAP for the eye."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.landscape.checks import require_finite

UMAP_NEIGHBOURS = 15
UMAP_FEWEST = 20
UMAP_FIT_AT_MOST = 200_000
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
    if len(points) == 1 or not np.ptp(points, axis=0).any():  # a collapsed latent has no axes of its own
        rank = min(points.shape)
        nothing = np.zeros(rank)
        return PrincipalComponents(
            mean=points.mean(axis=0),
            components=np.eye(rank, points.shape[1]),
            scores=np.zeros((len(points), rank), dtype=np.float32),
            explained_variance_ratio=nothing,
        )
    model = PCA(svd_solver="full").fit(points)
    largest = np.abs(model.components_).argmax(axis=1)
    sign = np.sign(model.components_[np.arange(len(largest)), largest])
    components = model.components_ * sign[:, None]
    return PrincipalComponents(
        mean=model.mean_,
        components=components,
        scores=((points - model.mean_) @ components.T).astype(np.float32),
        explained_variance_ratio=model.explained_variance_ratio_,
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap warns of optional packages and of its own defaults
        from umap import UMAP

        neighbours = min(UMAP_NEIGHBOURS, len(points) - 1)
        # A spectral start needs an eigensolver that may not converge on odd graphs; PCA always works.
        start = "pca" if points.shape[1] >= 2 else "random"
        model = UMAP(n_neighbors=neighbours, min_dist=0.1, random_state=seed, n_jobs=1, init=start)
        return np.asarray(model.fit_transform(points), dtype=np.float32)


def _place_among(
    points: NDArray[np.float32], fitted: NDArray[np.float32], layout: NDArray[np.float32]
) -> NDArray[np.float32]:
    from scipy.spatial import cKDTree

    distance, neighbour = cKDTree(fitted).query(points, k=PLACING_NEIGHBOURS)
    weight = 1.0 / (distance + 1e-6 * (distance.mean() + 1e-12))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.asarray((layout[neighbour] * weight[:, :, None]).sum(axis=1), dtype=np.float32)
