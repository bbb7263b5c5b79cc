"""FSC, its resolution, its correction for a mask; masks that hold the particle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryodrgn_pipeline.fourier.fsc import (
    corrected_fsc,
    fsc,
    mean_fsc,
    randomise_phases,
    resolution_a,
    shell_index,
)
from cryodrgn_pipeline.fourier.masks import particle_mask, soft_ball
from tests.blobs import density


def noise(box: int, seed: int) -> torch.Tensor:
    return torch.randn(box, box, box, generator=torch.Generator().manual_seed(seed))


def test_a_map_correlates_fully_with_itself_at_any_scale_and_not_with_noise() -> None:
    volume = noise(24, 1)
    torch.testing.assert_close(fsc(volume, 3.5 * volume), torch.ones(13, dtype=torch.float64))
    torch.testing.assert_close(fsc(volume, -volume), -torch.ones(13, dtype=torch.float64))
    assert float(fsc(volume, noise(24, 2))[6:].abs().max()) < 0.15


def test_fsc_equals_the_sum_over_every_coefficient_of_the_full_transform() -> None:
    first, second = noise(10, 3), noise(10, 3) + noise(10, 4)
    f, g = np.fft.fftn(first.double().numpy()), np.fft.fftn(second.double().numpy())
    k = np.fft.fftfreq(10, 0.1)
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None] ** 2)
    shell = np.rint(radius).astype(int)
    for number, value in enumerate(fsc(first, second).tolist()):
        at = shell == number
        expected = (f[at] * g[at].conj()).real.sum() / np.sqrt(
            (abs(f[at]) ** 2).sum() * (abs(g[at]) ** 2).sum()
        )
        assert value == pytest.approx(expected, rel=1e-4)


def test_half_maps_of_known_noise_give_the_known_fsc() -> None:
    signal = noise(32, 5)
    curve = fsc(signal + noise(32, 6), signal + noise(32, 7))
    assert float(curve[8:].mean()) == pytest.approx(0.5, abs=0.03)


def test_resolution_is_where_the_curve_first_falls_below_interpolated() -> None:
    curve = torch.tensor([1.0, 1.0, 0.8, 0.2, 0.6, 0.0])
    assert resolution_a(curve, 0.5, 10, 2.0) == pytest.approx(20 / 2.5)
    assert resolution_a(torch.ones(6), 0.5, 10, 2.0) == pytest.approx(4.0)
    assert resolution_a(torch.tensor([1.0, 0.1, 0.9]), 0.5, 4, 2.0) is None


def test_random_phases_keep_amplitudes_and_low_shells() -> None:
    volume = density(20) + 0.1 * noise(20, 8)
    random = randomise_phases(volume, 4, torch.Generator().manual_seed(0))
    f, g = torch.fft.rfftn(volume), torch.fft.rfftn(random)
    low = shell_index(20) < 4
    torch.testing.assert_close(f[low], g[low], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(f.abs(), g.abs(), rtol=2e-3, atol=2e-3)
    assert float(fsc(volume, random)[6:].abs().max()) < 0.4


def test_the_correction_takes_back_what_a_tight_mask_alone_correlates() -> None:
    mask = soft_ball(32, 5.0, 1.0)
    signal = 60 * density(32)
    masked, corrected = corrected_fsc(signal + noise(32, 9), signal + noise(32, 10), mask)
    high = slice(13, 16)
    assert float(corrected[high].mean()) < float(masked[high].mean()) + 1e-6
    assert float(corrected[high].abs().mean()) < 0.3
    torch.testing.assert_close(masked[:4], corrected[:4])


def test_the_mean_weighs_shells_by_their_radius_and_leaves_out_the_origin() -> None:
    assert mean_fsc(torch.tensor([9.0, 1.0, 0.0, 0.0]), 2) == pytest.approx(1 / 3)


def test_maps_of_different_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match="no common shells"):
        fsc(noise(8, 0), noise(10, 0))


def test_the_particle_mask_holds_the_particle_and_little_else() -> None:
    volume = density(32)
    noisy = volume + 0.1 * noise(32, 11)
    mask = particle_mask(noisy, noise=0.1 * noise(32, 12))
    assert float(mask[volume > 0.2 * volume.max()].min()) > 0.99
    assert float(mask.mean()) < 0.35
    assert float(mask.min()) >= 0
    assert float(mask.max()) <= 1
    edges = torch.cat([mask[0].flatten(), mask[:, 0].flatten(), mask[..., 0].flatten()])
    assert float(edges.max()) == 0


def test_specks_far_from_the_particle_are_left_out_of_the_mask() -> None:
    volume = density(48)
    volume[24, 24, 43] = 4 * volume.max()  # enough to pass the threshold after the low-pass
    assert float(particle_mask(volume)[24, 24, 43]) == 0


def test_where_nothing_stands_out_the_mask_is_the_ball() -> None:
    mask = particle_mask(torch.zeros(32, 32, 32), noise=noise(32, 13))
    assert float(mask[16, 16, 16]) == 1
    assert float(mask.mean()) > 0.2
