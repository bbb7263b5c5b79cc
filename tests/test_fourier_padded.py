"""Lean padded transforms against plain ones, and the ball that holds all that slices reach."""

from __future__ import annotations

import pytest
import torch

from cryodrgn_pipeline.fourier import padded
from cryodrgn_pipeline.fourier.padded import (
    Ball,
    central_box,
    overlap_window,
    padded_spectrum,
    shell_means,
    splatting_window,
    windowed,
    windowed_unpadded,
)
from cryodrgn_pipeline.fourier.sizes import ball_points
from cryodrgn_pipeline.fourier.slices import gridding_window, volume_grid
from cryodrgn_pipeline.fourier.transforms import rfftn_radius
from cryodrgn_pipeline.subspace.solve import Lattice

BOX, SIZE = 12, 24
GRID = (SIZE, SIZE, SIZE // 2 + 1)


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded, "CHUNK_POINTS", 2000)  # several slabs, the last one smaller


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def symmetric_weight() -> torch.Tensor:
    """A weight with W(−k) = W(k), as splats over all frequencies have it."""
    return torch.fft.rfftn(random(SIZE, SIZE, SIZE)).abs()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-5 * expected.abs().max())


def test_the_padded_spectrum_is_that_of_a_plain_transform() -> None:
    volume = random(BOX, BOX, BOX)
    assert close(padded_spectrum(volume / gridding_window(BOX)), volume_grid(volume))


def test_the_central_box_is_the_adjoint_and_the_inverse_of_the_padded_spectrum() -> None:
    volume = random(BOX, BOX, BOX)
    assert close(central_box(padded_spectrum(volume)) / SIZE**3, volume)
    spectrum = torch.fft.rfftn(random(SIZE, SIZE, SIZE, seed=1))
    twice = torch.full((SIZE // 2 + 1,), 2.0)
    twice[0] = twice[-1] = 1  # the half of the spectrum that is not stored
    there = float(((padded_spectrum(volume).conj() * spectrum).real * twice).sum())
    assert there == pytest.approx(float((volume * central_box(spectrum)).sum()), rel=1e-4)


def test_windows_do_what_the_lattice_of_the_subspace_does() -> None:
    weight, lattice = symmetric_weight(), Lattice(BOX)
    lattice.mask = random(BOX, BOX, BOX, seed=2).abs()
    overlap, packed = overlap_window(lattice.mask), weight.flatten()[:, None]
    assert close(windowed(weight, splatting_window(SIZE)).flatten(), lattice.toeplitz(packed)[:, 0])
    assert close(windowed(weight, overlap).flatten(), lattice.smoothed(packed)[:, 0])
    assert close(
        windowed_unpadded(weight, overlap).flatten(), lattice.blocks(packed.clone(), exact=False)[:, 0]
    )


def test_shell_means_are_means_over_shells() -> None:
    weight = symmetric_weight()
    shell = (rfftn_radius(SIZE) / 2).round()
    expected = torch.stack([weight[shell == number].double().mean() for number in range(BOX // 2 + 1)])
    assert close(shell_means(BOX, weight.__getitem__), expected)


def test_a_ball_holds_the_grid_up_to_the_radius_of_its_corners() -> None:
    ball, grid = Ball(BOX), random(*GRID)
    kept = ball.grid(ball.packed(grid))
    radius = rfftn_radius(SIZE)
    near = radius <= SIZE / 2 + 3**0.5
    assert torch.equal(kept[near], grid[near])
    assert not kept[~near].any()
    assert ball.points == int(near.sum())
    row = (5, 20)
    assert ball.packed(grid)[ball.start[row] + 3] == grid[(*row, 3)]


@pytest.mark.parametrize("box_size_px", [32, 64])
def test_the_size_of_a_ball_is_known_before_it_is_made(box_size_px: int) -> None:
    assert ball_points(box_size_px) == pytest.approx(Ball(box_size_px).points, rel=0.01)
