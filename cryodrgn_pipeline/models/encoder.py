"""The encoder: one image's filtered half-plane coefficients in, a Gaussian over the latent out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cryodrgn_pipeline.models.layers import HiddenLayers


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What images are divided by before an encoder reads them: `scale`, σ of their coefficients, and
    `input_scale`, the root mean square of what its Wiener filter gives (1 without one).
    """

    scale: float
    input_scale: float = 1.0


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

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, P)` complex filtered coefficients → mean `(B, z)` and log-variance `(B, z)`."""
        hartley = torch.cat([seen.real - seen.imag, seen.real + seen.imag], dim=-1)  # H(k), H(−k)
        features = self.hidden(functional.relu_(self.first(hartley)))
        mean, log_variance = self.last(features).chunk(2, dim=-1)
        return mean, log_variance
