"""From the sums around one latent point to its map: kernel widths chosen by the other half, half maps, FSC.

A kernel that is narrow takes few images and their noise, one that is wide takes other states: for each band
of shells that width is taken whose map of one half set predicts the nearest images of the other one best.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cryodrgn_pipeline.fourier.fsc import corrected_fsc
from cryodrgn_pipeline.fourier.masks import particle_mask, raised_cosine
from cryodrgn_pipeline.fourier.slices import complete_splat
from cryodrgn_pipeline.fourier.transforms import rfftn_radius
from cryodrgn_pipeline.reconstruct import density
from cryodrgn_pipeline.subspace.solve import BEYOND, Lattice, solve
from cryodrgn_pipeline.subspace.support import support_mask

BANDS = 4
BLEND_SHELLS = 1.5  # half the width over which neighbouring bands fade into each other
POWER_SHARES = (1.0, 0.2, 0.04, 0.008)  # expected power of the residual, of the map's own
SMALLEST_SIGNAL = 0.01  # of a shell's power: what is expected where the halves do not agree
CG_ITERATIONS = 2

RESIDUAL, DATA = 0, 1  # which of the two numerators


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMap:
    """What particles say about one latent point.

    `density` and `halves`: `(D, D, D)`; `curve` `(D/2+1,)` FSC of the halves; `width` and `residual_width`:
    for each band the number of the kernel of the half maps and of the residual (−1: the model as it is);
    `residual_share`: power of the residual over that of the map.
    """

    density: Tensor
    halves: tuple[Tensor, Tensor]
    curve: Tensor
    width: list[int]
    residual_width: list[int]
    residual_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSums:
    """Kernel sums over all frequencies: `numerators` `(2, E, E, E/2+1)` complex, of the residual and of the
    data, and the `weight` `(E, E, E/2+1)` that belongs to both.
    """

    numerators: Tensor
    weight: Tensor


def kernel_sums(halves: Iterable[Tensor], ring_weights: Tensor) -> KernelSums:
    """The sums of one half set, or of both, under a kernel.

    Parameters
    ----------
    halves
        Each `(R, E, E, E/2+1, 5)` of one target, from `TargetSums`.
    ring_weights
        `(R,)` the kernel at each ring.
    """
    halves = list(halves)
    total = torch.zeros(halves[0].shape[1:])
    for half in halves:
        for weight, ring in zip(ring_weights.tolist(), half, strict=True):
            if weight:
                total.add_(ring, alpha=weight)
    numerators = [torch.complex(total[..., kind], total[..., kind + 1]) for kind in (0, 2)]
    return KernelSums(
        numerators=torch.stack([complete_splat(each) for each in numerators]),
        weight=complete_splat(total[..., 4]),
    )


def band_weights(box_size_px: int, *, smooth: bool) -> Tensor:
    """How much each shell 0 … D/2 belongs to each of the bands, in all 1: `(BANDS, D/2+1)` float64."""
    shells = torch.arange(box_size_px // 2 + 1, dtype=torch.float64)
    inner = [box_size_px / 2 * number / BANDS for number in range(1, BANDS)]
    width = BLEND_SHELLS if smooth else 1e-6
    below = [raised_cosine(shells - edge + width, 2 * width) for edge in inner]
    steps = torch.stack([torch.zeros_like(shells), *below, torch.ones_like(shells)])
    return steps.diff(dim=0)


def signal_power(lattice: Lattice, halves: Tensor) -> Tensor:
    """Power |F|² of the density per shell, `(D/2+1,)` float64, from what both halves' maps share.

    `halves` `(2, D, D, D)`: backprojected, unfiltered.
    """
    one, two = lattice.spectra(halves * lattice.mask)
    shared = lattice.mean_weight((one * two.conj()).real.flatten())
    alone = lattice.mean_weight(((one.abs() ** 2 + two.abs() ** 2) / 2).flatten())
    power = torch.maximum(shared, SMALLEST_SIGNAL * alone).clamp(min=1e-12 * float(alone.max()))
    return power / lattice.mask_fraction


class Judge:
    """Scores maps against the images nearest to a target: −2 log likelihood, less that of no map."""

    def __init__(self, lattice: Lattice, nearest: KernelSums) -> None:
        self.operator = lattice.toeplitz(nearest.weight.flatten()[:, None])[:, 0]
        images = lattice.right_hand_side(nearest.numerators)
        self.images = lattice.spectra(images).flatten(1) / lattice.size**3
        twice = torch.full((lattice.size // 2 + 1,), 2.0)  # the half of the spectrum that is not stored
        twice[0] = twice[-1] = 1
        self.counted = twice.expand(lattice.shape).flatten() * lattice.inside
        self.band = band_weights(lattice.box_size_px, smooth=False).argmax(dim=0)[lattice.shell]

    def scores(self, spectrum: Tensor, kind: int) -> Tensor:
        """Per band, `(BANDS,)` float64, for the padded transform of a map `(G,)` of this kind."""
        power = spectrum.real.square() + spectrum.imag.square()
        shared = spectrum.real * self.images[kind].real + spectrum.imag * self.images[kind].imag
        each = (self.operator * power - 2 * shared) * self.counted
        bands = torch.zeros(BANDS, dtype=torch.float64)
        return bands.index_add_(0, self.band, each.double())


def choose_widths(
    lattice: Lattice, sums: Tensor, kernels: Tensor, priors: Tensor
) -> list[list[tuple[int, int] | None]]:
    """The kernel width and the prior whose map of one half predicts the other half's nearest images best.

    Maps are those of the diagonal approximation within the mask.

    Parameters
    ----------
    sums
        `(2, R, E, E, E/2+1, 5)` of one target.
    kernels
        `(R, R)` from `Rings.weights`.
    priors
        `(L, D/2+1)` expected power per shell, to choose from.

    Returns
    -------
    For the residual and for the data (width, prior) of each band; None where 0 predicts them better.
    """
    ridges = torch.cat([1 / priors, (1 / priors).amax(1, keepdim=True) * BEYOND], dim=1).float()
    shell = torch.where(lattice.inside, lattice.shell, priors.shape[1])
    scores = torch.zeros(2, len(kernels), len(priors), BANDS, dtype=torch.float64)
    for one, other in ((0, 1), (1, 0)):
        judge = Judge(lattice, kernel_sums([sums[other]], kernels[0]))
        for width, kernel in enumerate(kernels):
            seen = kernel_sums([sums[one]], kernel)
            weight = lattice.smoothed(seen.weight.flatten()[:, None])[:, 0].clamp(min=0)
            masked = lattice.right_hand_side(seen.numerators) * lattice.mask
            spectra = lattice.spectra(masked).flatten(1) / lattice.size**3
            for number, ridge in enumerate(ridges):
                gain = 1 / (weight + ridge[shell])
                for kind in (RESIDUAL, DATA):
                    scores[kind, width, number] += judge.scores(spectra[kind] * gain, kind)
    return [[_best(scores[kind, ..., band]) for band in range(BANDS)] for kind in (RESIDUAL, DATA)]


def _best(scores: Tensor) -> tuple[int, int] | None:
    width, number = divmod(int(scores.argmin()), scores.shape[1])
    return (width, number) if float(scores[width, number]) < 0 else None


def blended(parts: dict[int, Tensor], box_size_px: int) -> Tensor:
    """One map `(D, D, D)` of maps that each hold for some of the bands; bands without one are 0."""
    shell = rfftn_radius(box_size_px).round().long().clamp(max=box_size_px // 2)
    weights = band_weights(box_size_px, smooth=True).float()
    total = torch.zeros(box_size_px, box_size_px, box_size_px // 2 + 1, dtype=torch.complex64)
    for band, volume in parts.items():
        total += torch.fft.rfftn(volume) * weights[band][shell]
    result: Tensor = torch.fft.irfftn(total, s=(box_size_px,) * 3)
    return result


def backprojected(seen: KernelSums, box_size_px: int, power: Tensor | None = None) -> Tensor:
    """The data's own map `(D, D, D)`, with a Wiener filter where the power of the density is known."""
    return density(seen.numerators[DATA], seen.weight, box_size_px, None if power is None else 1 / power)


