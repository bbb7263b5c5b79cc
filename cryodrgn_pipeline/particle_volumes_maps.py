"""From the sums around one latent point to its map, its half maps and their FSC.

At large boxes an array of the padded grid is what memory is made of: they are made one after the other, and
what is kept of them are maps of the box.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryodrgn_pipeline.fourier.fsc import corrected_fsc
from cryodrgn_pipeline.fourier.masks import particle_mask
from cryodrgn_pipeline.fourier.padded import (
    central_box,
    padded_spectrum,
    shell_means,
    slab_radius,
    slabs,
    splatting_window,
    unpadded_shells,
    windowed,
    windowed_unpadded,
)
from cryodrgn_pipeline.fourier.slices import gridding_window
from cryodrgn_pipeline.particle_volumes_sums import DATA, RESIDUAL, KernelSums
from cryodrgn_pipeline.particle_volumes_widths import (
    POWER_SHARES,
    Choice,
    Support,
    blended,
    choose_widths,
    right_hand_side,
    signal_power,
)
from cryodrgn_pipeline.reconstruct import SMALLEST_WEIGHT
from cryodrgn_pipeline.subspace.solve import BEYOND
from cryodrgn_pipeline.subspace.support import support_mask

CG_ITERATIONS = 2
BOTH = (0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMap:
    """What particles say about one latent point.

    `density` and `halves`: `(D, D, D)`, the latter None where they are not asked for; `width` and
    `residual_width`: for each band the number of the kernel of the half maps and of the residual (−1: the
    model as it is); `residual_share`: power of the residual over that of the map.
    """

    density: Tensor
    halves: tuple[Tensor, Tensor] | None
    width: list[int]
    residual_width: list[int]
    residual_share: float


def backprojected(
    sums: KernelSums, halves: tuple[int, ...], width: int, power: Tensor | None = None
) -> Tensor:
    """The data's own map `(D, D, D)`, with a Wiener filter where the power of the density is known."""
    d, size = sums.box_size_px, sums.ball.size
    weight = sums.weight(halves, width)
    floor = SMALLEST_WEIGHT * shell_means(d, weight.__getitem__) if power is None else 1 / power
    floor = floor.clamp(min=float(weight.max()) * 1e-9 + 1e-30).float()
    spectrum = sums.numerator(halves, width, DATA)
    for part in slabs(spectrum.shape, 0):
        radius = slab_radius(size, part)
        shell = radius.round().long().clamp(max=d // 2)
        spectrum[part] *= (radius < d / 2) / (weight[part] + floor[shell])
    return central_box(spectrum) / size**3 / gridding_window(d)


def half_map(sums: KernelSums, half: tuple[int, ...], widths: list[int], power: Tensor) -> Tensor:
    """A map without the model: kernel-weighted backprojection with a Wiener filter, a width for each band."""
    by_width = {width: backprojected(sums, half, width, power) for width in set(widths)}
    return blended({band: by_width[width] for band, width in enumerate(widths)}, sums.box_size_px)


def fsc_of_halves(halves: tuple[Tensor, Tensor]) -> Tensor:
    """Their FSC under a soft mask around what they show, freed from what the mask correlates: `(D/2+1,)`."""
    mean, noise = (halves[0] + halves[1]) / 2, (halves[0] - halves[1]) / 2
    _, curve = corrected_fsc(*halves, particle_mask(mean, noise=noise))
    return curve


def support_and_power(sums: KernelSums, model: Tensor | None) -> tuple[Support, Tensor]:
    """A soft mask around the density near a target, and the power of this per shell `(D/2+1,)`."""
    widest, d = sums.widths - 1, sums.box_size_px
    unfiltered = torch.stack([backprojected(sums, (half,), widest) for half in BOTH])
    power = signal_power(unfiltered, torch.ones(d, d, d))
    mask = support_mask(backprojected(sums, BOTH, widest, power))
    if model is not None:
        mask = torch.maximum(mask, support_mask(model))
    return Support.of(mask), signal_power(unfiltered, mask)


def solved(sums: KernelSums, width: int, support: Support, prior: Tensor) -> Tensor:
    """What all images under a kernel hold beyond the model: the exact normal equations within the mask.

    As `subspace.solve.solve` for a single map.

    Parameters
    ----------
    prior
        `(D/2+1,)` expected power |F|² per coefficient of the padded transform.

    Returns
    -------
    `(D, D, D)`.
    """
    d, size, mask = sums.box_size_px, sums.ball.size, support.mask
    ridge = torch.cat([1 / prior, (1 / prior).amax()[None] * BEYOND]).float()
    shell, inside = unpadded_shells(d)
    target = right_hand_side(sums, BOTH, width, RESIDUAL) * mask
    weight = sums.weight(BOTH, width)
    blocks = windowed_unpadded(weight, support.overlap)
    inverse = 1 / (blocks.clamp(min=0) + ridge[torch.where(inside, shell, d // 2 + 1)])
    operator = windowed(weight, splatting_window(size))
    del weight, blocks
    for part in slabs(operator.shape, 0):
        radius = slab_radius(size, part)
        at = torch.where(radius <= d / 2, radius.round().long().clamp(max=d // 2), d // 2 + 1)
        operator[part] += ridge[at]

    def preconditioned(volume: Tensor) -> Tensor:
        product = torch.fft.rfftn(volume * mask) * inverse
        result: Tensor = torch.fft.irfftn(product, s=(d,) * 3) * mask / size**3
        return result

    def applied(volume: Tensor) -> Tensor:
        spectrum = padded_spectrum(volume * mask)
        spectrum *= operator
        return central_box(spectrum) * mask

    x = preconditioned(target)
    residual = target - applied(x)
    direction = z = preconditioned(residual)
    rz = _dot(residual, z)
    for iteration in range(CG_ITERATIONS):
        image = applied(direction)
        curvature = _dot(direction, image)
        if not curvature > 0 or not rz > 0:
            break  # rounding has the last word: converged
        x = x + rz / curvature * direction
        if iteration + 1 < CG_ITERATIONS:
            residual = residual - rz / curvature * image
            z = preconditioned(residual)
            rz, former = _dot(residual, z), rz
            direction = z + rz / former * direction
    return x * mask


def half_state(sums: KernelSums) -> tuple[Tensor, list[int]]:
    """The map of one half set `(D, D, D)` and the kernel of each band: its own two halves choose it."""
    support, power = support_and_power(sums, None)
    choices = choose_widths(sums, support, power, (DATA,))
    widths = widths_of(choices[DATA], sums)
    return half_map(sums, BOTH, widths, power), widths


def state_map(sums: KernelSums, model: Tensor, *, with_halves: bool) -> StateMap:
    """The map of one target from the sums around it and the model's own map `(D, D, D)`."""
    support, power = support_and_power(sums, model)
    choices = choose_widths(sums, support, power, (RESIDUAL, DATA) if with_halves else (RESIDUAL,))
    halves, widths = None, []
    if with_halves:
        widths = widths_of(choices[DATA], sums)
        halves = half_map(sums, (0,), widths, power), half_map(sums, (1,), widths, power)
    chosen = choices[RESIDUAL]
    by_choice = {
        each: solved(sums, each[0], support, POWER_SHARES[each[1]] * power)
        for each in chosen
        if each is not None
    }
    parts = {band: by_choice[choice] for band, choice in enumerate(chosen) if choice is not None}
    residual = blended(parts, sums.box_size_px)
    found = model + residual
    return StateMap(
        density=found,
        halves=halves,
        width=widths,
        residual_width=[-1 if choice is None else choice[0] for choice in chosen],
        residual_share=float(residual.square().sum() / found.square().sum().clamp(min=1e-30)),
    )


def widths_of(choices: list[Choice], sums: KernelSums) -> list[int]:
    """The chosen kernel of each band; the widest where none predicts the other half."""
    return [sums.widths - 1 if choice is None else choice[0] for choice in choices]


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())
