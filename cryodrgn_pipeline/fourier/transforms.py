"""Centred Fourier and Hartley transforms, and the half plane that holds all an image knows.

Convention: the origin of a box of D pixels lies at index D/2; F(k) = sum_x f(x) exp(-2 pi i k.(x - D/2) / D),
unnormalised. Hartley: H(k) = Re F(k) - Im F(k), so H(k) and H(-k) together hold F(k).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def centred_fft(x: Tensor, ndim: int = 2) -> Tensor:
    """Centred transform over the last `ndim` axes: `(..., D, D)` real or complex → `(..., D, D)` complex."""
    axes = tuple(range(-ndim, 0))
    f: Tensor = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(x, dim=axes), dim=axes), dim=axes)
    return f


def hartley(x: Tensor, ndim: int = 2) -> Tensor:
    """Centred Hartley transform Re − Im over the last `ndim` axes: `(..., D, D)` → `(..., D, D)` real."""
    f = centred_fft(x, ndim)
    return f.real - f.imag


def rfftn_radius(box_size_px: int, *, device: torch.device | str = "cpu") -> Tensor:
    """|k| in cycles per box of each point of an `rfftn` cube: `(D, D, D/2+1)` float32."""
    k = torch.fft.fftfreq(box_size_px, 1 / box_size_px, device=device)
    kx = torch.arange(box_size_px // 2 + 1, device=device)
    return torch.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + kx**2)


def symmetrise(f: Tensor, ndim: int = 2) -> Tensor:
    """Repeat the −D/2 edge at +D/2 on the last `ndim` axes: `(..., D, D)` → `(..., D+1, D+1)`."""
    for axis in range(-ndim, 0):
        f = torch.cat([f, f.narrow(axis, 0, 1)], dim=axis)
    return f


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfPlane:
    """The P frequencies of one half of a disc without DC: k and −k are listed once (Friedel).

    `ky`, `kx` are `(P,)` int64 in cycles per box; the half is kx > 0, or kx = 0 and ky > 0.
    """

    box_size_px: int
    ky: Tensor
    kx: Tensor

    def __len__(self) -> int:
        return self.ky.numel()

    def to(self, device: torch.device | str) -> HalfPlane:
        """The same half plane with its index tensors on `device`."""
        return HalfPlane(box_size_px=self.box_size_px, ky=self.ky.to(device), kx=self.kx.to(device))

    def at(self, points: Tensor | slice) -> HalfPlane:
        """The half plane's chosen points (indices or a slice)."""
        return HalfPlane(box_size_px=self.box_size_px, ky=self.ky[points], kx=self.kx[points])

    @property
    def radius(self) -> Tensor:
        """|k| in cycles per box, `(P,)` float32."""
        return torch.hypot(self.ky.float(), self.kx.float())


def half_plane(box_size_px: int, radius: float | None = None) -> HalfPlane:
    """All half-plane frequencies with 0 < |k| ≤ `radius` cycles per box (default D/2), by rising |k|."""
    if box_size_px % 2:
        raise ValueError(f"the box must be even, got {box_size_px} px")
    edge = box_size_px // 2
    radius = float(edge) if radius is None else float(radius)
    k = torch.arange(-edge, edge + 1)
    ky, kx = torch.meshgrid(k, k, indexing="ij")
    squared = ky**2 + kx**2
    keep = (squared <= radius**2) & ((kx > 0) | ((kx == 0) & (ky > 0)))
    order = torch.argsort(squared[keep], stable=True)
    return HalfPlane(box_size_px=box_size_px, ky=ky[keep][order], kx=kx[keep][order])


def half_plane_coefficients(images: Tensor, plane: HalfPlane) -> Tensor:
    """Centred Fourier coefficients of `(..., D, D)` real images at the half plane: `(..., P)` complex."""
    d = plane.box_size_px
    if images.shape[-2:] != (d, d):
        raise ValueError(f"images of {tuple(images.shape[-2:])} px do not fit a half plane of {d} px")
    spectrum: Tensor = torch.fft.rfft2(images).flatten(-2)
    index = (plane.ky % d) * (d // 2 + 1) + plane.kx
    sign = 1.0 - 2.0 * ((plane.ky + plane.kx) % 2)  # moves the origin from index 0 to D/2
    return spectrum[..., index] * sign
