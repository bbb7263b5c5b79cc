"""From coefficients to maps, and what is done to maps."""

import numpy as np
import pytest
import torch

from cryodrgn_pipeline.fourier.density import (
    crop_real,
    density_from_half_ball,
    half_ball,
    low_pass,
    mirror,
    solvent_level,
)
from cryodrgn_pipeline.fourier.transforms import centred_fft


def blob(box_size_px: int, centre: tuple[float, float, float], sigma: float = 1.0) -> torch.Tensor:
    axes = [torch.arange(box_size_px).double() - box_size_px // 2 - c for c in centre]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.exp(-(x**2 + y**2 + z**2) / (2 * sigma**2))


def test_a_density_returns_from_its_half_ball_but_for_its_mean():
    density = blob(16, (1, -2, 3), sigma=1.5)
    points = half_ball(16, 7.5)
    spectrum = centred_fft(density, 3)
    kz, ky, kx = points.T
    back = density_from_half_ball(spectrum[kz + 8, ky + 8, kx + 8], points, 16)
    inside = density - density.mean()
    assert (back - inside).abs().max() < 0.02 * inside.max()
    assert back.flatten().argmax() == density.flatten().argmax()


def test_a_mirrored_map_has_its_blob_at_minus_z():
    torch.testing.assert_close(mirror(blob(16, (3, -2, 1))), blob(16, (-3, -2, 1)), atol=1e-5, rtol=0)


def test_cropping_keeps_the_centre_voxel():
    cropped = crop_real(blob(16, (0, 0, 0)), 10)
    assert cropped.shape == (10, 10, 10)
    assert np.unravel_index(int(cropped.argmax()), cropped.shape) == (5, 5, 5)


def test_a_low_pass_keeps_the_mean_and_removes_finer_waves():
    x = torch.arange(32).double()
    wave = torch.cos(2 * torch.pi * 12 * x / 32).expand(32, 32, 32)  # 12 cycles in 32 voxels of 2 Å: 5.33 Å
    slow = torch.cos(2 * torch.pi * 2 * x / 32).expand(32, 32, 32)  # 32 Å
    filtered = low_pass(wave + slow + 1, 2.0, 8.0)
    torch.testing.assert_close(filtered, slow + 1)


def test_the_solvent_level_ignores_the_particle():
    assert solvent_level(blob(32, (0, 0, 0)) + 0.25) == pytest.approx(0.25, abs=1e-6)
