"""CTF-weighted backprojection into half sets, and maps from the sums (Wiener filter per Fourier voxel).

The core takes plain tensors; `accumulate_stack` streams a stack through it in chunks. Torch is the reference
path (and the one for GPUs); on CPUs a compiled kernel makes the same sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.fourier.sizes import PADDING
from cryodrgn_pipeline.fourier.slices import (
    complete_splat,
    grid_volume,
    slice_coordinates,
    splat_slices,
)
from cryodrgn_pipeline.fourier.transforms import half_plane, rfftn_radius
from cryodrgn_pipeline.fourier_images import FourierImages, noise_weights, stream
from cryodrgn_pipeline.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from cryodrgn_pipeline.stack import Stack

SMALLEST_WEIGHT = 1e-2  # of its shell's mean: keeps unseen Fourier voxels at 0 in maps without a prior


class Backprojection:
    """Running sums Σ w c y and Σ w c² on padded Fourier grids, one grid for each of S sets of images."""

    def __init__(
        self, box_size_px: int, sets: int = 2, *, kernel: str = "auto", device: torch.device | str = "cpu"
    ) -> None:
        """Empty sums for maps of `box_size_px`³; `kernel` is auto, torch or numba (CPU only)."""
        if kernel not in ("auto", "torch", "numba"):
            raise ValueError(f"kernel must be auto, torch or numba, not {kernel}")
        self.box_size_px, self.grid_size = box_size_px, PADDING * box_size_px
        self.kernel = (
            kernel if kernel != "auto" else "numba" if torch.device(device).type == "cpu" else "torch"
        )
        shape = (sets, self.grid_size, self.grid_size, self.grid_size // 2 + 1, 3)
        self.sums = torch.zeros(shape, dtype=torch.float32, device=device)

    def add(self, images: FourierImages, target: Tensor, noise_weight: Tensor) -> None:
        """Add images to the sums.

        Parameters
        ----------
        images
            B images; their plane may be of a larger box as long as it spans the same length in Å.
        target
            `(B,)` the set of each image.
        noise_weight
            `(G, P)` weight of each noise group's coefficients, one over the noise power.
        """
        if self.kernel == "numba":
            self._add_compiled(images, target, noise_weight)
            return
        for which in range(len(self.sums)):
            rows = (target == which).nonzero()[:, 0]
            for part in torch.split(rows, max(1, 2**21 // max(1, len(images.plane)))):
                where = slice_coordinates(images.plane, images.rotation[part], images.scale[part])
                weighted = noise_weight[images.noise_group[part]] * images.ctf[part]
                values = splat_slices(weighted * images.coefficients[part], where, self.grid_size)
                self.sums[which, ..., 0] += values.real
                self.sums[which, ..., 1] += values.imag
                self.sums[which, ..., 2] += splat_slices(weighted * images.ctf[part], where, self.grid_size)

    def _add_compiled(self, images: FourierImages, target: Tensor, noise_weight: Tensor) -> None:
        from cryodrgn_pipeline.reconstruct_kernels import balanced_slabs, splat, use_threads

        threads = use_threads(torch.get_num_threads())
        slabs = balanced_slabs(self.grid_size, -(-threads // len(self.sums)))
        splat(
            self.sums.numpy(),
            slabs,
            target.numpy(),
            images.rotation.numpy(),
            (images.scale * PADDING).numpy(),
            images.plane.kx.float().numpy(),
            images.plane.ky.float().numpy(),
            images.coefficients.numpy(),
            images.ctf.numpy(),
            noise_weight.float().numpy(),
            images.noise_group.numpy(),
        )

    def numerator(self, sets: int | list[int]) -> Tensor:
        """Σ w c y of one set or of several together, over all frequencies: `(E, E, E/2+1)` complex64."""
        sums = self._of(sets)
        return complete_splat(torch.complex(sums[..., 0], sums[..., 1]))

    def weight(self, sets: int | list[int]) -> Tensor:
        """Σ w c² of one set or of several together, over all frequencies: `(E, E, E/2+1)` float32."""
        return complete_splat(self._of(sets)[..., 2])

    def _of(self, sets: int | list[int]) -> Tensor:
        return self.sums[sets] if isinstance(sets, int) else self.sums[sets].sum(dim=0)

    def map(self, sets: int | list[int], inverse_prior: Tensor | None = None) -> Tensor:
        """The density of one set or of several together: `(D, D, D)`.

        Parameters
        ----------
        inverse_prior
            `(D/2+1,)` one over the expected signal power per shell, in units of the weights
            (`prior_from_fsc`); without it unseen voxels only are kept at 0.
        """
        weight = self.weight(sets)
        return density(self.numerator(sets), weight, self.box_size_px, inverse_prior)


def grid_shells(grid_size: int, padding: int = PADDING, *, device: torch.device | str = "cpu") -> Tensor:
    """|k| in cycles per unpadded box of each point of a padded grid: `(E, E, E/2+1)` float32."""
    return rfftn_radius(grid_size, device=device) / padding


def shell_mean_weight(weight: Tensor, box_size_px: int) -> Tensor:
    """Mean of a padded weight grid over each shell 0 … D/2: `(D/2+1,)` float64."""
    shell = grid_shells(weight.shape[0], device=weight.device).round().long().flatten()
    keep = shell <= box_size_px // 2
    size = box_size_px // 2 + 1
    sums = torch.zeros(size, dtype=torch.float64, device=weight.device)
    counts = torch.zeros_like(sums)
    sums.index_add_(0, shell[keep], weight.flatten()[keep].double())
    counts.index_add_(0, shell[keep], torch.ones_like(sums[:1]).expand(int(keep.sum())))
    return sums / counts


def prior_from_fsc(curve: Tensor, mean_weight: Tensor) -> Tensor:
    """One over the signal power per shell of the map from both halves together, `(D/2+1,)` float64.

    The FSC of two halves says signal to noise: SNR = 2 FSC / (1 − FSC) for both together (Rosenthal &
    Henderson 2003), and the noise power of a backprojected voxel is one over its weight (Scheres 2012). From
    the first shell on where it falls below 0.143 the curve may only fall.

    Parameters
    ----------
    curve
        `(D/2+1,)` FSC of the half maps.
    mean_weight
        `(D/2+1,)` from `shell_mean_weight` of both halves together.
    """
    value = curve.double().clamp(1e-3, 1 - 1e-4).clone()
    value[0] = value[1]
    below = (value < 0.143).nonzero()
    if len(below):
        start = int(below[0, 0])
        value[start:] = torch.cummin(value[start:], dim=0).values
    return mean_weight * (1 - value) / (2 * value)


def density(
    numerator: Tensor, weight: Tensor, box_size_px: int, inverse_prior: Tensor | None = None
) -> Tensor:
    """The map from its Fourier sums, numerator / (weight + inverse prior) within |k| < D/2: `(D, D, D)`."""
    edge = box_size_px // 2
    shells = grid_shells(weight.shape[0], device=weight.device)
    nearest = shells.round().long().clamp(max=edge)
    if inverse_prior is None:
        floor = SMALLEST_WEIGHT * shell_mean_weight(weight, box_size_px)
    else:
        floor = inverse_prior
    floor = floor.clamp(min=float(weight.max()) * 1e-9 + 1e-30)
    spectrum = numerator / (weight + floor.to(weight)[nearest]) * (shells < edge)
    return grid_volume(spectrum, box_size_px)


def accumulate_stack(
    stack: Stack,
    rows: NDArray[np.int64],
    target: NDArray[np.int64],
    *,
    sets: int = 2,
    kernel: str = "auto",
    advance: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Backprojection:
    """Backproject the given rows of a stack.

    Parameters
    ----------
    rows
        `(n,)` row numbers, in any order (sorted reads fastest).
    target
        `(n,)` the set, 0 … `sets` − 1, that each belongs to.
    advance
        Called with the number of images done.
    ranks
        Those that share the rows; all get the sums of all.
    """
    mine = ranks.share(len(rows))
    rows, target = rows[mine], target[mine]
    plane = half_plane(stack.box_size_px, stack.box_size_px / 2 - 0.5)
    weight, groups = noise_weights(stack.noise, plane)
    sums = Backprojection(stack.box_size_px, sets, kernel=kernel)
    targets = torch.from_numpy(np.asarray(target, dtype=np.int64))
    for part, images in stream(stack, rows, plane, groups):
        sums.add(images, targets[part], weight)
        if advance is not None:
            advance(len(images))
    ranks.sum_(sums.sums)
    return sums
