"""Which particles speak for a latent point, and the sums over their images: one pass for many points.

Particles are ranked by their distance from each target in the metric of their own posterior and dealt to
rings. Sums are kept per ring and half set, so that a kernel of any width is a combination of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.fourier.slices import PADDING, extract_slices, slice_coordinates, splat_slices
from cryodrgn_pipeline.fourier_images import FourierImages, stream
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.images import level_plane, noise_precision
from cryodrgn_pipeline.subspace.poses import PoseOffsets
from cryodrgn_pipeline.subspace.sums import compiled

Array = NDArray[np.float64]

SHARES = (1 / 50, 1 / 15, 1 / 4, 1.0)  # of the particles, in kernels from the narrowest to the widest
SMALLEST_RING = 50
METRIC_RIDGE = 0.01  # of the latent's covariance, added to each posterior: no particle is known exactly
KINDS = 5  # residual (re, im), data (re, im), weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Rings:
    """N particles around T targets, in R rings by distance.

    `ring` `(N, T)` int64, −1 for none; `size` `(T, R)` particles; `squared` `(T, R)` their mean squared
    distance; `edge` `(T, R)` distance of the outermost one: the kernel widths that there are.
    """

    ring: NDArray[np.int64]
    size: Array
    squared: Array
    edge: Array

    @property
    def widths(self) -> int:
        """R, the number of rings and of kernel widths."""
        return int(self.edge.shape[1])

    def weights(self, target: int) -> Tensor:
        """`(R, R)` float64: the Epanechnikov kernel of each width (row) at each ring, 1 at the innermost."""
        edge = np.maximum(self.edge[target], 1e-30)[:, None]
        kernel = np.clip(1 - self.squared[target][None] / edge**2, 1e-3, None)
        kernel = np.tril(kernel / kernel[:, :1])
        return torch.from_numpy(kernel)

    def n_effective(self, target: int) -> Array:
        """`(R,)` (Σ w)² / Σ w² of the kernel of each width."""
        weights = self.weights(target).numpy()
        counted = weights * self.size[target]
        effective: Array = counted.sum(1) ** 2 / (counted * weights).sum(1)
        return effective


def squared_distances(z: Array, covariance: Array, targets: Array) -> Array:
    """(zᵢ − z₀)ᵀ (Cᵢ + 0.01 Cov(z))⁻¹ (zᵢ − z₀) of N particles from T targets: `(N, T)`.

    Parameters
    ----------
    z, covariance
        `(N, J)` and `(N, J, J)` posterior means and covariances. Coordinates that are the same in all
        particles say nothing and are left out.
    targets
        `(T, J)`.
    """
    varies = z.var(axis=0) > 1e-12
    if not varies.any():
        return np.zeros((len(z), len(targets)))
    z, targets = z[:, varies], targets[:, varies]
    metric = covariance[:, varies][:, :, varies] + METRIC_RIDGE * np.atleast_2d(np.cov(z.T))
    precision = np.linalg.inv(metric)
    away = [z - target for target in targets]
    return np.stack([np.einsum("nj,njk,nk->n", d, precision, d) for d in away], axis=1)


def rings_of(squared: Array, shares: tuple[float, ...] = SHARES) -> Rings:
    """Deal particles at squared distances `(N, T)` from the targets to rings that hold these shares of them.

    Particles at an infinite distance belong to none. Rings of fewer than 50 particles are not made.
    """
    ring = np.full(squared.shape, -1, dtype=np.int64)
    counts = np.isfinite(squared).sum(axis=0)
    ends = {max(round(share * int(counts.min())), min(SMALLEST_RING, int(counts.min()))) for share in shares}
    edges, means, sizes = [], [], []
    for target, column in enumerate(squared.T):
        order = np.argsort(column, kind="stable")[: counts[target]]
        stops = [*sorted(ends)[:-1], len(order)]
        parts = [order[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
        for number, part in enumerate(parts):
            ring[part, target] = number
        sizes.append([len(part) for part in parts])
        means.append([column[part].mean() for part in parts])
        edges.append([np.sqrt(column[part[-1]]) for part in parts])
    return Rings(ring=ring, size=np.array(sizes, float), squared=np.array(means), edge=np.array(edges))


class TargetSums:
    """Running sums on padded Fourier grids `(T, 2, R, E, E, E/2+1, 5)`: per target, half set and ring.

    The five are Σ w s c (y − prediction), real and imaginary, Σ w s c y, real and imaginary, and Σ w s² c².
    """

    def __init__(self, box_size_px: int, targets: int, rings: int, *, kernel: str = "auto") -> None:
        self.box_size_px, self.size, self.kernel = box_size_px, PADDING * box_size_px, kernel
        grid = (self.size, self.size, self.size // 2 + 1)
        self.sums = torch.zeros(targets, 2, rings, *grid, KINDS)

    def add(self, images: FourierImages, values: Tensor, ring: Tensor, half: Tensor) -> None:
        """Add B images.

        Parameters
        ----------
        values
            `(B, P, 5)` float32 from `image_values`.
        ring, half
            `(B, T)` ring of each image around each target, −1 for none, and `(B,)` its half set, 0 or 1.
        """
        rings = self.sums.shape[2]
        cell = torch.where(ring < 0, -1, half[:, None] * rings + ring)
        grids = self.sums.flatten(1, 2)
        if compiled(self.kernel, self.sums.device):
            from cryodrgn_pipeline.particle_volumes_kernels import splat_cells
            from cryodrgn_pipeline.reconstruct_kernels import balanced_slabs, use_threads

            slabs = balanced_slabs(self.size, -(-use_threads(torch.get_num_threads()) // len(grids)))
            arrays = (cell.numpy(), *_geometry(images), values.numpy())
            splat_cells(grids.numpy(), slabs, *arrays)
            return
        where = slice_coordinates(images.plane, images.rotation, images.scale)
        for target, number in torch.cartesian_prod(torch.arange(len(grids)), torch.arange(2 * rings)):
            rows = cell[:, target] == number
            grid, seen = grids[target, number], values[rows]
            for first in (0, 2):
                pairs = torch.complex(seen[..., first], seen[..., first + 1])
                grid[..., first : first + 2] += torch.view_as_real(
                    splat_slices(pairs, where[rows], self.size)
                )
            grid[..., 4] += splat_slices(seen[..., 4], where[rows], self.size)


def predicted(grids: Tensor, factors: Tensor, images: FourierImages, *, kernel: str = "auto") -> Tensor:
    """Σⱼ factorⱼ · slice of map j, before the CTF: `(B, P)` complex64.

    Parameters
    ----------
    grids, factors
        `(K, E, E, E/2+1)` from `volume_grid`, and `(B, K)`.
    """
    if compiled(kernel, grids.device):
        from cryodrgn_pipeline.particle_volumes_kernels import combine_slices
        from cryodrgn_pipeline.reconstruct_kernels import use_threads

        use_threads(torch.get_num_threads())
        out = torch.empty(len(images), len(images.plane), dtype=torch.complex64)
        arrays = (factors.numpy(), *_geometry(images), out.numpy())
        combine_slices(grids.numpy(), *arrays)
        return out
    where = slice_coordinates(images.plane, images.rotation, images.scale)
    slices = torch.stack([extract_slices(grid, where) for grid in grids], dim=1)
    return torch.einsum("bk,bkp->bp", factors.to(slices), slices)


def image_values(images: FourierImages, weight: Tensor, contrast: Tensor, prediction: Tensor) -> Tensor:
    """What B images add to the sums: `(B, P, 5)` float32.

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
    residual = data - power * prediction
    parts = (residual.real, residual.imag, data.real, data.imag, power)
    return torch.stack(parts, dim=-1).contiguous()


