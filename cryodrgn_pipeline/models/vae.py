"""The variational autoencoder: images to latents to Fourier slices, poses and CTF known."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cryodrgn_pipeline.fourier.transforms import HalfPlane, half_plane
from cryodrgn_pipeline.models.decoders import CoordinateDecoder
from cryodrgn_pipeline.models.encoder import ImageEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """Everything that fixes the architecture; it is stored with the weights.

    `mask_radius` and `encoder_mask_radius` (default: the same) are the discs of frequencies that the loss
    and the encoder see, as fractions of Nyquist. `encoder_input`: the image as it is, or turned in its plane
    so that the known in-plane angle is 0 ("aligned") and the encoder need not learn what a turn does.
    """

    box_size_px: int
    latent_dim: int = 8
    encoder_width: int = 1024
    encoder_layers: int = 3
    encoder_type: str = "resid"
    decoder_width: int = 1024
    decoder_layers: int = 3
    decoder_type: str = "resid"
    positional_encoding: str = "gaussian"
    domain: str = "fourier"
    mask_radius: float = 1.0
    encoder_mask_radius: float | None = None
    encoder_input: str = "aligned"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("encoder", self.encoder_type), ("decoder", self.decoder_type)):
            if value not in ("mlp", "resid"):
                raise ValueError(f"{name} type {value!r} is neither 'mlp' nor 'resid'")
        if self.positional_encoding not in ("gaussian", "geometric"):
            raise ValueError(
                f"positional encoding {self.positional_encoding!r} is neither 'gaussian' nor 'geometric'"
            )
        if self.domain not in ("fourier", "hartley"):
            raise ValueError(f"domain {self.domain!r} is neither 'fourier' nor 'hartley'")
        if self.encoder_input not in ("image", "aligned"):
            raise ValueError(f"encoder input {self.encoder_input!r} is neither 'image' nor 'aligned'")
        if not 0 < self.mask_radius <= 1:
            raise ValueError(f"the mask radius is a fraction of Nyquist in (0, 1], got {self.mask_radius}")
        if self.encoder_mask_radius is not None and not 0 < self.encoder_mask_radius <= self.mask_radius:
            raise ValueError(
                f"the encoder's mask radius lies in (0, {self.mask_radius}], the radius of the loss, "
                f"got {self.encoder_mask_radius}"
            )

    def plane(self) -> HalfPlane:
        """The half-plane frequencies of the loss: the disc without DC, by rising |k|."""
        return half_plane(self.box_size_px, self.mask_radius * self.box_size_px / 2)

    def encoder_plane(self) -> HalfPlane:
        """The half-plane frequencies that the encoder reads: the first ones of `plane`."""
        radius = self.mask_radius if self.encoder_mask_radius is None else self.encoder_mask_radius
        return half_plane(self.box_size_px, radius * self.box_size_px / 2)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Vae(nn.Module):
    """cryoDRGN's model (Zhong et al., Nature Methods 18, 176, 2021): image encoder, coordinate decoder."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        state = torch.random.get_rng_state()
        torch.manual_seed(config.seed)  # layers draw their start from the global generator
        generator = torch.Generator().manual_seed(config.seed)
        self.encoder = ImageEncoder(
            len(config.encoder_plane()),
            config.latent_dim,
            width=config.encoder_width,
            depth=config.encoder_layers,
            residual=config.encoder_type == "resid",
        )
        self.decoder = CoordinateDecoder(
            config.box_size_px,
            config.latent_dim,
            width=config.decoder_width,
            depth=config.decoder_layers,
            residual=config.decoder_type == "resid",
            encoding=config.positional_encoding,
            domain=config.domain,
            generator=generator,
        )
        torch.random.set_rng_state(state)

    def encode(self, flipped: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z from `(B, P)` complex phase-flipped coefficients at `encoder_plane`."""
        mean, log_variance = self.encoder(flipped)
        return mean, log_variance

    def decode_slices(self, coordinates: Tensor, z: Tensor, ctf: Tensor) -> Tensor:
        """CTF-modulated slices `(B, Q)` complex at `(B, Q, 3)` coordinates for latents `(B, z)`."""
        slices: Tensor = self.decoder(coordinates, z) * ctf
        return slices
