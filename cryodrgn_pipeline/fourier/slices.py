"""Central slices of a volume's transform, and their exact adjoint (the Fourier slice theorem).

A *grid* is the half spectrum of a real E³ box: `(E, E, E/2+1)` complex, axes [kz, ky, kx ≥ 0] in FFT order,
whose values belong to the box's centre (no phase for a density centred at index D/2). E = padding · D, so a
frequency of k cycles per D-pixel box lies at E/D · k on the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryodrgn_pipeline.fourier.sizes import PADDING
from cryodrgn_pipeline.fourier.transforms import HalfPlane, rfftn_radius


def slice_coordinates(plane: HalfPlane, rotation: Tensor, scale: Tensor | None = None) -> Tensor:
    """Where the half plane of each image cuts the volume's transform: `k_vol = Rᵀ k_img · scale`.

    Parameters
    ----------
    plane
        The P image frequencies, in cycles per image box.
    rotation
        `(B, 3, 3)`, object to image.
    scale
        `(B,)` volume pixel size over image pixel size; default 1.

    Returns
    -------
    `(B, P, 3)` as (x, y, z), in cycles per volume box (the image and the volume have the same D).
    """
    k = torch.stack([plane.kx, plane.ky], dim=-1).to(rotation)
    coordinates = k @ rotation[:, :2, :]
    return coordinates if scale is None else coordinates * scale.to(rotation)[:, None, None]


def gridding_window(
    box_size_px: int, padding: int = PADDING, *, device: torch.device | str = "cpu"
) -> Tensor:
    """The factor sinc²(x / E) per axis by which trilinear interpolation scales a density: `(D, D, D)`."""
    x = torch.arange(box_size_px, device=device) - box_size_px // 2
    axis = torch.sinc(x / (padding * box_size_px)) ** 2
    return axis[:, None, None] * axis[None, :, None] * axis[None, None, :]


def volume_grid(volume: Tensor, padding: int = PADDING) -> Tensor:
    """The padded half spectrum of a `(D, D, D)` density [z, y, x], ready for `extract_slices`.

    The density is divided by `gridding_window` first, so that the interpolated values are those of the
    density itself.
    """
    d = volume.shape[-1]
    if volume.shape != (d, d, d) or d % 2:
        raise ValueError(f"a volume must be an even cube, got {tuple(volume.shape)}")
    volume = volume / gridding_window(d, padding, device=volume.device).to(volume)
    edge = (padding - 1) * d // 2
    padded = torch.nn.functional.pad(volume, (edge,) * 6)
    spectrum: Tensor = torch.fft.rfftn(torch.fft.ifftshift(padded))
    return spectrum


def grid_volume(grid: Tensor, box_size_px: int) -> Tensor:
    """The `(D, D, D)` density of a padded half spectrum, freed from the window that splatting put on it."""
    size = grid.shape[0]
    edge = (size - box_size_px) // 2
    inner = slice(edge, edge + box_size_px)
    volume: Tensor = torch.fft.fftshift(torch.fft.irfftn(grid, s=(size,) * 3))[inner, inner, inner]
    return volume / gridding_window(box_size_px, size // box_size_px, device=grid.device).to(volume)


def conjugate_flip(plane: Tensor) -> Tensor:
    """The value at −k, conjugated: `(E, E)` in FFT order → `(E, E)`."""
    return torch.roll(torch.flip(plane, dims=(0, 1)), shifts=(1, 1), dims=(0, 1)).conj()


def corners(coordinates: Tensor, grid_size: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat grid indices `(..., 8)`, trilinear weights `(..., 8)`, and whether the point was taken at −k."""
    point = coordinates * padding
    mirrored = point[..., 0] < 0
    point = torch.where(mirrored[..., None], -point, point)
    low = torch.floor(point)
    fraction = point - low
    low = low.long()
    half = grid_size // 2
    # the outermost plane stands for both +E/2 and −E/2: what would touch it is left out
    inside = ((point >= 1 - half) & (point < half - 1)).all(dim=-1)
    indices, weights = [], []
    for corner in range(8):
        step = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2 & 1], device=point.device)
        x, y, z = (low + step).unbind(-1)
        weight = torch.where(step.bool(), fraction, 1 - fraction).prod(dim=-1)
        indices.append(((z % grid_size) * grid_size + y % grid_size) * (half + 1) + x.clamp(max=half))
        weights.append(weight * inside)
    return torch.stack(indices, dim=-1), torch.stack(weights, dim=-1), mirrored


