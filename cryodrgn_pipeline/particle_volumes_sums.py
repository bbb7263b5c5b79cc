"""The sums over the images around latent points: one pass for many points.

They are kept per ring of particles and half set, so that a kernel of any width is a combination of them;
those of all particles are kept once for all points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.fourier.padded import Ball, padded_spectrum
from cryodrgn_pipeline.fourier.sizes import PADDING
from cryodrgn_pipeline.fourier.slices import (
    conjugate_flip,
    extract_slices,
    gridding_window,
    slice_coordinates,
    splat_slices,
)
from cryodrgn_pipeline.fourier_images import FourierImages, stream
from cryodrgn_pipeline.particle_volumes_memory import numbers_of
from cryodrgn_pipeline.particle_volumes_rings import Rings
from cryodrgn_pipeline.ranks import ALONE, Ranks
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.images import level_plane, noise_precision
from cryodrgn_pipeline.subspace.poses import PoseOffsets
from cryodrgn_pipeline.subspace.sums import compiled

DATA, WEIGHT, RESIDUAL = 0, 2, 3  # where they lie among the numbers summed up; two are complex


class TargetSums:
    """Running sums `(cells, V, M)` on the padded Fourier points that images reach, for T targets.

    Per target and half set there is a cell for each ring but the outermost. That one is what is left of all
    images: two cells, one per half set, hold their sums for every target. The M numbers are Σ w s c y, real
    and imaginary, Σ w s² c², and, with a model, Σ w s c (y − prediction), real and imaginary.
    """

    def __init__(
        self, box_size_px: int, targets: int, rings: int, *, numbers: int = 5, kernel: str = "auto"
    ) -> None:
        self.ball, self.targets, self.inner, self.kernel = Ball(box_size_px), targets, rings - 1, kernel
        self.sums = torch.zeros(2 * targets * self.inner + 2, self.ball.points, numbers)

    def add(self, images: FourierImages, values: Tensor, ring: Tensor, half: Tensor) -> None:
        """Add B images.

        Parameters
        ----------
        values
            `(B, P, M)` float32 from `image_values`.
        ring, half
            `(B, T)` ring of each image around each target, −1 for none, and `(B,)` its half set, 0 or 1. An
            image stands in a ring of every target or of none.
        """
        first = 2 * self.inner * torch.arange(self.targets)
        own = torch.where((ring < 0) | (ring == self.inner), -1, first + half[:, None] * self.inner + ring)
        everything = torch.where(ring[:, 0] < 0, -1, 2 * self.targets * self.inner + half)
        cell = torch.cat([own, everything[:, None]], dim=1)
        if compiled(self.kernel, self.sums.device):
            from cryodrgn_pipeline.particle_volumes_kernels import splat_cells
            from cryodrgn_pipeline.reconstruct_kernels import balanced_slabs, use_threads

            edges = balanced_slabs(self.ball.size, -(-use_threads(torch.get_num_threads()) // cell.shape[1]))
            arrays = (cell.numpy(), *_geometry(images), values.numpy())
            splat_cells(self.sums.numpy(), self.ball.start.numpy(), edges, *arrays)
            return
        where, inside = _cut(images)
        values = values * inside[..., None]
        for number in range(len(self.sums)):
            rows = (cell == number).any(dim=1)
            for first_part in (0, 3)[: values.shape[2] // 2]:
                pairs = torch.complex(values[rows][..., first_part], values[rows][..., first_part + 1])
                splatted = self.ball.packed(splat_slices(pairs, where[rows], self.ball.size))
                self.sums[number, :, first_part : first_part + 2] += torch.view_as_real(splatted)
            weight = splat_slices(values[rows][..., WEIGHT], where[rows], self.ball.size)
            self.sums[number, :, WEIGHT] += self.ball.packed(weight)

    def around(self, target: int, kernels: Tensor) -> KernelSums:
        """The sums around one target, under kernels `(R, R)` from `Rings.weights`."""
        inner, start = self.inner, 2 * self.inner * target
        cells = [[*range(start + half * inner, start + (half + 1) * inner), half - 2] for half in (0, 1)]
        weights = kernels.clone()
        weights[:, :-1] -= weights[:, -1:]  # the last cell holds the inner rings as well
        return KernelSums(ball=self.ball, halves=[[self.sums[c] for c in half] for half in cells], of=weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSums:
    """The sums around one target: R cells `(V, M)` for each of two halves, and the weight of each cell `(R,)`
    in each of R kernels, from the narrowest to the widest: `of`.
    """

    ball: Ball
    halves: list[list[Tensor]]
    of: Tensor

    @property
    def widths(self) -> int:
        """R, how many kernels there are."""
        return len(self.of)

    @property
    def box_size_px(self) -> int:
        """Side D of the maps."""
        return self.ball.box_size_px

    def weight(self, halves: tuple[int, ...], width: int) -> Tensor:
        """Σ w s² c² of these halves under one kernel, over all frequencies: `(E, E, E/2+1)` float32."""
        return self._grid(halves, self.of[width], WEIGHT)

    def numerator(self, halves: tuple[int, ...], width: int, kind: int) -> Tensor:
        """Σ w s c y (`kind` DATA) or its residual (RESIDUAL), likewise: `(E, E, E/2+1)` complex64."""
        return self._grid(halves, self.of[width], slice(kind, kind + 2))

    def _grid(self, halves: tuple[int, ...], weights: Tensor, numbers: int | slice) -> Tensor:
        total = torch.zeros(self.halves[0][0][:, numbers].shape)
        for half in halves:
            for weight, cell in zip(weights.tolist(), self.halves[half], strict=True):
                if weight:
                    total.add_(cell[:, numbers], alpha=weight)
        grid = self.ball.grid(total if isinstance(numbers, int) else torch.view_as_complex(total))
        grid[..., 0] += conjugate_flip(grid[..., 0])  # what fell on the other half of kx = 0
        return grid


def packed_grids(maps: Iterable[Tensor], count: int, ball: Ball) -> Tensor:
    """So many maps `(D, D, D)` as `predicted` reads them: `(K, V)` complex64, made one at a time."""
    window = gridding_window(ball.box_size_px)
    grids = torch.empty(count, ball.points, dtype=torch.complex64)
    for grid, each in zip(grids, maps, strict=True):
        grid.copy_(ball.packed(padded_spectrum(each / window)))
    return grids


def predicted(
    grids: Tensor, ball: Ball, factors: Tensor, images: FourierImages, *, kernel: str = "auto"
) -> Tensor:
    """Σⱼ factorⱼ · slice of map j, before the CTF: `(B, P)` complex64; 0 beyond |k| = D/2.

    Parameters
    ----------
    grids, factors
        `(K, V)` from `packed_grids`, and `(B, K)`.
    """
    if compiled(kernel, grids.device):
        from cryodrgn_pipeline.particle_volumes_kernels import combine_slices
        from cryodrgn_pipeline.reconstruct_kernels import use_threads

        use_threads(torch.get_num_threads())
        out = torch.empty(len(images), len(images.plane), dtype=torch.complex64)
        arrays = (factors.numpy(), *_geometry(images), out.numpy())
        combine_slices(grids.numpy(), ball.start.numpy(), *arrays)
        return out
    where, inside = _cut(images)
    slices = torch.stack([extract_slices(ball.grid(grid), where) for grid in grids], dim=1)
    return torch.einsum("bk,bkp->bp", factors.to(slices), slices) * inside


def _cut(images: FourierImages) -> tuple[Tensor, Tensor]:
    """Where images cut the transform, `(B, P, 3)`, and whether that is within |k| ≤ D/2, `(B, P)`."""
    where = slice_coordinates(images.plane, images.rotation, images.scale)
    return where, where.norm(dim=-1) <= images.plane.box_size_px / 2


def image_values(
    images: FourierImages, weight: Tensor, contrast: Tensor, prediction: Tensor | None
) -> Tensor:
    """What B images add to the sums: `(B, P, 5)` float32, without a model `(B, P, 3)`.

    Parameters
    ----------
    weight
        `(groups, P)` one over the noise power.
    contrast
        `(B,)` factor on the particle in each image.
    prediction
        `(B, P)` slices of the model's map for each image, before CTF and contrast.
    """
    transfer = images.ctf * contrast[:, None]
    weighted = transfer * weight[images.noise_group]
    data = weighted * images.coefficients
    power = weighted * transfer
    parts = [data.real, data.imag, power]
    if prediction is not None:
        residual = data - power * prediction
        parts += [residual.real, residual.imag]
    return torch.stack(parts, dim=-1).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a model says of N images: `grids` `(K, V)` from `packed_grids`, times `factors` `(N, K)`."""

    grids: Tensor
    factors: Tensor


