"""The variational autoencoder: images to latents to Fourier slices, poses and CTF known."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cryodrgn_pipeline.fourier.density import density_from_half_ball, half_ball
from cryodrgn_pipeline.fourier.transforms import HalfPlane, half_plane
from cryodrgn_pipeline.models.decoders import CoordinateDecoder
from cryodrgn_pipeline.models.encoder import ImageEncoder

POINTS_AT_ONCE = {"cpu": 16_384, "cuda": 1_000_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """Everything that fixes the architecture; it is stored with the weights.

    `encoder` reads the image, or its posterior in the subspace; `decoder` draws with a coordinate network,
    or with the maps of the subspace. `mask_radius` and `encoder_mask_radius` (default: the same) are the
    discs of frequencies that the loss and the encoder see, as fractions of Nyquist. `encoder_input`: the
    image as it is, or turned in its plane so that the known in-plane angle is 0 ("aligned") and the encoder
    need not learn what a turn does. `encoder_filter`: what undoes the CTF before the encoder reads. `loss`:
    the noise is taken as white, or as coloured like the spectrum of each optics group (whitened).
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
    encoder_filter: str = "phase-flip"
    loss: str = "white"
    encoder: str = "image"
    decoder: str = "mlp"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, one, other in (
            ("encoder", self.encoder, "image", "subspace"),
            ("decoder", self.decoder, "mlp", "basis"),
            ("encoder type", self.encoder_type, "mlp", "resid"),
            ("decoder type", self.decoder_type, "mlp", "resid"),
            ("positional encoding", self.positional_encoding, "gaussian", "geometric"),
            ("domain", self.domain, "fourier", "hartley"),
            ("encoder input", self.encoder_input, "image", "aligned"),
            ("encoder filter", self.encoder_filter, "phase-flip", "wiener"),
            ("loss", self.loss, "white", "whitened"),
        ):
            if value not in (one, other):
                raise ValueError(f"{name} {value!r} is neither {one!r} nor {other!r}")
        one_shell = 2 / self.box_size_px
        for whose, radius, most in (
            ("loss's", self.mask_radius, 1.0),
            ("encoder's", self.encoder_mask_radius, self.mask_radius),
        ):
            if radius is not None and not one_shell <= radius <= most:
                raise ValueError(
                    f"the {whose} mask radius is a fraction of Nyquist between {one_shell:.3g} (one Fourier "
                    f"shell) and {most:.3g}, got {radius}"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GreyReference:
    """What tells the grey scale of other images: `gain`, by which the images of the training exceed the map
    at `z`, by least squares.
    """

    z: tuple[float, ...]
    gain: float


class Vae(nn.Module):
    """cryoDRGN's model (Zhong et al., Nature Methods 18, 176, 2021): image encoder, coordinate decoder."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(config.seed)  # layers draw their start from the global generator
            self.encoder = image_encoder(config)
            self.decoder = coordinate_decoder(config)

    def encode(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z from `(B, P)` complex filtered coefficients at `encoder_plane`."""
        mean, log_variance = self.encoder(seen)
        return mean, log_variance

    def decode_slices(self, coordinates: Tensor, z: Tensor, ctf: Tensor) -> Tensor:
        """CTF-modulated slices `(B, Q)` complex at `(B, Q, 3)` coordinates for latents `(B, z)`."""
        slices: Tensor = self.decoder(coordinates, z) * ctf
        return slices


def image_encoder(config: VaeConfig) -> ImageEncoder:
    """An encoder of images, its weights drawn from the global generator."""
    return ImageEncoder(
        len(config.encoder_plane()),
        config.latent_dim,
        width=config.encoder_width,
        depth=config.encoder_layers,
        residual=config.encoder_type == "resid",
    )


def coordinate_decoder(config: VaeConfig) -> CoordinateDecoder:
    """A coordinate network, its weights drawn from the global generator."""
    return CoordinateDecoder(
        config.box_size_px,
        config.latent_dim,
        width=config.decoder_width,
        depth=config.decoder_layers,
        residual=config.decoder_type == "resid",
        encoding=config.positional_encoding,
        domain=config.domain,
        generator=torch.Generator().manual_seed(config.seed),
    )


def decoded_density(decoder: CoordinateDecoder, config: VaeConfig, z: Tensor, box_size_px: int) -> Tensor:
    """The density `(d, d, d)` at z `(latent_dim,)`, in the decoder's own scale, on the CPU.

    The decoder is asked at k and −k and the Hermitian mean is taken.
    """
    full = config.box_size_px
    device = next(decoder.parameters()).device
    points = half_ball(box_size_px, min(box_size_px / 2, config.mask_radius * full / 2))
    coordinates = points.flip(1).to(device, torch.float32) / full
    latent = z.to(device)[None].expand(2, -1)
    values = []
    for part in torch.split(coordinates, POINTS_AT_ONCE[device.type]):
        both = decoder(torch.stack([part, -part]), latent)
        values.append((both[0] + both[1].conj()) / 2)
    return density_from_half_ball(torch.cat(values).cpu(), points, box_size_px)
