"""How well particles agree with one another, or with a reference, under one set of conventions.

Two measures, both at low resolution. The half-map FSC says how well maps of disjoint particles agree. And
every particle votes: how well does its image match the projection of a map made *without* it? The votes of
two hypotheses are compared particle by particle, which tells chance from fact with no model of the noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.fourier.fsc import mean_fsc
from cryodrgn_pipeline.fourier.sizes import PADDING
from cryodrgn_pipeline.fourier_images import FourierImages
from cryodrgn_pipeline.reconstruct import SMALLEST_WEIGHT, Backprojection, grid_shells, prior_from_fsc

Points = NDArray[Any]

FOLDS = 4
SPLITS = (([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0, 3], [1, 2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """What to change about the poses as imported: the default changes nothing.

    `shift_factor` multiplies the shifts (0: no shifts); `zoom` is the true pixel size over the one in use.
    """

    transpose: bool = False
    negate: bool = False
    shift_factor: float = 1.0
    mirror: bool = False
    zoom: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The particles that vote.

    `images` are centred by `shift_a` `(N, 2)` Å; `noise_weight` `(G, P)`; `fold` `(N,)` in 0 … 3;
    `box_size_px` of the low-resolution maps and `box_a` their length in Å, the images' own.
    """

    images: FourierImages
    shift_a: Tensor
    noise_weight: Tensor
    fold: Tensor
    box_size_px: int
    box_a: float

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shells(self) -> int:
        """The last shell that is compared."""
        return int(self.images.plane.radius.max())

    def under(self, hypothesis: Hypothesis) -> FourierImages:
        """The images as they would be with the changed conventions."""
        images = self.images
        factor = (-1 if hypothesis.negate else 1) * hypothesis.shift_factor
        rotation, coefficients = images.rotation, images.coefficients
        if hypothesis.transpose:
            rotation = rotation.transpose(1, 2).contiguous()
        if hypothesis.mirror:
            rotation = rotation * torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]])
        if factor != 1:
            # the image's own length in Å decides what a shift in Å does to its frequencies
            move = (factor - 1) * self.shift_a / self.box_a * images.scale[:, None]
            plane = images.plane
            phase = -2 * torch.pi * (move[:, :1] * plane.kx + move[:, 1:] * plane.ky)
            coefficients = coefficients * torch.polar(torch.ones_like(phase), phase)
        scale = images.scale if hypothesis.zoom == 1 else images.scale / hypothesis.zoom
        return replace(images, rotation=rotation, coefficients=coefficients, scale=scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """`votes` `(N,)`: match of each particle; `mean_fsc` of half maps, NaN where none were made.

    `sign` is −1 where the votes were counted for inverted contrast.
    """

    votes: NDArray[np.float64]
    mean_fsc: float
    sign: float = 1.0

    @property
    def match(self) -> float:
        """Mean vote."""
        return float(self.votes.mean())

    @property
    def signal(self) -> float:
        """Standard errors by which the mean vote exceeds 0."""
        return _standard_errors(self.votes)

    def times(self, sign: float) -> Score:
        """The same votes counted for one sign of contrast."""
        return replace(self, votes=sign * self.votes, sign=sign)


def votes(images: FourierImages, grids: Tensor, source: Tensor, noise_weight: Tensor) -> NDArray[np.float64]:
    """Normalised correlation of each image with the CTF-filtered slice of `grids[source]`: `(B,)`.

    Under noise alone it is a number of mean 0 whose spread does not depend on the map. `grids` is
    `(S, E, E, E/2+1)` complex64.
    """
    from cryodrgn_pipeline.reconstruct_kernels import correlate, use_threads

    use_threads(torch.get_num_threads())
    result = np.empty(len(images))
    correlate(
        grids.numpy(),
        source.numpy(),
        images.rotation.numpy(),
        (images.scale * PADDING).numpy(),
        images.plane.kx.float().numpy(),
        images.plane.ky.float().numpy(),
        images.coefficients.numpy(),
        images.ctf.numpy(),
        noise_weight.numpy(),
        images.noise_group.numpy(),
        result,
    )
    return result


def backproject(evidence: Evidence, images: FourierImages) -> Backprojection:
    """Sums of the four folds, of the evidence's images under some hypothesis."""
    sums = Backprojection(evidence.box_size_px, FOLDS)
    sums.add(images, evidence.fold, evidence.noise_weight)
    return sums


class Ball:
    """The padded grid's points within the compared shells: sums over them need no transform of a map."""

    def __init__(self, evidence: Evidence) -> None:
        size = PADDING * evidence.box_size_px
        radius = grid_shells(size).numpy().ravel()
        self.at = np.flatnonzero(radius <= evidence.shells + 0.5)
        self.shell = np.rint(radius[self.at]).astype(np.int64)
        self.count = int(self.shell.max()) + 1
        self.shape = (size, size, size // 2 + 1)
        # k and −k both stand in the plane kx = 0
        self.terms = np.where(self.at % (size // 2 + 1) == 0, 1.0, 2.0)

    def of(self, sums: Backprojection) -> tuple[Points, Points]:
        """Numerators `(4, n)` complex and weights `(4, n)` of the folds at the points."""
        fields = [(sums.numerator(fold).numpy(), sums.weight(fold).numpy()) for fold in range(FOLDS)]
        numerator = np.stack([field.ravel()[self.at] for field, _ in fields])
        return numerator, np.stack([field.ravel()[self.at] for _, field in fields])

    def per_shell(self, values: Points) -> Points:
        """Sum over each shell: `(shells,)`."""
        return np.bincount(self.shell, values * self.terms, self.count)

    def grid(self, values: Points) -> Tensor:
        """The padded grid with these values and 0 elsewhere: `(E, E, E/2+1)` complex64."""
        grid = np.zeros(self.shape, dtype=np.complex64)
        grid.ravel()[self.at] = values
        return torch.from_numpy(grid)

    def half_map_fsc(self, numerator: Points, weight: Points) -> Points:
        """FSC of the two halves of each split, averaged over the splits: `(shells,)`."""
        mean = self.per_shell(weight.sum(axis=0)) / self.per_shell(np.ones(len(self.at)))
        floor = SMALLEST_WEIGHT * mean[self.shell] + 1e-30
        curves = []
        for split in SPLITS:
            first, second = (
                numerator[side].sum(axis=0) / (weight[side].sum(axis=0) + floor) for side in split
            )
            power = self.per_shell(np.abs(first) ** 2) * self.per_shell(np.abs(second) ** 2)
            cross = self.per_shell((first * second.conj()).real)
            curves.append(cross / np.sqrt(np.maximum(power, 1e-300)))
        mean_curve: Points = np.mean(curves, axis=0)
        return mean_curve


def score_by_halves(evidence: Evidence, hypothesis: Hypothesis, ball: Ball) -> Score:
    """Half-map FSC under a hypothesis, and each particle's vote for the map of the other folds."""
    images = evidence.under(hypothesis)
    numerator, weight = ball.of(backproject(evidence, images))
    curve = torch.from_numpy(ball.half_map_fsc(numerator, weight))
    whole = weight.sum(axis=0)
    mean_weight = ball.per_shell(whole) / ball.per_shell(np.ones_like(whole))
    prior = prior_from_fsc(curve, torch.from_numpy(mean_weight)).numpy()[ball.shell]
    grids = []
    for fold in range(FOLDS):
        of_others = (numerator.sum(axis=0) - numerator[fold]) / (whole - weight[fold] + prior + 1e-30)
        grids.append(ball.grid(of_others))
    return Score(
        votes=votes(images, torch.stack(grids), evidence.fold, evidence.noise_weight),
        mean_fsc=mean_fsc(curve, min(evidence.shells, len(curve) - 1)),
    )


def score_by_reference(evidence: Evidence, hypothesis: Hypothesis, grid: Tensor) -> Score:
    """Votes for a reference map, given as the grid of its density on the low-resolution box."""
    images = evidence.under(hypothesis)
    source = torch.zeros(len(images), dtype=torch.int64)
    return Score(votes=votes(images, grid[None], source, evidence.noise_weight), mean_fsc=float("nan"))


def advantage(alternative: Score, current: Score) -> float:
    """By how many standard errors the alternative's votes are better, particle by particle."""
    return _standard_errors(alternative.votes - current.votes)


def _standard_errors(values: NDArray[np.float64]) -> float:
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return float(values.mean()) * len(values) ** 0.5 / spread if spread > 0 else 0.0