def half_maps(
    sums: Tensor, kernels: Tensor, widths: list[int], power: Tensor, box_size_px: int
) -> tuple[Tensor, Tensor]:
    """Each half set's own map, without the model: kernel-weighted backprojection with a Wiener filter."""
    maps = []
    for half in sums:
        by_width = {}
        for width in set(widths):
            seen = kernel_sums([half], kernels[width])
            by_width[width] = backprojected(seen, box_size_px, power)
        maps.append(blended({band: by_width[width] for band, width in enumerate(widths)}, box_size_px))
    return maps[0], maps[1]


def residual_map(
    lattice: Lattice,
    sums: Tensor,
    kernels: Tensor,
    chosen: list[tuple[int, int] | None],
    priors: Tensor,
) -> Tensor:
    """What the images near a target hold beyond the model, `(D, D, D)`: both halves, exact solve."""
    solved: dict[tuple[int, int], Tensor] = {}
    for choice in {each for each in chosen if each is not None}:
        width, prior = choice
        both = kernel_sums(sums, kernels[width])
        weight = both.weight.flatten()[:, None]
        back = lattice.right_hand_side(both.numerators[RESIDUAL : RESIDUAL + 1])
        found = solve(lattice, back, weight, priors[prior][None], iterations=CG_ITERATIONS)
        solved[choice] = found[0] * lattice.mask
    parts = {band: solved[choice] for band, choice in enumerate(chosen) if choice is not None}
    return blended(parts, lattice.box_size_px)


def state_map(sums: Tensor, kernels: Tensor, model: Tensor) -> StateMap:
    """The map of one target from the sums around it and the model's own map.

    Parameters
    ----------
    sums
        `(2, R, E, E, E/2+1, 5)` from `TargetSums`.
    kernels
        `(R, R)` from `Rings.weights`.
    model
        `(D, D, D)` the model's map at the target.
    """
    lattice, d = Lattice(model.shape[-1]), model.shape[-1]
    widest = torch.stack([backprojected(kernel_sums([half], kernels[-1]), d) for half in sums])
    everything = backprojected(kernel_sums(sums, kernels[-1]), d, signal_power(lattice, widest))
    lattice.mask = torch.maximum(support_mask(everything), support_mask(model))
    power = signal_power(lattice, widest)
    priors = torch.tensor(POWER_SHARES, dtype=torch.float64)[:, None] * power

    chosen, plain = choose_widths(lattice, sums, kernels, priors)
    widths = [len(kernels) - 1 if choice is None else choice[0] for choice in plain]
    halves = half_maps(sums, kernels, widths, power, d)
    mean, noise = (halves[0] + halves[1]) / 2, (halves[0] - halves[1]) / 2
    _, curve = corrected_fsc(*halves, particle_mask(mean, noise=noise))
    residual = residual_map(lattice, sums, kernels, chosen, priors)
    found = model + residual
    return StateMap(
        density=found,
        halves=halves,
        curve=curve,
        width=widths,
        residual_width=[-1 if choice is None else choice[0] for choice in chosen],
        residual_share=float(residual.square().sum() / found.square().sum().clamp(min=1e-30)),
    )
