"""Fourier cropping and padding of real images, with the shift and the contrast sign in the same pass.

A crop D₀ → D keeps the frequencies −D/2 … D/2 and the field of view; it multiplies the unnormalised
coefficients by (D/D₀)², so that a cropped image has the real-space mean and contrast of the original.
On the new grid +D/2 and −D/2 are one frequency: it gets the mean of both, so that the image is real.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cropped_spectrum(
    images: Tensor, box_size_px: int, *, shift_px: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """Half-plane spectrum of images that are shifted, multiplied by `factor` and Fourier-cropped.

    Parameters
    ----------
    images
        `(B, D₀, D₀)` float32.
    box_size_px
        The new box D: even, at most D₀.
    shift_px
        `(B, 2)` as (x, y), pixels of the original box; content moves by +shift. Default: none.
    factor
        `(B,)` factors, such as the contrast sign. Default: 1.

    Returns
    -------
    `(B, D, D/2+1)` complex64: the unnormalised transform of the cropped image, as of `torch.fft.rfft2`
    (origin at index 0), but for its last column: `images_of` takes the mean of +D/2 and −D/2 there.
    """
    n, original, d = len(images), images.shape[-1], box_size_px
    if d % 2 or not 0 < d <= original or images.shape[-2] != original:
        raise ValueError(f"cannot crop images of {tuple(images.shape[-2:])} px to an even box of {d} px")
    half = d // 2
    shift = torch.zeros(n, 2, dtype=torch.float64) if shift_px is None else shift_px.double()
    # the centre of a box lies at index D // 2: in an odd box half a pixel short of D/2
    shift = shift + (original / 2 - original // 2)
    scale = (d / original) ** 2 * (torch.ones(n) if factor is None else factor)

    columns = _phase_ramp(torch.arange(half + 1), shift[:, 0], original) * scale[:, None]
    rows = _phase_ramp(torch.arange(-half, half + 1), shift[:, 1], original)
    # columns are cropped first and laid out one after the other: half the work, and kind to the cache
    wide = torch.fft.rfft(images)[..., : half + 1].transpose(1, 2).contiguous()
    full = torch.fft.fft(wide)
    out = torch.empty(n, half + 1, d, dtype=full.dtype)
    torch.mul(full[..., :half], rows[:, None, half:d], out=out[..., :half])
    torch.mul(full[..., original - half :], rows[:, None, :half], out=out[..., half:])
    out[..., half] = (out[..., half] + full[..., half] * rows[:, d, None]) / 2
    out *= columns[:, :, None]
    return out.transpose(1, 2)


def fourier_crop(
    images: Tensor, box_size_px: int, *, shift_px: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """Shift, multiply and Fourier-crop `(B, D₀, D₀)` images to `(B, D, D)`; see `cropped_spectrum`."""
    spectrum = cropped_spectrum(images, box_size_px, shift_px=shift_px, factor=factor)
    return images_of(spectrum)


def images_of(spectrum: Tensor) -> Tensor:
    """Real images `(B, D, D)` of half-plane spectra `(B, D, D/2+1)`, like a faster `irfft2`."""
    rows_done = torch.fft.ifft(spectrum.transpose(1, 2)).transpose(1, 2).contiguous()
    images: Tensor = torch.fft.irfft(rows_done, n=spectrum.shape[-2])
    return images


def _phase_ramp(frequency_px: Tensor, shift_px: Tensor, box_size_px: int) -> Tensor:
    # exp(−2πi k t / D), `(B, K)` complex64; the angle in float64, so that large shifts lose nothing
    angle = (-2 * math.pi / box_size_px) * shift_px.double()[:, None] * frequency_px.double()
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
