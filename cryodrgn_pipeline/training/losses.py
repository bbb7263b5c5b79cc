"""The two parts of the loss, per image."""

from __future__ import annotations

import torch
from torch import Tensor


def reconstruction(predicted: Tensor, measured: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of Hartley values, `(B,)`, from `(B, Q)` complex half-plane coefficients.

    H(k) and H(−k) together hold F(k), and (ΔH(k))² + (ΔH(−k))² = 2|ΔF(k)|²: the mean over a full disc of
    Hartley values is the mean of |ΔF|² over its half. `weight` `(B, Q)`: that of each squared error.
    """
    difference = torch.view_as_real(predicted - measured)
    squared = (difference * difference).sum(-1)
    return squared.mean(-1) if weight is None else (weight * squared).mean(-1)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1), `(B,)`."""
    return 0.5 * (mean * mean + log_variance.exp() - 1 - log_variance).sum(-1)
