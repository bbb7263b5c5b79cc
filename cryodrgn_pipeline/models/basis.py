"""A nonlinear latent model in the span of a few maps: the density at z is Σ aⱼ(z) Vⱼ, a(z) a small network.

The encoder reads what the image says in the linear subspace (its posterior there), which is free of pose and
CTF. An image enters the loss through its inner products with the maps alone, so that training never touches
the images again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cryodrgn_pipeline.fourier.slices import resample_volume
from cryodrgn_pipeline.models.encoder import Reading
from cryodrgn_pipeline.models.subspace import Subspace

if TYPE_CHECKING:
    from cryodrgn_pipeline.models.from_subspace import ImageBasisVae


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisConfig:
    """`components` J of the subspace, `latent_dim` of z, hidden `width` of both networks."""

    components: int
    latent_dim: int = 8
    width: int = 64
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class BasisVae(nn.Module):
    """Posterior in the subspace → z → factors of the maps. It starts as the identity on the leading J."""

    def __init__(self, config: BasisConfig) -> None:
        super().__init__()
        self.config = config
        j, d = config.components, config.latent_dim
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(config.seed)
            self.encoder = _network(2 * j, 2 * d, config.width)
            self.decoder = _network(d, j, config.width)
        self.encoder_line, self.decoder_line = nn.Linear(2 * j, d), nn.Linear(d, j, bias=False)
        with torch.no_grad():
            for line in (self.encoder_line, self.decoder_line):
                line.weight.zero_().fill_diagonal_(1)
            self.encoder_line.bias.zero_()

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of z, `(B, latent_dim)` each, from `posterior_features`."""
        offset, log_variance = self.encoder(features).chunk(2, dim=1)
        return self.encoder_line(features) + offset, log_variance - 2

    def factors(self, z: Tensor) -> Tensor:
        """What the J + 1 maps are multiplied by at z: `(B, latent_dim)` → `(B, J+1)`, the first is 1."""
        moving = self.decoder_line(z) + self.decoder(z)
        return torch.cat([torch.ones_like(moving[:, :1]), moving], dim=1)


def posterior_features(z: Tensor, covariance: Tensor) -> Tensor:
    """What the encoder reads: posterior means and standard deviations in the subspace, `(B, 2J)` float32."""
    return torch.cat([z, covariance.diagonal(dim1=1, dim2=2).sqrt()], dim=1).float()


def _network(inputs: int, outputs: int, width: int) -> nn.Sequential:
    layers = [nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
    last = nn.Linear(width, outputs)
    with torch.no_grad():
        last.weight.mul_(0.1)
    return nn.Sequential(*layers, last)


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisModel:
    """The network with its maps: `maps` `(R, D, D, D)` float32 in the grey scale of the images.

    `turn` `(J+1, R)` takes the network's factors to those of the maps. `subspace` places new images;
    `reading` is how an encoder of images reads them (None: it reads their place in the subspace).
    """

    vae: BasisVae | ImageBasisVae
    maps: Tensor
    turn: Tensor
    pixel_size_a: float
    subspace: Subspace | None = None
    reading: Reading | None = None

    @property
    def box_size_px(self) -> int:
        """Box of the maps."""
        return int(self.maps.shape[-1])

    @property
    def latent_dim(self) -> int:
        """Size of z."""
        return self.vae.config.latent_dim

    @torch.no_grad()
    def factors(self, z: Tensor) -> Tensor:
        """What each map is multiplied by at z: `(B, latent_dim)` → `(B, R)`."""
        turned: Tensor = self.vae.factors(z.to(self.turn)) @ self.turn
        return turned

    def density(self, z: Tensor, box_size_px: int) -> Tensor:
        """The map at z `(latent_dim,)` on a grid of this box with the same field of view: `(d, d, d)`."""
        return combined(self.factors(z[None])[0], self.maps, self.pixel_size_a, box_size_px)


def combined(factors: Tensor, maps: Tensor, pixel_size_a: float, box_size_px: int) -> Tensor:
    """Σ factorⱼ mapⱼ of `(R, D, D, D)` maps on the CPU, in a grid of this box with the same field of view."""
    density: Tensor = torch.tensordot(factors.to(maps), maps, dims=1).cpu()
    d = int(maps.shape[-1])
    if box_size_px == d:
        return density
    return resample_volume(density, pixel_size_a, box_size_px, pixel_size_a * d / box_size_px)
