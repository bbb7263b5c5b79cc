"""Transforms between D³ maps and their padded half spectra that keep no more than they need in memory.

A padded half spectrum is `(E, E, E/2+1)`, E = 2 D, axes [kz, ky, kx ≥ 0] in FFT order. Axes are transformed
one after the other, a few planes at a time: what lies in the padding is left out before the next axis, and
one array of full size is held where a plain transform holds three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cryodrgn_pipeline.fourier.sizes import PADDING
from cryodrgn_pipeline.fourier.transforms import rfftn_radius

CHUNK_POINTS = 2**20

Window = Callable[[slice], Tensor]


class Ball:
    """The V points of a padded half spectrum that slices up to |k| = D/2 touch, in the order of the grid.

    Those of the row (kz, ky) are kx = 0, 1, …, and lie from `start[kz, ky]` on: 52 % of a large grid.
    """

    def __init__(self, box_size_px: int) -> None:
        self.box_size_px, self.size = box_size_px, PADDING * box_size_px
        k = torch.fft.fftfreq(self.size, 1 / self.size, dtype=torch.float64)
        reach = self.size / 2 + math.sqrt(3)  # a point is spread over the corners of its cell
        room = reach**2 - k[:, None] ** 2 - k**2
        length = room.clamp(min=0).sqrt().floor().long() + 1
        length = torch.where(room < 0, 0, length.clamp(max=self.size // 2 + 1))
        self.start = (length.flatten().cumsum(0) - length.flatten()).reshape(length.shape)
        self.inside = torch.arange(self.size // 2 + 1) < length[..., None]
        self.points = int(length.sum())

    def grid(self, values: Tensor) -> Tensor:
        """Values `(V,)` on the whole grid `(E, E, E/2+1)`, 0 elsewhere."""
        grid = values.new_zeros(self.inside.shape)
        return grid.masked_scatter_(self.inside, values)

    def packed(self, grid: Tensor) -> Tensor:
        """What lies inside the ball, `(V,)`."""
        return grid[self.inside]


def slabs(shape: Sequence[int], axis: int) -> Iterator[slice]:
    """Slices along an axis of a grid that hold about a million points each."""
    step = max(1, CHUNK_POINTS * shape[axis] // math.prod(shape))
    return (slice(at, min(at + step, shape[axis])) for at in range(0, shape[axis], step))


def slab_radius(size: int, part: slice) -> Tensor:
    """|k| in cycles per D px of some planes of kz of a padded half spectrum: `(planes, E, E/2+1)`."""
    k = torch.fft.fftfreq(size, 1 / size)
    kx = torch.arange(size // 2 + 1)
    return torch.sqrt(k[part, None, None] ** 2 + k[:, None] ** 2 + kx**2) / PADDING


def padded_spectrum(volume: Tensor) -> Tensor:
    """The padded half spectrum of a `(D, D, D)` density, its origin at index D/2: `(E, E, E/2+1)`."""
    d = volume.shape[0]
    size = PADDING * d
    phase = torch.polar(torch.ones(size), math.pi * d / size * torch.arange(size).float())
    lines = torch.fft.rfft(volume, n=size, dim=2).mul_(phase[: size // 2 + 1])
    planes = torch.fft.fft(lines, n=size, dim=1).mul_(phase[:, None])
    out = torch.empty(size, size, size // 2 + 1, dtype=torch.complex64)
    for part in slabs(out.shape, 1):
        out[:, part] = torch.fft.fft(planes[:, part], n=size, dim=0) * phase[:, None, None]
    return out


def central_box(spectrum: Tensor) -> Tensor:
    """The adjoint of `padded_spectrum`, counted over all frequencies: `(D, D, D)`.

    Without the factor E³ of a transform back and forth.
    """
    size = spectrum.shape[0]
    d = size // PADDING
    inner = slice((size - d) // 2, (size + d) // 2)
    parity = 1 - 2 * (torch.arange(size) % 2).float()  # moves the origin from index 0 to E/2
    planes = torch.empty(d, size, size // 2 + 1, dtype=torch.complex64)
    for part in slabs(spectrum.shape, 1):
        moved = spectrum[:, part] * parity[:, None, None]
        planes[:, part] = torch.fft.ifft(moved, dim=0, norm="forward")[inner]
    volume = torch.empty(d, d, d)
    for part in slabs(planes.shape, 0):
        lines = torch.fft.ifft(planes[part] * parity[:, None], dim=1, norm="forward")[:, inner]
        moved = lines * parity[: size // 2 + 1]
        volume[part] = torch.fft.irfft(moved, n=size, dim=2, norm="forward")[..., inner]
    return volume


def windowed(weight: Tensor, window: Window) -> Tensor:
    """A real half spectrum `(E, E, E/2+1)` after its transform was multiplied by a symmetric window.

    Parameters
    ----------
    window
        Gives some planes `(planes, E, E)` of the window, origin at index 0.
    """
    half = _planes_transformed(weight)
    size = half.shape[0]
    for part in slabs(half.shape, 0):
        rows = torch.fft.irfft(half[part], n=size, dim=2) * window(part)
        half[part] = torch.fft.fft(torch.fft.rfft(rows, dim=2), dim=1)
    result = torch.empty(half.shape)
    for part in slabs(half.shape, 1):
        result[:, part] = torch.fft.fft(half[:, part], dim=0).real
    return result


def windowed_unpadded(weight: Tensor, window: Window) -> Tensor:
    """As `windowed`, at the frequencies of the box alone: `(D, D, D/2+1)`."""
    half = _planes_transformed(weight)
    size, d = half.shape[0], half.shape[0] // PADDING
    folded = torch.zeros(d, d, d)
    for part in slabs(half.shape, 0):
        rows = torch.fft.irfft(half[part], n=size, dim=2) * window(part)
        rows = rows[:, :d] + rows[:, d:]
        folded.index_add_(0, torch.arange(part.start, part.stop) % d, rows[..., :d] + rows[..., d:])
    result: Tensor = torch.fft.rfftn(folded).real
    return result


def splatting_window(size: int) -> Window:
    """What frees splatted weights from the trilinear spread: one over sinc² of the distance, on each axis."""
    axis: Tensor = 1 / torch.sinc(torch.fft.fftfreq(size)) ** 2

    def window(part: slice) -> Tensor:
        planes: Tensor = axis[part, None, None] * axis[:, None] * axis
        return planes

    return window


def overlap_window(mask: Tensor) -> Window:
    """The autocorrelation of a mask `(D, D, D)`, 1 at distance 0."""
    power = padded_spectrum(mask)
    power = power.real.square() + power.imag.square()
    half = _planes_transformed(power)
    size = half.shape[0]
    overlap = torch.empty(size, size, size)
    for part in slabs(half.shape, 0):
        overlap[part] = torch.fft.irfft(half[part], n=size, dim=2)
    overlap /= overlap[0, 0, 0].clone()

    def window(part: slice) -> Tensor:
        planes: Tensor = overlap[part]
        return planes

    return window


def shell_means(box_size_px: int, values: Callable[[slice], Tensor]) -> Tensor:
    """Mean over each shell 0 … D/2 of a padded half spectrum: `(D/2+1,)` float64.

    Parameters
    ----------
    values
        Gives some planes of it, `(planes, E, E/2+1)`.
    """
    shells, size = box_size_px // 2 + 1, PADDING * box_size_px
    sums, counts = torch.zeros(2, shells, dtype=torch.float64)
    for part in slabs((size, size, size // 2 + 1), 0):
        shell = slab_radius(size, part).round().long().clamp(max=shells).flatten()
        sums += torch.bincount(shell, values(part).flatten().double(), minlength=shells + 1)[:shells]
        counts += torch.bincount(shell, minlength=shells + 1)[:shells]
    means: Tensor = sums / counts
    return means


def unpadded_shells(box_size_px: int) -> tuple[Tensor, Tensor]:
    """Shell of each point of the `(D, D, D/2+1)` half spectrum, at most D/2, and whether |k| ≤ D/2."""
    radius = rfftn_radius(box_size_px)
    return radius.round().long().clamp(max=box_size_px // 2), radius <= box_size_px / 2


def _planes_transformed(weight: Tensor) -> Tensor:
    """A real half spectrum, transformed back along kz and ky but not along kx."""
    half = weight.to(torch.complex64)
    for part in slabs(half.shape, 1):
        half[:, part] = torch.fft.ifft(half[:, part], dim=0)
    for part in slabs(half.shape, 0):
        half[part] = torch.fft.ifft(half[part], dim=1)
    return half
