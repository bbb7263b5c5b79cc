"""A nonlinear latent model without a network: the density at z is Σ φₖ(z) Vₖ.

The φₖ are the leading principal functions of a Gaussian kernel over the particles (kernel principal
components, Schölkopf et al. 1998, from a sample of landmarks as in Williams & Seeger 2001): the smoothest
functions there are of where a particle lies, along whatever curve or into whatever groups particles fall.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryodrgn_pipeline.models.basis import combined
from cryodrgn_pipeline.models.subspace import Subspace

ROWS_AT_ONCE = 8192
SMALLEST_EIGENVALUE = 1e-8  # of the largest: below it rounding speaks


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFunctions:
    """φ₁ … φ_K with mean 0, variance 1 and no correlation over the particles that they were made from.

    `landmarks` `(M, J)` and `width` `(J,)`, of the kernel on each axis, in units of z; `projection`
    `(M, K)` and `offset` `(K,)` take the kernel's values at the landmarks to the functions; `share` `(K,)`
    their eigenvalues, the first is 1. All float64.
    """

    landmarks: Tensor
    width: Tensor
    projection: Tensor
    offset: Tensor
    share: Tensor

    @classmethod
    def of(cls, z: Tensor, landmarks: Tensor, width: Tensor, most: int) -> KernelFunctions:
        """At most `most` functions, principal over the particles at `z` `(N, J)`."""
        gram = _kernel(landmarks, landmarks, width)
        values, vectors = torch.linalg.eigh(gram)
        known = values > SMALLEST_EIGENVALUE * values[-1]
        root = vectors[:, known] / values[known].sqrt()
        seen = torch.cat([_kernel(part, landmarks, width) @ root for part in torch.split(z, ROWS_AT_ONCE)])
        mean = seen.mean(0)
        moment = (seen - mean).T @ (seen - mean) / len(seen)
        values, vectors = torch.linalg.eigh(moment)
        kept = [n for n in range(len(values) - 1, -1, -1) if values[n] > SMALLEST_EIGENVALUE * values[-1]][
            :most
        ]
        projection = vectors[:, kept] / values[kept].sqrt()
        return cls(
            landmarks=landmarks,
            width=width,
            projection=root @ projection,
            offset=mean @ projection,
            share=values[kept] / values[-1],
        )

    def __len__(self) -> int:
        return len(self.share)

    def at(self, z: Tensor) -> Tensor:
        """1 and the functions at z: `(N, J)` → `(N, 1 + K)` float64."""
        parts = []
        for part in torch.split(z.double(), ROWS_AT_ONCE):
            values = _kernel(part, self.landmarks, self.width) @ self.projection - self.offset
            parts.append(torch.cat([values.new_ones(len(part), 1), values], dim=1))
        return torch.cat(parts)

    def to(self, device: torch.device | str) -> KernelFunctions:
        """The same on a device."""
        return KernelFunctions(**{name: getattr(self, name).to(device) for name in self.__slots__})


def _kernel(z: Tensor, landmarks: Tensor, width: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(z / width, landmarks / width).square() / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelModel:
    """`maps` `(R, D, D, D)` float32 in the grey scale of the images; `turn` `(1 + K, R)` float64 takes
    `functions` of the first coordinates of z to their factors.

    New images are placed by `subspace`, by the functions `placing` of the place there, which are the factors
    of the maps, and by `axes` `(J, d)` float64, which takes a place to the coordinates of z.
    """

    maps: Tensor
    functions: KernelFunctions
    turn: Tensor
    placing: KernelFunctions
    axes: Tensor
    latent_dim: int
    pixel_size_a: float
    subspace: Subspace | None = None

    @property
    def box_size_px(self) -> int:
        """Box of the maps."""
        return int(self.maps.shape[-1])

    @property
    def coordinates(self) -> int:
        """How many coordinates of z carry signal: the first ones."""
        return int(self.functions.landmarks.shape[1])

    def factors(self, z: Tensor) -> Tensor:
        """What each map is multiplied by at z: `(B, latent_dim)` → `(B, R)` float32."""
        z = z[:, : self.coordinates].to(self.turn)
        return (self.functions.at(z) @ self.turn).float()

    def density(self, z: Tensor, box_size_px: int) -> Tensor:
        """The map at z `(latent_dim,)` on a grid of this box with the same field of view: `(d, d, d)`."""
        return combined(self.factors(z[None])[0], self.maps, self.pixel_size_a, box_size_px)
