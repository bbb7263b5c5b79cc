"""Fourier shell correlation of two maps, the resolution it stands for, and its correction for a mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cryodrgn_pipeline.fourier.transforms import rfftn_radius


def shell_index(box_size_px: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The shell (|k| in cycles per box, rounded) of each point of an `rfftn` cube: `(D, D, D/2+1)` int64."""
    return rfftn_radius(box_size_px, device=device).round().long()


def _friedel_weight(box_size_px: int, device: torch.device) -> Tensor:
    """How often each kx column of an `rfftn` cube stands in the whole spectrum: 1 at both ends, else 2."""
    weight = torch.full((box_size_px // 2 + 1,), 2.0, device=device, dtype=torch.float64)
    weight[0] = weight[-1] = 1.0
    return weight


def shell_sums(values: Tensor, box_size_px: int) -> Tensor:
    """Sum of a `(D, D, D/2+1)` real spectrum over each whole shell 0 … D/2: `(D/2+1,)` float64."""
    shell = shell_index(box_size_px, device=values.device).flatten()
    weighted = (values.double() * _friedel_weight(box_size_px, values.device)).flatten()
    sums = torch.zeros(int(shell.max()) + 1, dtype=torch.float64, device=values.device)
    sums.index_add_(0, shell, weighted)
    return sums[: box_size_px // 2 + 1]


def fsc_of_spectra(first: Tensor, second: Tensor) -> Tensor:
    """FSC of two `(D, D, D/2+1)` `rfftn` spectra, shells 0 … D/2: `(D/2+1,)`; 0 where one is empty."""
    d = first.shape[0]
    cross = shell_sums((first * second.conj()).real, d)
    power = shell_sums(first.abs() ** 2, d) * shell_sums(second.abs() ** 2, d)
    return torch.where(power > 0, cross / torch.sqrt(power).clamp(min=1e-300), torch.zeros_like(cross))


def fsc(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """Fourier shell correlation of two maps.

    Parameters
    ----------
    first, second
        `(D, D, D)` densities on the same grid.
    mask
        `(D, D, D)` soft mask that multiplies both.

    Returns
    -------
    `(D/2+1,)` float64: shell i holds the coefficients with i − ½ ≤ |k| < i + ½ cycles per box.
    """
    if first.shape != second.shape:
        raise ValueError(f"maps of {tuple(first.shape)} and {tuple(second.shape)} have no common shells")
    if mask is not None:
        first, second = first * mask, second * mask
    return fsc_of_spectra(torch.fft.rfftn(first), torch.fft.rfftn(second))


def resolution_a(curve: Tensor, threshold: float, box_size_px: int, pixel_size_a: float) -> float | None:
    """Where an FSC curve first falls below `threshold`, in Å, interpolated between shells.

    None when the curve is below the threshold at its first shell (nothing is resolved); twice the pixel size
    when it never falls below.
    """
    box_a = box_size_px * pixel_size_a
    values: list[float] = curve.tolist()
    for shell in range(1, len(values)):
        if values[shell] < threshold:
            if shell == 1:
                return None
            above, below = values[shell - 1], values[shell]
            crossing = shell - 1 + (above - threshold) / max(above - below, 1e-12)
            return box_a / crossing
    return box_a / (len(values) - 1)


def randomise_phases(volume: Tensor, from_shell: int, generator: torch.Generator) -> Tensor:
    """The map with random phases and unchanged amplitudes at all shells ≥ `from_shell`: `(D, D, D)`."""
    d = volume.shape[0]
    spectrum = torch.fft.rfftn(volume)
    noise = torch.fft.rfftn(torch.randn(volume.shape, generator=generator).to(volume))  # Hermitian by birth
    random = spectrum.abs() * noise / noise.abs().clamp(min=1e-30)
    beyond = shell_index(d, device=volume.device) >= from_shell
    randomised: Tensor = torch.fft.irfftn(torch.where(beyond, random, spectrum), s=(d,) * 3)
    return randomised


def corrected_fsc(first: Tensor, second: Tensor, mask: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The masked FSC, and the same freed from what the mask alone correlates.

    Phases are randomised from the shell on where the unmasked FSC falls below 0.8; what correlation is left
    comes from the mask (Chen et al., Ultramicroscopy 135, 2013, eq. 4) and is taken off from two shells
    further on.

    Returns
    -------
    Masked and corrected FSC, each `(D/2+1,)` float64.
    """
    masked = fsc(first, second, mask)
    unmasked = fsc(first, second)
    below = (unmasked[1:] < 0.8).nonzero()
    from_shell = int(below[0, 0]) + 1 if len(below) else len(unmasked)
    generator = torch.Generator().manual_seed(seed)
    random = [randomise_phases(volume, from_shell, generator) for volume in (first, second)]
    by_mask = fsc(random[0], random[1], mask).clamp(max=1 - 1e-6)
    corrected = masked.clone()
    start = from_shell + 2
    corrected[start:] = ((masked - by_mask) / (1 - by_mask))[start:]
    return masked, corrected


def mean_fsc(curve: Tensor, shells: int) -> float:
    """FSC over the shells 1 … `shells`, each weighted by its number of coefficients' square root (∝ |k|)."""
    weight = torch.arange(1, shells + 1, dtype=torch.float64)
    value = float((curve[1 : shells + 1].double().cpu() * weight).sum() / weight.sum())
    return value if math.isfinite(value) else 0.0
