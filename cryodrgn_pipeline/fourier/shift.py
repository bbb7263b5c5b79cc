"""Sub-pixel shifts as phase ramps; the Nyquist frequency, which has no direction, takes their mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def phase_ramp(frequency_px: Tensor, shift_px: Tensor, box_size_px: int) -> Tensor:
    """Phase factors that move image content by +`shift_px` along one axis: exp(−2πi k t / D).

    Parameters
    ----------
    frequency_px
        `(K,)` frequencies in cycles per box.
    shift_px
        `(B,)` shift in pixels of the box.
    box_size_px
        The box D that the shift is measured in.

    Returns
    -------
    `(B, K)` complex64; the angle is computed in float64 so that large shifts lose nothing.
    """
    angle = (-2 * math.pi / box_size_px) * shift_px.double()[:, None] * frequency_px.double()[None, :]
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def shift_images(images: Tensor, shift_px: Tensor) -> Tensor:
    """Move the content of `(B, D, D)` real images by +`shift_px` `(B, 2)`, given as (x, y) in pixels.

    Content that leaves the box on one side enters on the other. A whole number of pixels is a roll.
    """
    from cryodrgn_pipeline.fourier.crop import fourier_crop

    return fourier_crop(images, images.shape[-1], shift_px=shift_px)
