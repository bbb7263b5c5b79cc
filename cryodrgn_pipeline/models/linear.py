"""A linear latent model: the density at z is a mean map plus component maps times the coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryodrgn_pipeline.models.basis import combined
from cryodrgn_pipeline.models.subspace import Subspace


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearModel:
    """`maps` `(K, D, D, D)` float32 in the grey scale of the images, one for each factor of `factors`.

    Of `latent_dim` coordinates the first J carry signal, with standard deviations `spread` `(J,)`; the others
    are 0 everywhere. Squares and products of the first `curved` bend the path that the density takes.
    `subspace` places new images.
    """

    maps: Tensor
    spread: Tensor
    latent_dim: int
    curved: int
    pixel_size_a: float
    subspace: Subspace | None = None

    def __post_init__(self) -> None:
        expected = 1 + self.components + self.curved * (self.curved + 1) // 2
        if len(self.maps) != expected or self.maps.ndim != 4:
            raise ValueError(f"{tuple(self.maps.shape)} maps do not fit {expected} factors")

    @property
    def components(self) -> int:
        """How many coordinates carry signal."""
        return len(self.spread)

    @property
    def box_size_px(self) -> int:
        """Box of the maps."""
        return int(self.maps.shape[-1])

    def factors(self, z: Tensor) -> Tensor:
        """What each map is multiplied by at z: `(B, latent_dim)` → `(B, K)`."""
        return factors(z[:, : self.components].to(self.maps) / self.spread, self.curved)

    def density(self, z: Tensor, box_size_px: int) -> Tensor:
        """The map at z `(latent_dim,)` on a grid of this box with the same field of view: `(d, d, d)`."""
        return combined(self.factors(z[None])[0], self.maps, self.pixel_size_a, box_size_px)


def factors(z: Tensor, curved: int) -> Tensor:
    """What the maps are multiplied by: 1, coordinates of variance 1, and products of the first `curved`.

    `(B, J)` → `(B, 1 + J + curved (curved + 1) / 2)`; squares less 1, so that all but the first have mean 0.
    """
    one = z.new_ones(len(z), 1)
    columns = [one, z]
    for j in range(curved):
        for k in range(j + 1):
            columns.append(z[:, j : j + 1] * z[:, k : k + 1] - (one if j == k else 0))
    return torch.cat(columns, dim=1)
