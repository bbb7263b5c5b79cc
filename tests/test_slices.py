"""Slices hold the Fourier slice theorem in both axis orders, and splatting is their exact adjoint."""

from __future__ import annotations

import pytest
import torch

from cryodrgn_pipeline.fourier.slices import (
    complete_splat,
    extract_slices,
    grid_volume,
    gridding_window,
    resample_volume,
    slice_coordinates,
    splat_slices,
    volume_grid,
)
from cryodrgn_pipeline.fourier.transforms import half_plane, half_plane_coefficients
from tests.blobs import CENTRES, density, projections, rotations

BOX = 32


def relative(difference: torch.Tensor, of: torch.Tensor) -> float:
    return float(difference.abs().pow(2).sum().sqrt() / of.abs().pow(2).sum().sqrt())


def test_a_slice_is_the_transform_of_the_projection_of_the_rotated_object() -> None:
    plane, rotation = half_plane(BOX, BOX / 2 - 1), rotations(6)
    slices = extract_slices(volume_grid(density(BOX)), slice_coordinates(plane, rotation))
    truth = half_plane_coefficients(projections(BOX, rotation), plane)
    assert relative(slices - truth, truth) < 0.01


def test_the_transposed_rotation_gives_another_slice() -> None:
    plane, rotation = half_plane(BOX, BOX / 2 - 1), rotations(6)
    slices = extract_slices(volume_grid(density(BOX)), slice_coordinates(plane, rotation.transpose(1, 2)))
    truth = half_plane_coefficients(projections(BOX, rotation), plane)
    assert relative(slices - truth, truth) > 0.5


def test_without_rotation_a_slice_is_the_sum_along_z_which_is_the_first_array_axis() -> None:
    plane = half_plane(BOX, BOX / 2 - 1)
    volume = density(BOX)
    slices = extract_slices(volume_grid(volume), slice_coordinates(plane, torch.eye(3)[None]))
    truth = half_plane_coefficients(volume.sum(dim=0)[None], plane)
    assert relative(slices - truth, truth) < 0.03  # all samples lie on the grid, where the window is not felt


def test_coordinates_are_x_y_z_and_rows_times_the_rotation() -> None:
    plane, rotation = half_plane(8), rotations(2)
    coordinates = slice_coordinates(plane, rotation, torch.tensor([1.0, 2.0]))
    k = torch.stack([plane.kx, plane.ky, torch.zeros_like(plane.kx)], dim=-1).float()
    for image, scale in enumerate((1.0, 2.0)):
        expected = scale * k @ rotation[image]
        torch.testing.assert_close(coordinates[image], expected, rtol=1e-5, atol=1e-5)


def test_gridding_correction_is_what_makes_slices_true() -> None:
    plane, rotation = half_plane(BOX, BOX / 2 - 1), rotations(4)
    truth = half_plane_coefficients(projections(BOX, rotation), plane)
    where = slice_coordinates(plane, rotation)
    corrected = extract_slices(volume_grid(density(BOX)), where)
    plain = extract_slices(volume_grid(density(BOX) * gridding_window(BOX)), where)
    assert relative(plain - truth, truth) > 2 * relative(corrected - truth, truth)


def test_k_and_minus_k_give_conjugate_values() -> None:
    grid = volume_grid(torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(1)))
    where = (torch.rand(1, 200, 3, generator=torch.Generator().manual_seed(2)) - 0.5) * 14
    torch.testing.assert_close(extract_slices(grid, where), extract_slices(grid, -where).conj())


def test_the_centre_of_the_box_does_not_move_when_rotated() -> None:
    volume = torch.zeros(16, 16, 16)
    volume[8, 8, 8] = 1.0
    slices = extract_slices(volume_grid(volume), slice_coordinates(half_plane(16, 7), rotations(5)))
    torch.testing.assert_close(slices, torch.ones_like(slices), rtol=1e-4, atol=1e-4)


def test_splatting_is_the_exact_adjoint_of_slicing() -> None:
    generator = torch.Generator().manual_seed(3)
    plane, rotation = half_plane(12, 5), rotations(7).double()
    x = torch.randn(24, 24, 13, generator=generator, dtype=torch.complex128)
    y = torch.randn(7, len(plane), generator=generator, dtype=torch.complex128)
    where = slice_coordinates(plane, rotation, torch.linspace(0.9, 1.1, 7))
    left = float((extract_slices(x, where).conj() * y).real.sum())
    right = float((x.conj() * splat_slices(y, where, 24)).real.sum())
    assert left == pytest.approx(right, rel=1e-10)
    assert abs(left) > 1e-3


def test_a_completed_splat_is_hermitian_on_the_plane_that_holds_k_and_minus_k() -> None:
    generator = torch.Generator().manual_seed(4)
    plane = half_plane(12, 5)
    where = slice_coordinates(plane, rotations(3).double())
    y = torch.randn(3, len(plane), generator=generator, dtype=torch.complex128)
    both = splat_slices(torch.cat([y, y.conj()]), torch.cat([where, -where]), 24)
    once = splat_slices(y, where, 24)
    torch.testing.assert_close(2 * once, both)  # −k falls on the same half of the grid as k
    completed = complete_splat(once)
    torch.testing.assert_close(completed[..., 1:], once[..., 1:])
    flipped = torch.roll(torch.flip(once[..., 0], (0, 1)), (1, 1), (0, 1)).conj()
    torch.testing.assert_close(completed[..., 0], once[..., 0] + flipped)
    torch.testing.assert_close(
        torch.roll(torch.flip(completed[..., 0], (0, 1)), (1, 1), (0, 1)).conj(), completed[..., 0]
    )


def test_a_volume_comes_back_from_its_grid() -> None:
    volume = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(5))
    grid = volume_grid(volume * gridding_window(16) ** 2)  # either way takes the window off once
    torch.testing.assert_close(grid_volume(grid, 16), volume, rtol=1e-4, atol=1e-4)


def test_beyond_the_grid_the_transform_is_zero() -> None:
    grid = volume_grid(torch.ones(8, 8, 8))
    assert torch.all(extract_slices(grid, torch.tensor([[[0.0, 7.9, 0.0], [5.0, 0.0, 0.0]]])) == 0)


def test_resampling_keeps_place_and_grey_scale() -> None:
    # the same object with half the voxel size: twice the distances in px, the same density
    coarse = resample_volume(density(2 * BOX, 2 * CENTRES), 1.0, BOX, 2.0)
    fine = density(2 * BOX, 2 * CENTRES)[::2, ::2, ::2]
    assert float((coarse - fine).abs().max()) < 0.12 * float(fine.max())
    same = resample_volume(density(BOX), 3.0, BOX, 3.0)
    assert relative(same - density(BOX), density(BOX)) < 1e-3


def test_odd_or_flat_volumes_are_refused() -> None:
    with pytest.raises(ValueError, match="even cube"):
        volume_grid(torch.zeros(7, 7, 7))
    with pytest.raises(ValueError, match="even cube"):
        volume_grid(torch.zeros(8, 8, 6))
