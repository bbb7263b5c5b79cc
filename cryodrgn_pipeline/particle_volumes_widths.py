"""How wide a kernel to take around a latent point, per band of frequencies.

A kernel that is narrow takes few images and their noise, one that is wide takes other states: for each band
of shells that width and that prior are taken whose map of one half predicts the nearest images of the other
half best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryodrgn_pipeline.fourier.masks import raised_cosine
from cryodrgn_pipeline.fourier.padded import (
    Ball,
    Window,
    central_box,
    overlap_window,
    padded_spectrum,
    shell_means,
    slab_radius,
    slabs,
    splatting_window,
    unpadded_shells,
    windowed,
)
from cryodrgn_pipeline.fourier.sizes import PADDING
from cryodrgn_pipeline.fourier.slices import gridding_window
from cryodrgn_pipeline.particle_volumes_sums import KernelSums
from cryodrgn_pipeline.subspace.solve import BEYOND

BANDS = 4
BLEND_SHELLS = 1.5  # half the width over which neighbouring bands fade into each other
SMALLEST_SIGNAL = 0.01  # of a shell's power: what is expected where the halves do not agree

POWER_SHARES = (1.0, 0.2, 0.04, 0.008)  # expected power of what is solved for, of the density's own

Choice = (
    tuple[int, int] | None
)  # width and prior, a number of POWER_SHARES; None where no map predicts the other half better


def band_weights(box_size_px: int, *, smooth: bool) -> Tensor:
    """How much each shell 0 … D/2 belongs to each of the bands, in all 1: `(BANDS, D/2+1)` float64."""
    shells = torch.arange(box_size_px // 2 + 1, dtype=torch.float64)
    inner = [box_size_px / 2 * number / BANDS for number in range(1, BANDS)]
    width = BLEND_SHELLS if smooth else 1e-6
    below = [raised_cosine(shells - edge + width, 2 * width) for edge in inner]
    steps = torch.stack([torch.zeros_like(shells), *below, torch.ones_like(shells)])
    return steps.diff(dim=0)


def blended(parts: dict[int, Tensor], box_size_px: int) -> Tensor:
    """One map `(D, D, D)` of maps that each hold for some of the bands; bands without one are 0."""
    if len(parts) == BANDS and all(part is parts[0] for part in parts.values()):
        return parts[0]
    shell, _ = unpadded_shells(box_size_px)
    weights = band_weights(box_size_px, smooth=True).float()
    total = torch.zeros(box_size_px, box_size_px, box_size_px // 2 + 1, dtype=torch.complex64)
    for volume in {id(part): part for part in parts.values()}.values():
        share = weights[[band for band, part in parts.items() if part is volume]].sum(0)
        total += torch.fft.rfftn(volume) * share[shell]
    result: Tensor = torch.fft.irfftn(total, s=(box_size_px,) * 3)
    return result


def signal_power(halves: Tensor, mask: Tensor) -> Tensor:
    """Power |F|² of the density per shell, `(D/2+1,)` float64, from what the maps of both halves share.

    Parameters
    ----------
    halves, mask
        `(2, D, D, D)`, backprojected and unfiltered, and `(D, D, D)`.
    """
    d = len(mask)
    one, two = (padded_spectrum(half * mask) for half in halves)
    shared = shell_means(d, lambda part: (one[part] * two[part].conj()).real)
    alone = shell_means(d, lambda part: (one[part].abs() ** 2 + two[part].abs() ** 2) / 2)
    power = torch.maximum(shared, SMALLEST_SIGNAL * alone).clamp(min=1e-12 * float(alone.max()))
    return power * (PADDING * d) ** 3 / float(mask.square().sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Where density may be: a soft `mask` `(D, D, D)` and the window that is its autocorrelation."""

    mask: Tensor
    overlap: Window

    @classmethod
    def of(cls, mask: Tensor) -> Support:
        """That of a mask."""
        return cls(mask=mask, overlap=overlap_window(mask))


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Of the V points of a ball: the `ridge` (one over the expected power; enormous beyond the last shell),
    the `band`, and how often each stands in the whole spectrum (0 beyond the last shell): `counted`.
    """

    ridge: Tensor
    band: Tensor
    counted: Tensor

    @classmethod
    def of(cls, ball: Ball, power: Tensor) -> Points:
        """Where the expected power per shell is `(D/2+1,)`."""
        d, size = ball.box_size_px, ball.size
        radius = ball.packed(slab_radius(size, slice(0, size)))
        shell, inside = radius.round().long().clamp_(max=d // 2), radius <= d / 2
        ridge = (1 / power).float()
        twice = torch.full((size // 2 + 1,), 2.0)  # the half of the spectrum that is not stored
        twice[0] = twice[-1] = 1
        band = band_weights(d, smooth=False).argmax(dim=0)  # a shell on the edge of two belongs to one
        return cls(
            ridge=torch.where(inside, ridge[shell], BEYOND * ridge.max()),
            band=band.to(torch.uint8)[shell],
            counted=ball.packed(twice.expand(size, size, -1)) * inside,
        )


class Judge:
    """Scores maps against the images of one half that are nearest to a target.

    −2 log likelihood, less that of no map: Σ operator |F|² − 2 Re F* images over the padded spectrum.
    """

    def __init__(self, sums: KernelSums, half: int, points: Points, kinds: tuple[int, ...]) -> None:
        ball, self.points = sums.ball, points
        self.operator = ball.packed(windowed(sums.weight((half,), 0), splatting_window(ball.size)))
        self.images = {
            kind: ball.packed(padded_spectrum(right_hand_side(sums, (half,), 0, kind) / ball.size**3))
            for kind in kinds
        }

    def scores(self, spectrum: Tensor, weight: Tensor, kind: int) -> Tensor:
        """Of the maps `spectrum` / (`weight` + ridge), by prior and band: `(priors, BANDS)` float64.

        Parameters
        ----------
        spectrum, weight
            `(V,)` complex and real.
        """
        scores = torch.zeros(len(POWER_SHARES), BANDS, dtype=torch.float64)
        for part in slabs(weight.shape, 0):
            seen, images, counted = spectrum[part], self.images[kind][part], self.points.counted[part]
            power = self.operator[part] * (seen.real.square() + seen.imag.square()) * counted
            shared = 2 * (seen.real * images.real + seen.imag * images.imag) * counted
            for number, share in enumerate(POWER_SHARES):
                gain = 1 / (weight[part] + self.points.ridge[part] / share)
                each = (power * gain - shared) * gain
                scores[number] += torch.bincount(self.points.band[part], each.double(), minlength=BANDS)
        return scores


def choose_widths(
    sums: KernelSums, support: Support, power: Tensor, kinds: tuple[int, ...]
) -> dict[int, list[Choice]]:
    """The kernel width and the prior whose map of one half predicts the other half's nearest images best.

    Maps are those of the diagonal approximation within the mask.

    Parameters
    ----------
    power
        `(D/2+1,)` of the density per shell, of which the priors are shares.
    kinds
        RESIDUAL, DATA or both.

    Returns
    -------
    For each kind the choice of each band.
    """
    ball = sums.ball
    points = Points.of(ball, power)
    scores = {kind: torch.zeros(sums.widths, len(POWER_SHARES), BANDS).double() for kind in kinds}
    for one, other in ((0, 1), (1, 0)):
        judge = Judge(sums, other, points, kinds)
        for width in range(sums.widths):
            weight = ball.packed(windowed(sums.weight((one,), width), support.overlap)).clamp_(min=0)
            for kind in kinds:
                back = right_hand_side(sums, (one,), width, kind) * support.mask
                spectrum = ball.packed(padded_spectrum(back / ball.size**3))
                scores[kind][width] += judge.scores(spectrum, weight, kind)
        del judge  # before the other half's is made
    return {kind: [_best(scores[kind][..., band]) for band in range(BANDS)] for kind in kinds}


def right_hand_side(sums: KernelSums, halves: tuple[int, ...], width: int, kind: int) -> Tensor:
    """What the sums of these halves under one kernel say about the voxels: `(D, D, D)`."""
    return central_box(sums.numerator(halves, width, kind)) / gridding_window(sums.box_size_px)


def _best(scores: Tensor) -> Choice:
    width, number = divmod(int(scores.argmin()), scores.shape[1])
    return (width, number) if float(scores[width, number]) < 0 else None
