"""Shifts, crops, windows and noise keep the invariants of the physics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.fourier.crop import cropped_spectrum, fourier_crop
from cryodrgn_pipeline.fourier.noise import NoiseEstimate, shell_means
from cryodrgn_pipeline.fourier.transforms import centred_fft
from cryodrgn_pipeline.fourier.window import linear_window, soft_disc


def noise(n: int, box: int, seed: int = 0) -> Tensor:
    return torch.randn(n, box, box, generator=torch.Generator().manual_seed(seed))


def crop_by_sums(
    images: NDArray[np.float64], box: int, shift: NDArray[np.float64], factor: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The definition in float64: a trigonometric sum over |k| ≤ D/2 about the box centres."""
    original = images.shape[-1]
    k = np.arange(-box // 2, box // 2 + 1)
    forward = np.exp(-2j * np.pi * np.outer(k, np.arange(original) - original // 2) / original)
    moved = np.exp(-2j * np.pi * k[None, :, None] * shift[:, None, :] / original)  # (B, K, 2) as x, y
    spectrum = np.einsum("ky,byx,lx->bkl", forward, images, forward)
    spectrum *= moved[:, :, 1][:, :, None] * moved[:, :, 0][:, None, :]
    weight = np.ones(box + 1)
    weight[[0, -1]] = 0.5  # +D/2 and −D/2 are one frequency on the new grid
    back = np.exp(2j * np.pi * np.outer(np.arange(box) - box // 2, k) / box) * weight
    out = np.einsum("yk,bkl,xl->byx", back, spectrum, back) / original**2
    assert np.abs(out.imag).max() < 1e-10
    result: NDArray[np.float64] = out.real * factor[:, None, None]
    return result


@settings(deadline=None, max_examples=40)
@given(original=st.integers(8, 20), crop=st.integers(2, 10), seed=st.integers(0, 999), size=st.floats(-9, 9))
def test_crop_shift_and_sign_equal_the_trigonometric_sum_for_any_box(
    original: int, crop: int, seed: int, size: float
) -> None:
    box = min(2 * crop, original // 2 * 2)
    images = noise(2, original, seed)
    shift = np.array([[size, -size / 3], [0.25, size]])
    factor = np.array([-1.0, 1.0])
    got = fourier_crop(images, box, shift_px=torch.from_numpy(shift), factor=torch.from_numpy(factor).float())
    expected = crop_by_sums(images.double().numpy(), box, shift, factor)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)


def test_a_whole_pixel_shift_is_a_roll() -> None:
    images = noise(2, 16)
    got = fourier_crop(images, 16, shift_px=torch.tensor([[3.0, -2.0], [-5.0, 16.0]]))
    expected = torch.stack([images[0].roll((-2, 3), (0, 1)), images[1].roll((0, -5), (0, 1))])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_sub_pixel_shift_moves_a_band_limited_image_exactly() -> None:
    x = np.arange(24)

    def wave(dx: float, dy: float) -> Tensor:
        rows, columns = (x - dy)[:, None], (x - dx)[None, :]
        return torch.from_numpy(
            np.cos(2 * np.pi * (3 * columns + 5 * rows) / 24) + np.sin(2 * np.pi * (7 * columns - rows) / 24)
        ).float()

    got = fourier_crop(wave(0, 0)[None], 24, shift_px=torch.tensor([[0.37, -4.61]]))
    torch.testing.assert_close(got[0], wave(0.37, -4.61), atol=2e-5, rtol=0)


def test_a_crop_keeps_mean_and_contrast() -> None:
    axis = np.arange(32) - 16
    blob = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / 30) + 0.3
    images = torch.from_numpy(blob).float()[None]
    cropped = fourier_crop(images, 16)
    assert float(cropped.mean()) == pytest.approx(float(images.mean()), abs=1e-6)
    torch.testing.assert_close(cropped[0], images[0, ::2, ::2], atol=1e-4, rtol=0)  # centre stays at D/2
    torch.testing.assert_close(fourier_crop(torch.full((1, 32, 32), 2.5), 12), torch.full((1, 12, 12), 2.5))


def test_cropped_coefficients_are_the_original_ones_times_the_square_of_the_box_ratio() -> None:
    images = noise(2, 20)
    inner = centred_fft(images)[:, 5:16, 5:16]  # |k| < 6
    got = centred_fft(fourier_crop(images, 12))[:, 1:, 1:]
    torch.testing.assert_close(got, inner * (12 / 20) ** 2, atol=1e-4, rtol=1e-4)


def test_a_crop_to_the_same_box_changes_nothing() -> None:
    torch.testing.assert_close(fourier_crop(noise(2, 14), 14), noise(2, 14), atol=1e-6, rtol=0)


def test_the_cropped_spectrum_is_that_of_a_real_image() -> None:
    images = noise(2, 20)
    shift = torch.tensor([[0.4, 1.3], [-2.2, 0.0]])
    spectrum = cropped_spectrum(images, 12, shift_px=shift)
    again = torch.fft.rfft2(fourier_crop(images, 12, shift_px=shift))
    torch.testing.assert_close(again[..., :6], spectrum[..., :6], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("box", [7, 0, 22])
def test_an_odd_or_larger_box_is_refused(box: int) -> None:
    with pytest.raises(ValueError, match="even box"):
        fourier_crop(noise(1, 20), box)


def test_the_window_is_one_inside_linear_between_and_zero_outside() -> None:
    window = linear_window(40, 0.5, 0.9)
    assert window.shape == (40, 40)
    assert float(window[20, 20]) == 1
    assert float(window[20, 20 + 10]) == pytest.approx(1)
    assert float(window[20 + 14, 20]) == pytest.approx(0.5)
    assert float(window[20, 20 + 18]) == pytest.approx(0, abs=1e-6)
    assert float(window[0, 0]) == 0
    with pytest.raises(ValueError, match="smaller to a larger"):
        linear_window(40, 0.9, 0.9)


def test_a_soft_disc_falls_smoothly_from_one_to_zero() -> None:
    disc = soft_disc(40, 10, 4)
    assert float(disc[20, 30]) == 1
    assert float(disc[20, 32]) == pytest.approx(0.5)
    assert float(disc[20, 34]) == pytest.approx(0, abs=1e-6)


def coloured(n: int, box: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise whose power falls with |k|, and its true |F|² by shell."""
    ky, kx = torch.fft.fftfreq(box, 1 / box), torch.arange(box // 2 + 1).float()
    radius = torch.hypot(ky[:, None], kx[None, :])
    power = 1 + 9 / (1 + (radius / 6) ** 2)
    images = torch.fft.irfft2(torch.fft.rfft2(noise(n, box, seed)) * power.sqrt(), s=(box, box))
    return images, shell_means(power * box**2)


def test_the_noise_spectrum_is_found_beside_a_particle() -> None:
    images, truth = coloured(300, 32, 5)
    particle = 20 * soft_disc(32, 6, 4)
    estimate = NoiseEstimate(32)
    for part in (images[:100], images[100:]):
        with_particle = part + particle + 3.0
        estimate.add(with_particle, torch.fft.rfft2(with_particle))
    found = estimate.result()
    assert found.source == "outside"
    assert found.n_images == 300
    assert found.background_mean == pytest.approx(3.0, abs=0.05)
    np.testing.assert_allclose(found.noise_power[1:4], truth[1:4], rtol=0.25)  # the mask blurs the peak
    np.testing.assert_allclose(found.noise_power[3:16], truth[3:16], rtol=0.1)
    assert float(found.total_power[1]) > 10 * float(found.noise_power[1])


def test_white_noise_is_estimated_without_bias_in_every_shell() -> None:
    images = noise(2000, 16, seed=9)
    estimate = NoiseEstimate(16)
    estimate.add(images, torch.fft.rfft2(images))
    np.testing.assert_allclose(estimate.result().noise_power, 16.0**2, rtol=0.06)


def test_merged_partial_noise_estimates_equal_one_of_all_images() -> None:
    images, _ = coloured(20, 16, 6)
    whole, merged = NoiseEstimate(16), NoiseEstimate(16)
    whole.add(images, torch.fft.rfft2(images))
    for part in (images[:7], images[7:]):
        one = NoiseEstimate(16)
        one.add(part, torch.fft.rfft2(part))
        merged.merge(one)
    torch.testing.assert_close(merged.result().noise_power, whole.result().noise_power, rtol=1e-5, atol=0)
    torch.testing.assert_close(merged.result().total_power, whole.result().total_power, rtol=1e-5, atol=0)


def test_where_the_outside_was_masked_away_the_total_power_stands_in() -> None:
    images, _ = coloured(30, 32, 8)
    masked = images * soft_disc(32, 8, 3)
    estimate = NoiseEstimate(32)
    estimate.add(masked, torch.fft.rfft2(masked))
    found = estimate.result()
    assert found.source == "total"
    torch.testing.assert_close(found.noise_power, found.total_power)


def test_shells_of_white_noise_hold_its_variance_times_the_box_area() -> None:
    images = 1.5 * noise(400, 16)
    power = torch.fft.rfft2(images).abs().square().mean(0)
    np.testing.assert_allclose(shell_means(power)[1:], 1.5**2 * 16**2, rtol=0.1)
