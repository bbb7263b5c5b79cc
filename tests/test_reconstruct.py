"""Backprojection gives the object back, at its own grey scale, the same from either kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.fourier.fsc import fsc
from cryodrgn_pipeline.fourier.slices import extract_slices, slice_coordinates, volume_grid
from cryodrgn_pipeline.fourier.transforms import HalfPlane, half_plane, half_plane_coefficients
from cryodrgn_pipeline.fourier_images import FourierImages, noise_weights
from cryodrgn_pipeline.half_sets import half_sets, image_of_id
from cryodrgn_pipeline.particles import Ctf, ImageRef, Optics, ParticleSet
from cryodrgn_pipeline.reconstruct import Backprojection, prior_from_fsc, shell_mean_weight
from cryodrgn_pipeline.reconstruct_kernels import balanced_slabs, correlate
from tests.blobs import density, projections, rotations

BOX = 24


def oscillating_ctf(plane: HalfPlane, count: int) -> torch.Tensor:
    """CTFs with zeros at other places in every image."""
    phase = torch.linspace(0.02, 0.05, count)[:, None] * plane.radius**2
    return torch.sin(phase + 0.3)


def blob_images(count: int, *, noise: float = 0.0, scale: float = 1.0, seed: int = 0) -> FourierImages:
    """Projections of the blobs with CTF and noise; `scale` is volume over image pixel size."""
    plane, rotation = half_plane(BOX, BOX / 2 - 0.5), rotations(count, seed)
    transfer = oscillating_ctf(plane, count)
    if scale == 1.0:
        exact = half_plane_coefficients(projections(BOX, rotation), plane)
    else:
        where = slice_coordinates(plane, rotation, torch.full((count,), scale))
        exact = scale**2 * extract_slices(volume_grid(density(BOX)), where)
    spread = torch.randn(exact.shape, dtype=exact.dtype, generator=torch.Generator().manual_seed(seed))
    return FourierImages(
        plane=plane,
        coefficients=transfer * exact + noise * spread,
        ctf=transfer * scale**2,
        rotation=rotation,
        scale=torch.full((count,), scale),
        noise_group=torch.arange(count) % 2,
    )


def backprojected(images: FourierImages, kernel: str, sets: int = 2) -> Backprojection:
    sums = Backprojection(BOX, sets, kernel=kernel)
    weight = torch.stack([torch.ones(len(images.plane)), 1 / (1 + images.plane.radius / 10)])
    sums.add(images, torch.arange(len(images)) % sets, weight)
    return sums


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(np.corrcoef(first.flatten(), second.flatten())[0, 1])


@pytest.mark.parametrize("kernel", ["torch", "numba"])
def test_noise_free_projections_give_the_object_back_at_its_grey_scale(kernel: str) -> None:
    volume = density(BOX)
    volume = volume - volume.mean()  # images tell nothing about the mean of the box
    found = backprojected(blob_images(400), kernel).map([0, 1])
    assert correlation(found, volume) > 0.99
    assert float((found * volume).sum() / (volume * volume).sum()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("sets", [1, 2, 3])
def test_both_kernels_make_the_same_sums(sets: int) -> None:
    images = blob_images(40, noise=1.0, scale=1.07)
    compiled, reference = (backprojected(images, kernel, sets).sums for kernel in ("numba", "torch"))
    assert float(reference.abs().max()) > 1
    torch.testing.assert_close(compiled, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_slabs_share_out_all_planes_once(threads: int) -> None:
    edges = balanced_slabs(48, threads)
    assert edges[0] == 0
    assert edges[-1] == 48
    assert len(edges) == threads + 1
    assert (np.diff(edges) > 0).all()


def test_many_slabs_give_the_sums_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    images = blob_images(30, noise=1.0)
    one = backprojected(images, "numba").sums
    monkeypatch.setattr("cryodrgn_pipeline.reconstruct_kernels.use_threads", lambda wanted: 7)
    torch.testing.assert_close(backprojected(images, "numba").sums, one, rtol=1e-4, atol=1e-3)


def test_images_of_another_pixel_size_show_the_same_object() -> None:
    volume = density(BOX) - density(BOX).mean()
    mixed = backprojected(blob_images(300), "numba")
    mixed.add(
        blob_images(300, scale=0.9, seed=5), torch.arange(300) % 2, torch.ones(2, len(blob_images(1).plane))
    )
    found = mixed.map([0, 1])
    assert correlation(found, volume) > 0.99
    assert float((found * volume).sum() / (volume * volume).sum()) == pytest.approx(1, abs=0.06)


def test_the_wiener_filter_brings_a_noisy_map_nearer_to_the_truth() -> None:
    volume = density(BOX) - density(BOX).mean()
    sums = backprojected(blob_images(200, noise=40.0), "numba")
    curve = fsc(sums.map(0), sums.map(1))
    prior = prior_from_fsc(curve, shell_mean_weight(sums.weight([0, 1]), BOX))
    plain, filtered = sums.map([0, 1]), sums.map([0, 1], prior)
    assert float((filtered - volume).square().sum()) < 0.7 * float((plain - volume).square().sum())
    assert correlation(filtered, volume) > correlation(plain, volume)


def test_the_prior_grows_as_the_correlation_falls() -> None:
    curve = torch.tensor([1.0, 0.99, 0.5, 0.1, 0.3, 0.0])
    prior = prior_from_fsc(curve, torch.ones(6, dtype=torch.float64))
    assert (prior.diff() >= 0).all()
    assert float(prior[2]) == pytest.approx(0.5)


def test_votes_of_the_kernel_are_normalised_correlations_with_slices() -> None:
    images = blob_images(6, noise=30.0)
    grid = volume_grid(density(BOX)).to(torch.complex64)
    weight = torch.rand(2, len(images.plane), generator=torch.Generator().manual_seed(1))
    votes = np.empty(6)
    correlate(
        grid[None].numpy(), np.zeros(6, np.int64), images.rotation.numpy(), (images.scale * 2).numpy(),
        images.plane.kx.float().numpy(), images.plane.ky.float().numpy(), images.coefficients.numpy(),
        images.ctf.numpy(), weight.numpy(), images.noise_group.numpy(), votes,
    )  # fmt: skip
    seen = images.ctf * extract_slices(grid, slice_coordinates(images.plane, images.rotation))
    w = weight[images.noise_group]
    inner = (w * (seen.conj() * images.coefficients).real).sum(dim=1)
    expected = inner / (w * seen.abs() ** 2).sum(dim=1).sqrt()
    np.testing.assert_allclose(votes, expected.numpy(), rtol=1e-3)


def test_noise_weights_follow_the_spectrum_of_each_group() -> None:
    plane = half_plane(8, 3)
    weight, rows = noise_weights({7: np.full(5, 2.0), 3: np.array([1.0, 1, 4, 4, 4])}, plane)
    assert rows == {3: 0, 7: 1}
    assert float(weight.mean()) == pytest.approx(1, rel=1e-5)
    ratio = weight[0] / weight[1]
    assert float(ratio[plane.radius == 1][0]) == pytest.approx(2)
    assert float(ratio[plane.radius == 3][0]) == pytest.approx(0.5)
    for wrong in (np.zeros(5), np.array([1.0, np.nan, 1, 1, 1])):
        with pytest.raises(InputFormatError, match=r"optics group 1 .* must be positive"):
            noise_weights({1: wrong}, plane)


def test_shells_without_noise_get_no_boundless_weight() -> None:
    plane = half_plane(12, 5)
    weight, _ = noise_weights({1: np.array([1.0, 1, 1, 1, 1, 1e-12, 0])}, plane)
    assert float(weight.max() / weight.min()) == pytest.approx(1e3, rel=1e-3)


def some_particles(ids: list[str], half_set: list[int] | None) -> ParticleSet:
    n = len(ids)
    one = np.ones(n)
    return ParticleSet(
        particle_id=np.array(ids, dtype=object),
        images=ImageRef(stack_paths=("a.mrcs",), stack=np.zeros(n, np.int64), index=np.arange(n)),
        optics=Optics(
            optics_group=np.ones(n, np.int64), pixel_size_a=one, box_size_px=np.full(n, 8),
            voltage_kv=300 * one, cs_mm=one, amplitude_contrast=0.1 * one,
        ),
        ctf=Ctf(defocus_u_a=one, defocus_v_a=one, defocus_angle_deg=one, phase_shift_deg=0 * one),
        poses=None,
        contrast_sign=one,
        half_set=None if half_set is None else np.array(half_set),
    )  # fmt: skip


def test_half_sets_of_the_source_are_kept() -> None:
    half, source = half_sets(some_particles(["1@a", "2@a", "3@a"], [2, 1, 2]))
    assert source == "source"
    assert half.tolist() == [1, 0, 1]


def test_without_half_sets_images_are_dealt_evenly_and_repeats_stay_together() -> None:
    ids = [f"{i}@a" for i in range(50)] + [f"{i}@a#2" for i in range(50)]
    for given in (None, [1] * 100):
        half, source = half_sets(some_particles(ids, given), seed=3)
        assert source == "random"
        assert half[:50].tolist() == half[50:].tolist()
        assert half.sum() == 50
    assert image_of_id(np.array([2**63 + 1], dtype=np.uint64))[0] == 2**63 + 1


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel"):
        Backprojection(8, kernel="cuda")
