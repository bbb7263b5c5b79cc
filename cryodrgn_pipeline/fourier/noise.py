"""Radial noise spectra from the part of the images where there is no particle.

All powers are those of the unnormalised Fourier coefficients of a whole box, |F|² per coefficient: white
noise of variance σ² per pixel has σ² D². Nyquist rows and columns, which a crop averages, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from cryodrgn_pipeline.fourier.window import soft_disc

OUTSIDE_RADIUS = 0.9  # of D/2; the weight rises to 1 at D/2
EMPTY_BELOW = 1e-4  # of the whole image's variance: an outside this quiet was masked away
MOSTLY = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSpectrum:
    """What one optics group's images say about their noise.

    `noise_power`, `total_power`: `(D/2+1,)` float64 by shell. `source` is `outside` (estimated beyond the
    particle) or `total` (the outside is empty, so the total power stands in, which includes the signal).
    `background_mean`, `background_std`: real space, outside the particle.
    """

    noise_power: Tensor
    total_power: Tensor
    source: Literal["outside", "total"]
    n_images: int
    background_mean: float
    background_std: float


def shell_means(power: Tensor) -> Tensor:
    """Mean over each shell round(|k|) = 0 … D/2 of a `(D, D/2+1)` half-plane power: `(D/2+1,)` float64."""
    d = power.shape[0]
    half = d // 2
    ky = torch.fft.fftfreq(d, 1 / d)
    kx = torch.arange(half + 1)
    shell = torch.hypot(ky[:, None], kx[None, :].float()).round().long().clamp(max=half + 1)
    weight = torch.full((d, half + 1), 2.0, dtype=torch.float64)  # k and −k
    weight[:, 0] = 1
    weight[half] = weight[:, half] = 0
    total = torch.zeros(half + 2, dtype=torch.float64)
    count = torch.zeros(half + 2, dtype=torch.float64)
    total.index_add_(0, shell.flatten(), (weight * power.double()).flatten())
    count.index_add_(0, shell.flatten(), weight.flatten())
    return (total / count.clamp(min=1))[: half + 1]


class NoiseEstimate:
    """Adds up images of one optics group; partial estimates of several threads can be merged."""

    def __init__(self, box_size_px: int) -> None:
        """Start for images of an even box of `box_size_px`."""
        d = box_size_px
        self._outside = torch.zeros(d, d // 2 + 1, dtype=torch.float64)
        self._total = torch.zeros(d, d // 2 + 1, dtype=torch.float64)
        self._images = self._with_outside = 0
        self._mean_sum = self._variance_sum = 0.0

    def add(self, images: Tensor, spectrum: Tensor) -> None:
        """Count `(B, D, D)` images that are not windowed yet, and their `(B, D, D/2+1)` transform.

        Each image's own background level is taken off first: it is no noise, and would leak into the
        lowest shells through the mask.
        """
        d = images.shape[-1]
        weight = _outside_weight(d)
        self._images += len(images)
        self._total += _power(spectrum)
        mean = images.flatten(1) @ weight.flatten() / weight.sum()
        outside = torch.addcmul(-mean[:, None, None] * weight, images, weight)
        variance = _squares(outside) / weight.square().sum()
        alive = variance > EMPTY_BELOW * (_squares(images) / d**2 - (spectrum[:, 0, 0].real / d**2) ** 2)
        if bool(alive.any()):
            self._outside += _power(torch.fft.rfft2(outside if bool(alive.all()) else outside[alive]))
            self._with_outside += int(alive.sum())
            self._mean_sum += float(mean[alive].double().sum())
            self._variance_sum += float(variance[alive].double().sum())

    def merge(self, other: NoiseEstimate) -> None:
        """Take over what another estimate of the same group and box has added up."""
        self._outside += other._outside
        self._total += other._total
        self._images += other._images
        self._with_outside += other._with_outside
        self._mean_sum += other._mean_sum
        self._variance_sum += other._variance_sum

    def result(self) -> NoiseSpectrum:
        """The spectra of all images added so far; an estimate without images is an error."""
        if self._images == 0:
            raise ValueError("a noise spectrum needs at least one image")
        total = shell_means(self._total / self._images)
        n = max(self._with_outside, 1)
        outside_counts = self._with_outside > MOSTLY * self._images
        noise = total
        if outside_counts:
            noise = shell_means(self._outside / n) / shell_means(_share_kept(2 * (len(total) - 1)))
            noise[0] = noise[1]  # the background level was taken off, so shell 0 holds nothing of its own
        return NoiseSpectrum(
            noise_power=noise,
            total_power=total,
            source="outside" if outside_counts else "total",
            n_images=self._images,
            background_mean=self._mean_sum / n,
            background_std=(self._variance_sum / n) ** 0.5,
        )


@lru_cache(maxsize=4)
def _outside_weight(box_size_px: int) -> Tensor:
    half = box_size_px / 2
    return 1 - soft_disc(box_size_px, OUTSIDE_RADIUS * half, (1 - OUTSIDE_RADIUS) * half)


@lru_cache(maxsize=4)
def _share_kept(box_size_px: int) -> Tensor:
    """E|F|² of white noise after the level is taken off and the weight multiplied on, over that before.

    The outside m (x − Σ q x) with q = m / Σ m is linear in the pixels x. A coefficient of it has the
    variance Σ m² − 2 Re(M* T) + |M|² Σ q², where M and T are the transforms of m and m q.
    """
    weight = _outside_weight(box_size_px).double()
    mean_weight = weight / weight.sum()
    spread, overlap = torch.fft.rfft2(weight), torch.fft.rfft2(weight * mean_weight)
    kept = weight.square().sum() - 2 * (spread.conj() * overlap).real
    share: Tensor = (kept + spread.abs().square() * mean_weight.square().sum()) / box_size_px**2
    return share


def _squares(images: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norm.square()


def _power(spectrum: Tensor) -> Tensor:
    return torch.view_as_real(spectrum).square().sum(0).sum(-1).double()