def accumulate_targets(
    stack: Stack,
    rows: NDArray[np.int64],
    rings: NDArray[np.int64],
    half: NDArray[np.int64],
    contrast: NDArray[np.float32],
    grids: Tensor,
    factors: Tensor,
    *,
    poses: PoseOffsets | None = None,
    advance: Callable[[int], None] | None = None,
) -> TargetSums:
    """One pass over the images that stand in a ring of any of T targets.

    Parameters
    ----------
    rows
        `(N,)` rows of the stack, ascending.
    rings, half, contrast
        `(N, T)` ring around each target or −1, `(N,)` half set and `(N,)` contrast of those rows.
    grids, factors
        The model's prediction: `(K, E, E, E/2+1)` and `(N, K)`; see `predicted`.
    poses
        What corrects the poses of the rows; None: nothing.
    advance
        Called with the number of images done.
    """
    d = stack.box_size_px
    plane = level_plane(d, d)
    weight, groups = noise_precision(stack.noise, plane, white=False)
    sums = TargetSums(d, rings.shape[1], int(rings.max()) + 1)
    used = np.flatnonzero((rings >= 0).any(axis=1))
    ring, side = torch.from_numpy(rings[used]), torch.from_numpy(half[used])
    strength, combination = torch.from_numpy(contrast[used]).float(), factors[torch.from_numpy(used)]
    offsets = None if poses is None else poses.of(used)
    for part, images in stream(stack, rows[used], plane, groups):
        images = images if offsets is None else offsets.applied(images, part)
        prediction = predicted(grids, combination[part].contiguous(), images)
        sums.add(images, image_values(images, weight, strength[part], prediction), ring[part], side[part])
        if advance is not None:
            advance(len(images))
    return sums


def sums_bytes(box_size_px: int, rings: int) -> int:
    """Memory of the sums of one target."""
    size = PADDING * box_size_px
    return 2 * rings * size * size * (size // 2 + 1) * KINDS * 4


def _geometry(images: FourierImages) -> tuple[NDArray[Any], ...]:
    return (
        images.rotation.numpy(),
        (images.scale * PADDING).numpy(),
        images.plane.kx.float().numpy(),
        images.plane.ky.float().numpy(),
    )
