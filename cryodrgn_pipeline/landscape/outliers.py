"""Particles that fit badly or lie far out: a robust score each, and a flag above a threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# For a normal distribution 1.4826 × the median absolute deviation is the standard deviation.
MAD_TO_SIGMA = 1.4826
JUNK_THRESHOLD = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JunkScores:
    """Robust deviations of N particles, in standard deviations of the bulk.

    `norm_score` of |z|, `loss_score` of the reconstruction loss (None without losses); `score` is the
    larger of the two, at least 0; `flagged` where `score` exceeds the threshold.
    """

    norm_score: NDArray[np.float32]
    loss_score: NDArray[np.float32] | None
    score: NDArray[np.float32]
    flagged: NDArray[np.bool_]


def robust_z_score(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """How far each value lies above the median, in robust standard deviations (1.4826 MAD).

    A value that is not finite scores infinity: whatever made it is worth a look. When more than half of
    the values are equal the plain standard deviation is used; when all are, every score is 0.

    Parameters
    ----------
    values
        `(N,)`, any unit.
    """
    x = np.asarray(values, dtype=np.float64)
    known = np.isfinite(x)
    score = np.full(len(x), np.inf)
    if known.any():
        centre = np.median(x[known])
        spread = MAD_TO_SIGMA * np.median(np.abs(x[known] - centre)) or x[known].std()
        score[known] = (x[known] - centre) / spread if spread > 0 else 0.0
    return score.astype(np.float32)


def junk_scores(
    z: NDArray[np.floating], loss: NDArray[np.floating] | None, threshold: float = JUNK_THRESHOLD
) -> JunkScores:
    """Score every particle by how far out its z lies and how badly the model explains its image.

    Only deviations upwards count: a small |z| or a small loss is no fault. A rare real state that lies far
    from the rest scores high as well, so a flag is a reason to look, not a verdict.

    Parameters
    ----------
    z
        `(N, J)` latent coordinates, no unit.
    loss
        `(N,)` reconstruction loss per particle, or None.
    threshold
        Score above which a particle is flagged.
    """
    norm_score = robust_z_score(np.linalg.norm(np.asarray(z, dtype=np.float64), axis=1))
    loss_score = None
    if loss is not None and np.isfinite(loss).any():
        loss_score = robust_z_score(loss)
    highest = norm_score if loss_score is None else np.maximum(norm_score, loss_score)
    score = np.maximum(highest, 0.0).astype(np.float32)
    return JunkScores(norm_score=norm_score, loss_score=loss_score, score=score, flagged=score > threshold)