def extract_slices(grid: Tensor, coordinates: Tensor, padding: int = PADDING) -> Tensor:
    """Trilinear samples of a half spectrum at any frequencies; beyond the grid the transform is 0.

    Parameters
    ----------
    grid
        `(E, E, E/2+1)` complex, from `volume_grid`.
    coordinates
        `(B, P, 3)` as (x, y, z) in cycles per volume box, from `slice_coordinates`.

    Returns
    -------
    `(B, P)` complex.
    """
    index, weight, mirrored = corners(coordinates, grid.shape[0], padding)
    sample = (grid.flatten()[index] * weight).sum(dim=-1)
    return torch.where(mirrored, sample.conj(), sample)


def extract_columns(columns: Tensor, grid_size: int, coordinates: Tensor, padding: int = PADDING) -> Tensor:
    """`extract_slices` of K spectra at the same frequencies, whose corners are found once.

    Parameters
    ----------
    columns, grid_size
        `(E · E · (E/2+1), K)` complex, one spectrum a column, and E.
    coordinates
        `(B, P, 3)` as for `extract_slices`.

    Returns
    -------
    `(B, P, K)` complex.
    """
    index, weight, mirrored = corners(coordinates, grid_size, padding)
    sample = (columns[index] * weight[..., None]).sum(dim=-2)
    return torch.where(mirrored[..., None], sample.conj(), sample)


def splat_slices(values: Tensor, coordinates: Tensor, grid_size: int, padding: int = PADDING) -> Tensor:
    """The exact adjoint of `extract_slices`: spread `(B, P)` values over the 8 grid points around each.

    Real values (weights) give a real grid, complex values a complex one: `(E, E, E/2+1)`. Points of the plane
    kx = 0 arrive at k or at −k; `complete_splat` adds the two.
    """
    index, weight, mirrored = corners(coordinates, grid_size, padding)
    if values.is_complex():
        values = torch.where(mirrored, values.conj(), values)
    cells = grid_size * grid_size * (grid_size // 2 + 1)
    grid = torch.zeros(cells, dtype=values.dtype, device=values.device)
    grid.index_add_(0, index.flatten(), (values[..., None] * weight).flatten())
    return grid.reshape(grid_size, grid_size, grid_size // 2 + 1)


def complete_splat(grid: Tensor) -> Tensor:
    """A splat over half the frequencies made one over all: the kx = 0 plane gains what fell on its −k."""
    complete = grid.clone()
    complete[..., 0] += conjugate_flip(grid[..., 0])
    return complete


def resample_volume(volume: Tensor, voxel_size_a: float, box_size_px: int, pixel_size_a: float) -> Tensor:
    """A density on another grid about the same centre: `(D0, D0, D0)` at `voxel_size_a` → `(D, D, D)`.

    The transform is evaluated at the new frequencies exactly, one axis after the other. Frequencies that the
    input does not hold are 0; the grey scale of the density is kept.
    """
    d, d0 = box_size_px, volume.shape[0]
    if volume.shape != (d0,) * 3 or d0 % 2 or d % 2:
        raise ValueError(f"a volume must be an even cube, got {tuple(volume.shape)} for a box of {d}")
    k = torch.fft.fftfreq(d, 1 / d, dtype=torch.float64)
    kx = torch.arange(d // 2 + 1, dtype=torch.float64)
    zoom = d0 * voxel_size_a / (d * pixel_size_a)
    x = torch.arange(d0, dtype=torch.float64) - d0 // 2

    def axis(frequency: Tensor) -> Tensor:
        held = (frequency * zoom).abs() < d0 / 2
        phase = torch.exp((-2j * torch.pi / d0) * zoom * frequency[:, None] * x)
        return (phase * held[:, None]).to(torch.complex64)

    spectrum = volume.float().to(torch.complex64) @ axis(kx).T
    spectrum = axis(k) @ spectrum
    spectrum = torch.tensordot(axis(k), spectrum, dims=([1], [0]))
    inside = rfftn_radius(d) < d / 2
    # each coefficient is a sum over voxels: fewer, larger voxels hold the same density in fewer terms
    spectrum = spectrum * inside * (voxel_size_a / pixel_size_a) ** 3
    resampled: Tensor = torch.fft.fftshift(torch.fft.irfftn(spectrum, s=(d,) * 3))
    return resampled
