"""Which rows of the particle tables the plots draw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.io.runs import Columns

DRAWN_POINTS = 50_000


def shown_rows(n: int, seed: int = 0) -> NDArray[np.int64]:
    """Rows drawn of `n` particles: all, or 50,000 at random (seeded) in source order."""
    if n <= DRAWN_POINTS:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, size=DRAWN_POINTS, replace=False))


def row_of_centers(centers: Columns, analysed: Columns) -> NDArray[np.int64]:
    """Rows of the particle table at which the cluster centres lie."""
    row = {particle: i for i, particle in enumerate(analysed["particle_id"].tolist())}
    return np.array([row[particle] for particle in centers["particle_id"].tolist()], dtype=np.int64)
