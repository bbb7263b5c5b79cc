"""The two passes over the images that expectation maximisation needs, and packed symmetric matrices.

M-step: `NormalEquations` adds up Σ w c a y and Σ w c² E[a aᵀ] on the padded Fourier grid. E-step:
`inner_products` says how each image's slices of the K maps lie to each other and to the image. Torch is the
reference path (and the one for GPUs); on CPUs compiled kernels make the same sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.fourier.sizes import PADDING, half_grid_points
from cryodrgn_pipeline.fourier.slices import (
    complete_splat,
    corners,
    extract_columns,
    slice_coordinates,
)
from cryodrgn_pipeline.fourier_images import FourierImages

if TYPE_CHECKING:
    from cryodrgn_pipeline.subspace.poses import PoseAnswer
    from cryodrgn_pipeline.subspace.solve import Lattice


POINTS_AT_ONCE = 2**19  # of slices, in torch: their 8 corners in all maps lie in memory together


def pairs(maps: int) -> list[tuple[int, int]]:
    """Index pairs of a packed symmetric K × K matrix, in the order in which its entries are stored."""
    return [(j, k) for j in range(maps) for k in range(j + 1)]


def pack(matrices: Tensor) -> Tensor:
    """Symmetric `(..., K, K)` → lower triangle `(..., K(K+1)/2)`."""
    j, k = torch.tensor(pairs(matrices.shape[-1]), device=matrices.device).T
    return matrices[..., j, k]


def unpack(packed: Tensor, maps: int) -> Tensor:
    """Lower triangle `(..., K(K+1)/2)` → symmetric `(..., K, K)`."""
    j, k = torch.tensor(pairs(maps), device=packed.device).T
    matrices = packed.new_empty(*packed.shape[:-1], maps, maps)
    matrices[..., j, k] = packed
    matrices[..., k, j] = packed
    return matrices


def compiled(kernel: str, device: torch.device) -> bool:
    """Whether `kernel` (auto, torch or numba) means the compiled path on this device."""
    if kernel not in ("auto", "torch", "numba"):
        raise ValueError(f"kernel must be auto, torch or numba, not {kernel}")
    return kernel == "numba" or (kernel == "auto" and device.type == "cpu")


class NormalEquations:
    """Running sums for K maps of D³ voxels.

    `right` `(G, 2K)` float32 holds Σ w c a y (K real, then K imaginary parts) on the half grid of E = 2 D,
    G = E · E · (E/2+1). `normal` `(G, K(K+1)/2)` holds Σ w c² E[a aᵀ], on the same grid if `exact`; otherwise
    `(H, K(K+1)/2)` on that of the unpadded box, H = D · D · (D/2+1), an eighth of the memory.
    """

    def __init__(
        self,
        box_size_px: int,
        maps: int,
        *,
        exact: bool = True,
        kernel: str = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        self.box_size_px, self.maps, self.size = box_size_px, maps, PADDING * box_size_px
        self.kernel, self.weight_padding = kernel, PADDING if exact else 1
        self.weight_size = self.weight_padding * box_size_px
        self.right = torch.zeros(half_grid_points(self.size), 2 * maps, device=device)
        pair_count = maps * (maps + 1) // 2
        self.normal = torch.zeros(half_grid_points(self.weight_size), pair_count, device=device)

    def add(self, images: FourierImages, weight: Tensor, linear: Tensor, second: Tensor) -> None:
        """Add B images.

        Parameters
        ----------
        weight
            `(groups, P)` one over the noise power.
        linear, second
            `(B, K)` E[a], the factor of each map in each image, and `(B, K(K+1)/2)` packed E[a aᵀ].
        """
        linear, second = linear.float().contiguous(), second.float().contiguous()
        if compiled(self.kernel, self.right.device):
            if self.weight_size == self.size:
                self._splat(self.right, self.normal, PADDING, images, weight, linear, second)
            else:
                self._splat(self.right, self.normal[:0, :0], PADDING, images, weight, linear, second[:, :0])
                self._splat(self.right[:0, :0], self.normal, 1, images, weight, linear[:, :0], second)
            return
        for part in parts_of(images):
            self._splat_with_torch(images.part(part), weight, linear[part], second[part])

    def _splat_with_torch(
        self, images: FourierImages, weight: Tensor, linear: Tensor, second: Tensor
    ) -> None:
        where = slice_coordinates(images.plane, images.rotation, images.scale)
        weighted = weight[images.noise_group] * images.ctf
        index, share, mirrored = corners(where, self.size, PADDING)
        values = weighted * torch.where(mirrored, images.coefficients.conj(), images.coefficients)
        values = torch.cat(
            [values.real[..., None] * linear[:, None], values.imag[..., None] * linear[:, None]], 2
        )
        _spread(self.right, index, share, values)
        if self.weight_size != self.size:
            index, share, _ = corners(where, self.weight_size, self.weight_padding)
        _spread(self.normal, index, share, (weighted * images.ctf)[..., None] * second[:, None])

    def _splat(
        self,
        right: Tensor,
        normal: Tensor,
        padding: int,
        images: FourierImages,
        weight: Tensor,
        linear: Tensor,
        second: Tensor,
    ) -> None:
        from cryodrgn_pipeline.reconstruct_kernels import balanced_slabs, use_threads
        from cryodrgn_pipeline.subspace.kernels import splat

        size = padding * self.box_size_px
        slabs = balanced_slabs(size, use_threads(torch.get_num_threads()))
        factors = (np.ascontiguousarray(linear.numpy()), np.ascontiguousarray(second.numpy()))
        splat(right.numpy(), normal.numpy(), size, slabs, *factors, *_as_arrays(images, weight, padding))

    def complete(self, lattice: Lattice) -> tuple[Tensor, Tensor]:
        """Close the sums: what they say about the voxels, `(K, D, D, D)`, and `normal` over all frequencies.

        No image can be added afterwards.
        """
        shape = (self.size, self.size, self.size // 2 + 1)
        back = []
        for j in range(self.maps):
            spectrum = torch.complex(self.right[:, j], self.right[:, self.maps + j]).reshape(shape)
            back.append(lattice.right_hand_side(complete_splat(spectrum)[None])[0])
        size = self.weight_size
        edge = self.normal.reshape(size, size, size // 2 + 1, -1)[:, :, 0]
        edge += torch.roll(
            torch.flip(edge, dims=(0, 1)), shifts=(1, 1), dims=(0, 1)
        )  # the other half of kx = 0
        return torch.stack(back), self.normal


def _spread(grid: Tensor, index: Tensor, share: Tensor, values: Tensor) -> None:
    """Add values `(B, P, C)` to the rows of a grid `(G, C)` at the 8 corners around each point."""
    for corner in range(index.shape[-1]):
        spread = (values * share[..., corner, None]).flatten(0, 1)
        grid.index_add_(0, index[..., corner].flatten(), spread)


def parts_of(images: FourierImages) -> Iterator[slice]:
    """Slices of images that torch works on together."""
    step = max(1, POINTS_AT_ONCE // len(images.plane))
    return (slice(at, min(at + step, len(images))) for at in range(0, len(images), step))


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerProducts:
    """How B images see K maps, all weighted by one over the noise power and counted over both half planes.

    `gram` `(B, K, K)` of the CTF-filtered slices; `inner` `(B, K)` of slices and image; `power` `(B,)` of the
    image. With these −2 log p(image | factors a) = power − gain − 2 a·inner + aᵀ gram a + const, where `gain`
    `(B,)` is what was explained otherwise.
    """

    gram: Tensor
    inner: Tensor
    power: Tensor
    gain: Tensor

    def of(self, images: Tensor, maps: int) -> InnerProducts:
        """Those of some images with the first maps alone."""
        return InnerProducts(
            gram=self.gram[images, :maps, :maps],
            inner=self.inner[images, :maps],
            power=self.power[images],
            gain=self.gain[images],
        )


Chunk = TypeVar("Chunk", bound="InnerProducts | PoseAnswer")


def joined(parts: list[Chunk]) -> Chunk:
    """What several chunks of images say, as one."""
    kind = type(parts[0])
    return kind(**{name: torch.cat([getattr(part, name) for part in parts]) for name in kind.__slots__})


def grid_columns(grids: Tensor) -> Tensor:
    """Half grids `(K, E, E, E/2+1)` complex as the kernels read them: `(G, 2K)` float32."""
    flat = grids.flatten(1)
    return torch.cat([flat.real, flat.imag]).T.float().contiguous()


def inner_products(
    columns: Tensor, size: int, images: FourierImages, weight: Tensor, *, kernel: str = "auto"
) -> InnerProducts:
    """Inner products of B images with the slices of K maps; the answer lies on the CPU.

    Parameters
    ----------
    columns, size
        `(G, 2K)` from `grid_columns`, and E.
    weight
        `(groups, P)` one over the noise power.
    """
    maps, count = columns.shape[1] // 2, len(images)
    if compiled(kernel, columns.device):
        from cryodrgn_pipeline.reconstruct_kernels import use_threads
        from cryodrgn_pipeline.subspace.kernels import inner_products as run

        use_threads(torch.get_num_threads())
        packed, inner, power = (
            torch.empty(count, maps * (maps + 1) // 2),
            torch.empty(count, maps),
            torch.empty(count),
        )
        out = (packed.numpy(), inner.numpy(), power.numpy())
        run(columns.numpy(), size, *out, *_as_arrays(images, weight))
        gram = unpack(packed, maps)
    else:
        spectra = torch.complex(columns[:, :maps], columns[:, maps:])
        seen = [_products_with_torch(spectra, size, images.part(part), weight) for part in parts_of(images)]
        gram, inner, power = (torch.cat(part) for part in zip(*seen, strict=True))
    return InnerProducts(
        gram=2 * gram.double().cpu(),
        inner=2 * inner.double().cpu(),
        power=2 * power.double().cpu(),
        gain=torch.zeros(count, dtype=torch.float64),
    )


def _products_with_torch(
    spectra: Tensor, size: int, images: FourierImages, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    where = slice_coordinates(images.plane, images.rotation, images.scale)
    samples = extract_columns(spectra, size, where) * images.ctf[..., None]
    weighted = weight[images.noise_group]
    power = (weighted * images.coefficients.abs() ** 2).sum(1)
    against = (weighted * images.coefficients)[:, None]  # (B, 1, P)
    reals, imaginaries = samples.real, samples.imag
    inner = against.real @ reals + against.imag @ imaginaries
    columns = torch.cat([reals, imaginaries], dim=1)
    gram = (columns * weighted.repeat(1, 2)[..., None]).transpose(1, 2) @ columns
    return gram, inner[:, 0], power


def _as_arrays(images: FourierImages, weight: Tensor, padding: int = PADDING) -> tuple[NDArray[Any], ...]:
    return (
        images.rotation.numpy(),
        (images.scale * padding).numpy(),
        images.plane.kx.float().numpy(),
        images.plane.ky.float().numpy(),
        images.coefficients.numpy(),
        images.ctf.numpy(),
        weight.float().numpy(),
        images.noise_group.numpy(),
    )
