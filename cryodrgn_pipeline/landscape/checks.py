"""What every function of this room asks of a latent array."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def require_finite(z: NDArray[np.floating]) -> None:
    """Raise `ValueError` unless `z` is `(N, J)` with at least one row and one column, all finite."""
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"latent of shape {z.shape}: (particles, dimensions) needed, at least one of each")
    bad = int((~np.isfinite(z)).any(axis=1).sum())
    if bad:
        raise ValueError(f"latent with NaN or infinity in {bad} of {len(z)} rows")
