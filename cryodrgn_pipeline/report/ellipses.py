"""How sure a particle's place in the latent is: posterior covariances, seen in the plane of a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.io.runs import Columns, Latents, read_covariances
from cryodrgn_pipeline.report.rows import row_of_centers, shown_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """Posterior covariances of the V coordinates of z that vary, no unit.

    `rows`: per plotted axis that is linear in z (pc_1 …, z_0 …) its `(V,)` direction; `typical` (V, V): the
    median over the particles drawn; `centers` (k, V, V): at the cluster centres; `particles` (n, V, V): of
    the particles drawn. UMAP is not linear in z: nothing can be drawn there.
    """

    rows: dict[str, NDArray[np.float64]]
    typical: NDArray[np.float64]
    centers: NDArray[np.float32]
    particles: NDArray[np.float32]

    def in_plane(self, covariance: NDArray[np.floating], across: str, up: str) -> NDArray[np.float64]:
        """A covariance `(V, V)` projected into the plane of two axes: `(2, 2)`."""
        plane = np.stack([self.rows[across], self.rows[up]])
        return np.asarray(plane @ covariance @ plane.T)


def posterior_uncertainty(
    run: Path, latents: Latents, analysed: Columns, analysis: Mapping[str, Any], centers: Columns
) -> Uncertainty | None:
    """What a run knows of its particles' uncertainty; None where z has no std_j or no axes are known."""
    drawn = shown_rows(len(latents))
    at = row_of_centers(centers, analysed)
    covariances = read_covariances(run, np.concatenate([drawn, at]))
    components = np.asarray(analysis.get("pc_components", []), dtype=np.float64)
    varying = np.flatnonzero(np.ptp(latents.z, axis=0) > 0)
    if covariances is None or components.size == 0 or len(varying) == 0:
        return None
    covariances = covariances[:, varying][:, :, varying]
    particles = covariances[: len(drawn)]
    rows = {f"pc_{k + 1}": row[varying] for k, row in enumerate(components)}
    rows |= {f"z_{j}": np.eye(len(varying))[i] for i, j in enumerate(varying)}
    return Uncertainty(
        rows=rows,
        typical=_without_negative(np.median(particles, axis=0)),
        centers=covariances[len(drawn) :],
        particles=particles,
    )


def ellipse(covariance: NDArray[np.floating]) -> tuple[float, float, float]:
    """Full width and height of the 1-σ ellipse of a covariance `(2, 2)`, and its angle in degrees."""
    variance, axes = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
    width, height = 2 * np.sqrt(np.maximum(variance[::-1], 0))
    return float(width), float(height), float(np.degrees(np.arctan2(axes[1, 1], axes[0, 1])))


def lower_triangle(covariances: NDArray[np.floating]) -> NDArray[np.float32]:
    """Covariances `(…, V, V)` as rows 0 0, 1 0, 1 1, 2 0 …: `(…, V(V+1)/2)`."""
    j, k = np.tril_indices(covariances.shape[-1])
    return np.asarray(covariances[..., j, k], dtype=np.float32)


def _without_negative(covariance: NDArray[np.floating]) -> NDArray[np.float64]:
    """The nearest covariance: medians of entries need not make one."""
    variance, axes = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
    return np.asarray((axes * np.maximum(variance, 0)) @ axes.T)
