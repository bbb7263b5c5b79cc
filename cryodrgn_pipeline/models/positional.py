"""Positional encodings: frozen sinusoids of Fourier coordinates, so that an MLP can draw fine detail."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GAUSSIAN_SCALE = 0.5  # standard deviation of the random frequencies, before the factor D/2


class PositionalEncoding(nn.Module):
    """sin and cos of ω·k for F fixed three-dimensional frequencies ω; k in cycles per pixel, |k| ≤ ½.

    `gaussian`: 3·D/2 frequencies, ω ~ N(0, (0.5·D/2)²) on each axis. `geometric`: on each axis D/2
    frequencies from 1 to D/2 in geometric progression. Both give 3·D features for a box of D pixels.
    """

    frequencies: Tensor

    def __init__(self, box_size_px: int, kind: str, generator: torch.Generator) -> None:
        super().__init__()
        edge = box_size_px // 2
        if kind == "gaussian":
            frequencies = torch.randn(3 * edge, 3, generator=generator) * GAUSSIAN_SCALE * edge
        elif kind == "geometric":
            progression = float(edge) ** torch.linspace(0, 1, edge)
            frequencies = torch.kron(torch.eye(3), progression[:, None])
        else:
            raise ValueError(f"positional encoding {kind!r} is neither 'gaussian' nor 'geometric'")
        self.register_buffer("frequencies", frequencies)

    @property
    def n_features(self) -> int:
        """Length of the encoding of one coordinate."""
        return 2 * self.frequencies.shape[0]

    def forward(self, coordinates: Tensor) -> Tensor:
        """`(..., 3)` coordinates → `(..., 2F)` features."""
        phase = coordinates @ self.frequencies.T
        features = torch.empty(*phase.shape[:-1], self.n_features, device=phase.device, dtype=phase.dtype)
        half = phase.shape[-1]
        torch.sin(phase, out=features[..., :half])
        torch.cos(phase, out=features[..., half:])
        return features
