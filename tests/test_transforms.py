"""Centred transforms and the half plane: the invariants that everything downstream rests on."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cryodrgn_pipeline.fourier.transforms import (
    centred_fft,
    half_plane,
    half_plane_coefficients,
    hartley,
    symmetrise,
)

boxes = st.sampled_from([4, 6, 8, 10, 16, 32])
seeds = st.integers(0, 2**31)


def random_images(box_size_px: int, seed: int, n: int = 2) -> torch.Tensor:
    return torch.randn(n, box_size_px, box_size_px, generator=torch.Generator().manual_seed(seed)).double()


def test_a_point_at_the_box_centre_has_a_flat_real_transform():
    image = torch.zeros(8, 8)
    image[4, 4] = 1
    torch.testing.assert_close(centred_fft(image), torch.ones(8, 8, dtype=torch.complex64))


@given(boxes, seeds)
def test_real_images_have_friedel_symmetry_on_the_symmetrised_lattice(box_size_px, seed):
    f = symmetrise(centred_fft(random_images(box_size_px, seed)))[:, 1:-1, 1:-1]  # edges: real-space sampling
    torch.testing.assert_close(f, f.flip(-1, -2).conj())


@given(boxes, seeds)
def test_two_hartley_transforms_return_the_image(box_size_px, seed):
    images = random_images(box_size_px, seed)
    torch.testing.assert_close(hartley(hartley(images)) / box_size_px**2, images)


def test_the_three_dimensional_transform_agrees_with_the_sum_that_defines_it():
    x = torch.randn(4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    n = np.arange(4) - 2
    wave = np.exp(-2j * np.pi * np.outer(n, n) / 4)
    expected = np.einsum("ai,bj,ck,ijk->abc", wave, wave, wave, x.numpy())
    np.testing.assert_allclose(centred_fft(x, 3).numpy(), expected, atol=1e-12)


@given(boxes, seeds)
def test_half_plane_coefficients_are_those_of_the_centred_transform(box_size_px, seed):
    images = random_images(box_size_px, seed)
    plane = half_plane(box_size_px)
    edge = box_size_px // 2
    lattice = symmetrise(centred_fft(images))
    torch.testing.assert_close(
        half_plane_coefficients(images, plane), lattice[:, plane.ky + edge, plane.kx + edge]
    )


@pytest.mark.parametrize(("box_size_px", "disc_points"), [(64, 3208), (128, 12852), (256, 51432)])
def test_the_half_plane_is_half_the_disc_without_dc(box_size_px, disc_points):
    plane = half_plane(box_size_px)
    assert 2 * len(plane) == disc_points
    k = torch.stack([plane.ky, plane.kx], dim=1)
    both = torch.cat([k, -k])
    assert len(torch.unique(both, dim=0)) == disc_points


def test_odd_boxes_are_refused():
    with pytest.raises(ValueError, match="even"):
        half_plane(65)


def test_images_of_another_box_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        half_plane_coefficients(torch.zeros(1, 8, 8), half_plane(16))
