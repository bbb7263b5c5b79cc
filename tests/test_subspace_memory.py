"""The subspace's formulas of memory against what is allocated."""

from __future__ import annotations

import pytest
import torch

from cryodrgn_pipeline.fourier.sizes import half_plane_points
from cryodrgn_pipeline.subspace.images import level_plane
from cryodrgn_pipeline.subspace.levels import levels_of
from cryodrgn_pipeline.subspace.memory import (
    BUDGET_BYTES,
    KEPT_BYTES,
    STREAMED_BYTES,
    affordable,
    affordable_curves,
    coefficient_bytes,
    learning_bytes,
    required_bytes,
)
from cryodrgn_pipeline.subspace.sums import NormalEquations


@pytest.mark.parametrize("box_size_px", [16, 64, 128])
def test_an_image_has_the_coefficients_and_bytes_of_the_formula(box_size_px: int) -> None:
    points = len(level_plane(box_size_px, box_size_px))
    assert half_plane_points(box_size_px) == pytest.approx(points, rel=0.05)
    coefficients, transfer = torch.zeros(points, dtype=torch.complex64), torch.zeros(points)
    assert coefficient_bytes(points) == coefficients.nbytes + transfer.nbytes


@pytest.mark.parametrize("exact", [True, False])
def test_the_sums_fit_into_what_a_solve_is_said_to_take(exact: bool) -> None:
    sums = NormalEquations(32, 13, exact=exact)
    held = sums.right.nbytes + sums.normal.nbytes
    assert 0.4 * required_bytes(32, 13, int(exact)) < held < required_bytes(32, 13, int(exact))


def test_more_maps_are_solved_for_where_they_fit() -> None:
    assert affordable(64, 12, 5) == (12, 5)
    most, iterations = affordable(256, 12, 5)
    assert (most, iterations) == (4, 0)
    assert required_bytes(256, 1 + most, iterations) < BUDGET_BYTES < required_bytes(256, 1 + most, 5)


def test_curved_maps_are_left_out_before_the_exact_solve_and_components_never() -> None:
    assert affordable_curves(64, 1, 5) == (1, 5)
    assert affordable_curves(64, 8, 5) == (2, 5)
    assert affordable_curves(128, 12, 5) == (0, 5)
    assert affordable_curves(256, 8, 5) == (0, 0)


def test_images_are_kept_up_to_a_limit_and_stream_beyond_it() -> None:
    fitting = KEPT_BYTES // coefficient_bytes(half_plane_points(64))
    few, many = (learning_bytes(n, n, 64, 13, (13, 5), level_maps=13) for n in (fitting, fitting + 1))
    assert few - many == pytest.approx(KEPT_BYTES * 3 / 4, rel=0.01)  # those of 32 px are kept still
    assert learning_bytes(1, 1, 16, 2, (2, 5), level_maps=2) > STREAMED_BYTES


@pytest.mark.parametrize(
    ("box_size_px", "levels"), [(8, [8]), (16, [16]), (24, [16, 24]), (64, [16, 32, 64]), (256, [16, 32, 64])]
)
def test_levels_go_from_coarse_to_fine(box_size_px: int, levels: list[int]) -> None:
    assert levels_of(box_size_px) == levels
