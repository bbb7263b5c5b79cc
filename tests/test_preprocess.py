"""preprocess: every image is its own original, centred, sign-corrected, cropped and windowed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import torch
from images_on_disk import import_folder, particle_set, smooth_images, write_stack
from numpy.typing import NDArray

from cryodrgn_pipeline.fourier.crop import fourier_crop
from cryodrgn_pipeline.fourier.window import linear_window, soft_disc
from cryodrgn_pipeline.io.mrc import MrcImages
from cryodrgn_pipeline.particles import ParticleSet
from cryodrgn_pipeline.preprocess import PreprocessSettings, preprocess
from cryodrgn_pipeline.stack import Stack


def mixed_set(folder: Path) -> tuple[ParticleSet, list[NDArray[np.float32]]]:
    """50 particles that alternate between two stacks of different box, pixel size and sign, in any order."""
    stacks = [smooth_images(30, 32), smooth_images(30, 40, seed=1)]
    paths = [write_stack(folder / f"{i}.mrcs", images) for i, images in enumerate(stacks)]
    random = np.random.default_rng(2)
    stack = [0, 1, 0, 1, 1] * 10
    index = [int(i) for i in random.integers(0, 30, 50)]
    pick = np.array(stack)
    particles = particle_set(
        paths,
        stack,
        index,
        box_size_px=np.array([32, 40])[pick],
        pixel_size_a=np.array([2.0, 1.5])[pick],
        optics_group=np.array([7, 3])[pick],
        contrast_sign=np.array([1.0, -1.0])[pick],
    )
    return particles, [stacks[s][i] for s, i in zip(stack, index, strict=True)]


def expected(particles: ParticleSet, row: int, image: NDArray[Any], box: int) -> torch.Tensor:
    assert particles.poses is not None
    shift = particles.poses.shift_a[row] / particles.optics.pixel_size_a[row]
    one = torch.from_numpy(image.astype(np.float32))[None]
    return (
        float(particles.contrast_sign[row])
        * fourier_crop(one, box, shift_px=torch.from_numpy(shift[None]))[0]
    )


def make(tmp_path: Path, particles: ParticleSet, name: str = "stack", **options: Any) -> Stack:
    run = {key: options.pop(key) for key in ("chunk_size", "threads") if key in options}
    source = import_folder(tmp_path / "imported", particles)
    settings = PreprocessSettings(**{"box_size_px": 16, **options})
    return preprocess(source, tmp_path / name, settings, **run)


def test_each_row_is_its_own_image_whatever_the_order_stack_box_and_pixel_size(tmp_path: Path) -> None:
    particles, originals = mixed_set(tmp_path)
    stack = make(tmp_path, particles)
    window = linear_window(16, 0.85, 0.99)
    for row, original in enumerate(originals):
        wanted = expected(particles, row, original, 16) * window
        torch.testing.assert_close(
            torch.from_numpy(stack.read(np.array([row]))[0]), wanted, atol=1e-5, rtol=0
        )


def test_pixel_sizes_are_exact_for_every_row_and_the_stack_has_that_of_most(tmp_path: Path) -> None:
    particles, _ = mixed_set(tmp_path)
    stack = make(tmp_path, particles, box_size_px=14)
    sizes = particles.optics.pixel_size_a * particles.optics.box_size_px / 14
    np.testing.assert_array_equal(stack.particles.optics.pixel_size_a, sizes)
    assert stack.pixel_size_a == 1.5 * 40 / 14  # 30 of 50 rows
    with mrcfile.open(stack.path / "images.mrcs") as mrc:
        assert float(mrc.voxel_size.x) == pytest.approx(stack.pixel_size_a, rel=1e-6)
        assert mrc.is_image_stack()


def test_the_particle_table_says_what_was_applied(tmp_path: Path) -> None:
    particles, _ = mixed_set(tmp_path)
    stack = make(tmp_path, particles)
    stored = stack.particles
    assert particles.poses is not None
    assert stored.poses is not None
    np.testing.assert_array_equal(stored.particle_id, particles.particle_id)
    np.testing.assert_array_equal(stored.poses.rotation, particles.poses.rotation)
    np.testing.assert_array_equal(stored.poses.shift_a, 0)
    np.testing.assert_array_equal(stack.applied_shift_a, particles.poses.shift_a)
    np.testing.assert_array_equal(stored.contrast_sign, 1)
    np.testing.assert_array_equal(stored.images.index, np.arange(50))
    assert stored.images.stack_paths == ("images.mrcs",)
    np.testing.assert_array_equal(stored.optics.box_size_px, 16)
    np.testing.assert_array_equal(stored.ctf.defocus_u_a, particles.ctf.defocus_u_a)


def test_chunks_and_threads_do_not_change_the_result(tmp_path: Path) -> None:
    particles, _ = mixed_set(tmp_path)
    one = make(tmp_path, particles, "one", chunk_size=1, threads=1)
    many = make(tmp_path, particles, "many", chunk_size=64, threads=3)
    odd = make(tmp_path, particles, "odd", chunk_size=7)
    for other in (one, odd):
        np.testing.assert_allclose(other.read(slice(None)), many.read(slice(None)), atol=1e-6)
        for group in (3, 7):
            np.testing.assert_allclose(other.noise[group], many.noise[group], rtol=1e-5)
    assert one.info["import_fingerprint"] == many.info["import_fingerprint"]


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float16", ">f4"])
def test_images_of_every_stored_type_are_prepared(tmp_path: Path, dtype: str) -> None:
    images = (20 * smooth_images(6, 32) + 60).clip(0, 120).astype(dtype)
    path = write_stack(tmp_path / "a.mrcs", images)
    particles = particle_set([path], [0] * 6, [5, 3, 0, 1, 2, 4])
    stack = make(tmp_path, particles, window=False)
    for row, number in enumerate([5, 3, 0, 1, 2, 4]):
        wanted = expected(particles, row, images[number], 16)
        np.testing.assert_allclose(stack.read(np.array([row]))[0], wanted, atol=1e-3)


def test_float16_stacks_differ_by_rounding_only_and_take_half_the_disk(tmp_path: Path) -> None:
    particles, _ = mixed_set(tmp_path)
    full, half = make(tmp_path, particles, "full"), make(tmp_path, particles, "half", dtype="float16")
    np.testing.assert_allclose(half.read(slice(None)), full.read(slice(None)), rtol=1e-3, atol=1e-3)
    sizes = [(stack.path / "images.mrcs").stat().st_size - 1024 for stack in (half, full)]
    assert sizes[0] * 2 == sizes[1]
    assert half.fingerprint != full.fingerprint


def test_particles_without_poses_are_prepared_uncentred_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_stack(tmp_path / "a.mrcs", smooth_images(4, 32))
    with caplog.at_level(logging.WARNING):
        stack = make(tmp_path, particle_set([path], [0] * 4, [0, 1, 2, 3], poses=False), window=False)
    assert sum("no poses" in record.message for record in caplog.records) == 1
    assert stack.particles.poses is None
    np.testing.assert_array_equal(stack.applied_shift_a, 0)
    wanted = fourier_crop(torch.from_numpy(smooth_images(4, 32)), 16)
    np.testing.assert_allclose(stack.read(slice(None)), wanted, atol=1e-5)


def test_a_mask_radius_in_angstroms_follows_each_rows_pixel_size(tmp_path: Path) -> None:
    particles, _ = mixed_set(tmp_path)
    plain = make(tmp_path, particles, "plain", window=False)
    masked = make(tmp_path, particles, "masked", window=False, mask_radius_a=20.0)
    for row in (0, 1):
        radius = 20.0 / plain.particles.optics.pixel_size_a[row]
        wanted = plain.read(np.array([row])) * soft_disc(16, radius, 0.05 * 16).numpy()
        np.testing.assert_allclose(masked.read(np.array([row])), wanted, atol=1e-6)
    np.testing.assert_array_equal(masked.noise[3], plain.noise[3])  # estimated before the mask


def test_masked_input_takes_its_noise_from_the_total_power_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = smooth_images(8, 32) * soft_disc(32, 8, 3).numpy()
    path = write_stack(tmp_path / "a.mrcs", images)
    particles = particle_set([path], [0] * 8, list(range(8)), shift_a=np.zeros((8, 2)))
    with caplog.at_level(logging.WARNING):
        stack = make(tmp_path, particles, box_size_px=32)
    assert stack.info["noise"]["1"]["source"] == "total"
    assert any("nothing is left outside" in record.getMessage() for record in caplog.records)
    np.testing.assert_array_equal(stack.noise[1], stack.total_power[1])


def test_white_noise_of_a_group_is_measured_per_cropped_coefficient(tmp_path: Path) -> None:
    images = np.random.default_rng(3).normal(0, 2, (300, 32, 32)).astype(np.float32)
    path = write_stack(tmp_path / "a.mrcs", images)
    stack = make(tmp_path, particle_set([path], [0] * 300, list(range(300))))
    truth = 2.0**2 * 32**2 * (16 / 32) ** 4
    np.testing.assert_allclose(stack.noise[1][1:8], truth, rtol=0.15)
    np.testing.assert_allclose(stack.total_power[1][1:8], truth, rtol=0.15)


def test_a_finished_stack_is_kept_and_one_of_other_options_or_particles_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    particles, _ = mixed_set(tmp_path)
    first = make(tmp_path, particles)
    written = (first.path / "images.mrcs").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        again = make(tmp_path, particles, chunk_size=5)
    assert (again.path / "images.mrcs").stat().st_mtime_ns == written
    assert any("is there already" in record.getMessage() for record in caplog.records)
    other = make(tmp_path, particles, box_size_px=12)
    assert other.box_size_px == 12
    fewer = make(tmp_path, particles.take(np.arange(50) < 49), box_size_px=12)
    assert len(fewer) == 49
    assert {path.name for path in tmp_path.iterdir()} == {"0.mrcs", "1.mrcs", "imported", "stack"}


def test_unapplied_aberrations_are_said_again_one_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    particles, _ = mixed_set(tmp_path)
    item = {"name": "beam tilt", "rows": 12, "of": 50, "max": 0.1 + 0.2, "effect": "phase error"}
    source = import_folder(tmp_path / "imported", particles, unapplied_aberrations=[item])
    with caplog.at_level(logging.WARNING):
        stack = preprocess(source, tmp_path / "stack", PreprocessSettings(box_size_px=16))
    said = [record.getMessage() for record in caplog.records if "beam tilt" in record.getMessage()]
    assert said == ["beam tilt is not applied: 12 of 50 rows, up to 0.3; phase error"]
    assert stack.info["notes"] == said


def test_real_relion_images_keep_their_mean_and_contrast(tmp_path: Path, shared_data: Path) -> None:
    images = MrcImages(shared_data / "relion31.mrcs").read(np.arange(5))
    particles = particle_set(
        [shared_data / "relion31.mrcs"], [0] * 5, [0, 1, 2, 3, 4], box_size_px=256, pixel_size_a=2.806
    )
    stack = make(tmp_path, particles, box_size_px=128, window=False)
    np.testing.assert_allclose(
        stack.read(slice(None)).mean((1, 2)), images.mean((1, 2)), atol=1e-4 * np.abs(images).max()
    )
    assert stack.pixel_size_a == 2.806 * 2
