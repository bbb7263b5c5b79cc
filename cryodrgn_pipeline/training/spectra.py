"""What the spectra of a stack say about a training: how residuals are weighed, and the Wiener filter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.fourier.transforms import HalfPlane
from cryodrgn_pipeline.fourier_images import noise_weights

if TYPE_CHECKING:
    from cryodrgn_pipeline.stack import Stack


def group_rows(stack: Stack, rows: NDArray[np.int64]) -> Tensor:
    """The place of each particle's optics group among the groups of the stack in rising order: `(N,)`."""
    groups = sorted(stack.noise)
    return torch.from_numpy(np.searchsorted(groups, stack.particles.optics.optics_group[rows]))


def loss_weights(stack: Stack, rows: NDArray[np.int64], plane: HalfPlane) -> Tensor:
    """Weights of squared residuals: one over the noise power of each optics group, `(groups, P)`.

    They leave the mean power of the images as it is, so that the loss keeps its size and β its meaning.
    """
    weight, _ = noise_weights(stack.noise, plane)
    power = _at(stack.total_power, plane)
    count = torch.bincount(group_rows(stack, rows), minlength=len(weight))[:, None]
    return weight * float((count * power).sum() / (count * weight * power).sum())


def signal_to_noise(stack: Stack, rows: NDArray[np.int64], plane: HalfPlane, squared_ctf: Tensor) -> Tensor:
    """Power of the signal before the CTF over that of the noise, `(groups, P)`.

    Parameters
    ----------
    squared_ctf
        `(groups, P)` mean CTF² of the particles of each optics group.

    Raises
    ------
    InputFormatError
        If nothing in the spectra of a group exceeds its noise.
    """
    noise, total = _at(stack.noise, plane), _at(stack.total_power, plane)
    in_images = (total - noise).clamp(min=0) / noise
    ratio = torch.where(squared_ctf > 0, in_images / squared_ctf, 0.0).float()
    used = torch.unique(group_rows(stack, rows))
    silent = used[ratio[used].amax(1) == 0]
    if len(silent):
        raise InputFormatError(
            f"{stack.path}: the images of optics group {sorted(stack.noise)[int(silent[0])]} have no more "
            "power than their noise spectrum in noise.parquet (masked images have no outside to estimate "
            "it from): a Wiener filter would pass nothing; use --encoder-filter phase-flip"
        )
    return ratio


def _at(spectra: dict[int, NDArray[np.float64]], plane: HalfPlane) -> Tensor:
    radius = plane.radius.numpy()
    rows = [np.interp(radius, np.arange(len(spectra[group])), spectra[group]) for group in sorted(spectra)]
    return torch.from_numpy(np.stack(rows))
