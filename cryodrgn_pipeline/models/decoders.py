"""The coordinate decoder: where in Fourier space, and which state, in; one complex coefficient out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cryodrgn_pipeline.models.layers import HiddenLayers
from cryodrgn_pipeline.models.positional import PositionalEncoding


class CoordinateDecoder(nn.Module):
    """V̂(k; z) by a positional encoding of k and an MLP that also reads z.

    The first layer is split into a coordinate part, W_k·γ(k), and a latent part, W_z·z, which is computed
    once per image and not once per pixel. In the `fourier` domain the network gives (re, im) at k; in the
    `hartley` domain it gives H at k and at −k, from which the coefficient follows.
    """

    def __init__(
        self,
        box_size_px: int,
        latent_dim: int,
        *,
        width: int,
        depth: int,
        residual: bool,
        encoding: str,
        domain: str,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.domain = domain
        self.encoding = PositionalEncoding(box_size_px, encoding, generator)
        joint = nn.Linear(self.encoding.n_features + latent_dim, width)  # its range sets both parts' start
        self.coordinate_weight = nn.Parameter(joint.weight[:, : self.encoding.n_features].detach().clone())
        self.latent_part = nn.Linear(latent_dim, width)
        with torch.no_grad():
            self.latent_part.weight.copy_(joint.weight[:, self.encoding.n_features :])
            self.latent_part.bias.copy_(joint.bias)
        self.hidden = HiddenLayers(width, depth, residual=residual)
        self.last = nn.Linear(width, 2 if domain == "fourier" else 1)

    def forward(self, coordinates: Tensor, z: Tensor) -> Tensor:
        """Coefficients of the state `z` at Fourier coordinates.

        Parameters
        ----------
        coordinates
            `(B, P, 3)` in (x, y, z) order, cycles per pixel.
        z
            `(B, latent_dim)`.

        Returns
        -------
        `(B, P)` complex64, in units of the data's normalisation.
        """
        if self.domain == "fourier":
            return torch.view_as_complex(self._network(coordinates, z).float())
        both = self._network(torch.cat([coordinates, -coordinates], dim=1), z).float().squeeze(-1)
        here, opposite = both.chunk(2, dim=1)
        return torch.complex((here + opposite) / 2, (opposite - here) / 2)

    def _network(self, coordinates: Tensor, z: Tensor) -> Tensor:
        with torch.autocast(coordinates.device.type, enabled=False):  # phases need full precision
            features = self.encoding(coordinates)
        x = functional.linear(features, self.coordinate_weight) + self.latent_part(z)[:, None, :]
        # two axes from here on: an in-place ReLU on a view of a product would copy it for autograd
        flat = self.hidden(functional.relu_(x).flatten(0, 1))
        output: Tensor = self.last(flat).unflatten(0, coordinates.shape[:2])
        return output
