"""Models that start from the default one: a coordinate network added to its volumes, or another encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cryodrgn_pipeline.fourier.slices import extract_columns, volume_grid
from cryodrgn_pipeline.models.basis import BasisModel, BasisVae
from cryodrgn_pipeline.models.vae import VaeConfig, coordinate_decoder, image_encoder


class ResidualVae(nn.Module):
    """The default model, and what a coordinate network adds to its volumes: nothing at first.

    The coefficient at k is that of Σ aⱼ(z) Vⱼ plus the network's at (k, z). Encoder and a(z) go on learning;
    the maps stay as they are.

    Parameters
    ----------
    config
        The network, and the disc of frequencies.
    start
        The default model; its network is trained on.
    scale
        σ that the images' coefficients are divided by.
    """

    config: VaeConfig
    start: BasisModel
    basis: BasisVae
    columns: Tensor
    turn: Tensor

    def __init__(self, config: VaeConfig, start: BasisModel, scale: float) -> None:
        super().__init__()
        if not isinstance(start.vae, BasisVae):
            raise ValueError("a residual goes on the model whose encoder reads the subspace")
        self.config, self.start, self.basis = config, start, start.vae
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(config.seed)
            self.decoder = coordinate_decoder(config)
        nn.init.zeros_(self.decoder.last.weight)
        nn.init.zeros_(self.decoder.last.bias)
        grids = torch.stack([volume_grid(one).flatten() for one in start.maps], dim=1) / scale
        # no part of the state: they never change, and would make each checkpoint many times larger
        self.register_buffer("columns", grids, persistent=False)
        self.register_buffer("turn", start.turn, persistent=False)

    def encode(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z, `(B, latent_dim)` each, from `posterior_features`."""
        with torch.autocast(seen.device.type, enabled=False):
            return self.basis.encode(seen)

    def decode_slices(self, coordinates: Tensor, z: Tensor, ctf: Tensor) -> Tensor:
        """CTF-modulated slices `(B, Q)` complex at `(B, Q, 3)` coordinates, cycles per pixel."""
        d = self.config.box_size_px
        with torch.autocast(z.device.type, enabled=False):
            factors = self.basis.factors(z) @ self.turn
            maps = extract_columns(self.columns, 2 * d, coordinates * d)
            drawn = (maps @ factors.to(maps)[..., None])[..., 0]
        slices: Tensor = (drawn + self.decoder(coordinates, z)) * ctf
        return slices


class ImageBasisVae(nn.Module):
    """The default model with an encoder that reads the image; its a(z) goes on learning with it."""

    config: VaeConfig
    basis: BasisVae

    def __init__(self, config: VaeConfig, basis: BasisVae) -> None:
        super().__init__()
        self.config, self.basis = config, basis
        for idle in (basis.encoder, basis.encoder_line):
            idle.requires_grad_(False)  # the encoder of images stands in for them
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(config.seed)
            self.encoder = image_encoder(config)

    def encode(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z from `(B, P)` complex filtered coefficients."""
        mean, log_variance = self.encoder(seen)
        return mean, log_variance

    def factors(self, z: Tensor) -> Tensor:
        """What the J + 1 maps are multiplied by at z: `(B, latent_dim)` → `(B, J+1)`, the first is 1."""
        return self.basis.factors(z)