def accumulate_targets(
    stack: Stack,
    rows: NDArray[np.int64],
    rings: Rings,
    half: NDArray[np.int64],
    contrast: NDArray[np.float32],
    prediction: Prediction | None = None,
    *,
    poses: PoseOffsets | None = None,
    advance: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> TargetSums:
    """One pass over the images that stand in the rings of T targets.

    Parameters
    ----------
    rows
        `(N,)` rows of the stack, ascending.
    half, contrast
        `(N,)` half set and contrast of those rows.
    prediction
        The model's, of those rows; None: only the data are summed up.
    poses
        What corrects the poses of the rows; None: nothing.
    advance
        Called with the number of images done.
    ranks
        Those that share the images; all get the sums of all.
    """
    d = stack.box_size_px
    plane = level_plane(d, d)
    weight, groups = noise_precision(stack.noise, plane, white=False)
    numbers = numbers_of(with_model=prediction is not None)
    sums = TargetSums(d, rings.ring.shape[1], rings.widths, numbers=numbers)
    used = rings.counted[ranks.share(len(rings.counted))]
    ring, side = torch.from_numpy(rings.ring[used]), torch.from_numpy(half[used])
    strength = torch.from_numpy(contrast[used]).float()
    offsets = None if poses is None else poses.of(used)
    for part, images in stream(stack, rows[used], plane, groups):
        images = images if offsets is None else offsets.applied(images, part)
        slices = None
        if prediction is not None:
            factors = prediction.factors[torch.from_numpy(used[part])].contiguous()
            slices = predicted(prediction.grids, sums.ball, factors, images)
        sums.add(images, image_values(images, weight, strength[part], slices), ring[part], side[part])
        if advance is not None:
            advance(len(images))
    ranks.sum_(sums.sums)
    return sums


def _geometry(images: FourierImages) -> tuple[NDArray[Any], ...]:
    return (
        images.rotation.numpy(),
        (images.scale * PADDING).numpy(),
        images.plane.kx.float().numpy(),
        images.plane.ky.float().numpy(),
    )
