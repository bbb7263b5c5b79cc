"""The encoder: one phase-flipped image's half-plane coefficients in, a Gaussian over the latent out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cryodrgn_pipeline.models.layers import HiddenLayers


class ImageEncoder(nn.Module):
    """MLP from the Hartley transform of an image, disc without DC, to mean and log-variance of z.

    Parameters
    ----------
    n_half_plane
        P, the number of half-plane frequencies; the input is 2P Hartley values.
    latent_dim, width, depth, residual
        Size of z; hidden width; number of hidden layers; whether each has a skip connection.
    """

    def __init__(self, n_half_plane: int, latent_dim: int, *, width: int, depth: int, residual: bool) -> None:
        super().__init__()
        self.first = nn.Linear(2 * n_half_plane, width)
        self.hidden = HiddenLayers(width, depth, residual=residual)
        self.last = nn.Linear(width, 2 * latent_dim)

    def forward(self, flipped: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, P)` complex phase-flipped coefficients → mean `(B, z)` and log-variance `(B, z)`."""
        hartley = torch.cat([flipped.real - flipped.imag, flipped.real + flipped.imag], dim=-1)  # H(k), H(−k)
        features = self.hidden(functional.relu_(self.first(hartley)))
        mean, log_variance = self.last(features).chunk(2, dim=-1)
        return mean, log_variance
