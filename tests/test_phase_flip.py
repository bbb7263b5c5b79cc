"""phase-flip: image by image what a float64 transform over the full plane gives."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
from images_on_disk import import_folder, particle_set, smooth_images, write_stack
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.io.mrc import MrcImages
from cryodrgn_pipeline.particles import ParticleSet
from cryodrgn_pipeline.phase_flip import phase_flip


def ctf_over_the_plane(
    particles: ParticleSet, row: int, box: int, nyquist: tuple[int, int]
) -> NDArray[np.float64]:
    """The formula as RELION writes it, with an arctangent; `nyquist` gives the signs of ±D/2 in y and x."""
    optics, defocus = particles.optics, particles.ctf
    axes = []
    for sign in nyquist:
        k = np.fft.fftfreq(box, 1 / box)
        k[box // 2] = sign * box / 2
        axes.append(k / (box * optics.pixel_size_a[row]))
    ky, kx = np.meshgrid(*axes, indexing="ij")
    volts = optics.voltage_kv[row] * 1e3
    wavelength = 12.2639 / np.sqrt(volts + 0.97845e-6 * volts**2)
    squared, angle = kx**2 + ky**2, np.arctan2(ky, kx)
    u, v = defocus.defocus_u_a[row], defocus.defocus_v_a[row]
    here = (u + v + (u - v) * np.cos(2 * (angle - np.deg2rad(defocus.defocus_angle_deg[row])))) / 2
    gamma = 2 * np.pi * (
        -0.5 * here * wavelength * squared + 0.25 * optics.cs_mm[row] * 1e7 * wavelength**3 * squared**2
    ) - np.deg2rad(defocus.phase_shift_deg[row])
    w = optics.amplitude_contrast[row]
    ctf: NDArray[np.float64] = -(np.sqrt(1 - w**2) * np.sin(gamma) - w * np.cos(gamma))
    return ctf


def flipped_by_numpy(particles: ParticleSet, row: int, image: NDArray[np.float32]) -> NDArray[np.float64]:
    spectrum = np.fft.fft2(image.astype(np.float64))
    corners = [(y, x) for y in (-1, 1) for x in (-1, 1)]  # +D/2 and −D/2 are one frequency: their mean
    signs = [np.sign(ctf_over_the_plane(particles, row, len(image), corner)) for corner in corners]
    flipped: NDArray[np.float64] = np.fft.ifft2(spectrum * np.mean(signs, axis=0)).real
    return flipped


@pytest.mark.parametrize("phase_shift", [0.0, 90.0])
def test_every_image_equals_the_full_plane_computation(tmp_path: Path, phase_shift: float) -> None:
    stacks = [smooth_images(20, 32), smooth_images(20, 32, seed=4)]
    paths = [write_stack(tmp_path / f"{i}.mrcs", images) for i, images in enumerate(stacks)]
    stack, index = [0, 1, 1] * 10, [int(i) for i in np.random.default_rng(5).integers(0, 20, 30)]
    particles = particle_set(
        paths, stack, index, phase_shift_deg=phase_shift, contrast_sign=-1.0, pixel_size_a=1.1
    )
    source = import_folder(tmp_path / "imported", particles)
    phase_flip(source, tmp_path / "flipped.mrcs", chunk_size=7)
    with mrcfile.open(tmp_path / "flipped.mrcs") as mrc:
        got = np.array(mrc.data)
        assert float(mrc.voxel_size.x) == pytest.approx(1.1, rel=1e-6)
        assert mrc.is_image_stack()
    assert got.shape == (30, 32, 32)
    for row in range(30):
        original = stacks[stack[row]][index[row]]
        np.testing.assert_allclose(got[row], flipped_by_numpy(particles, row, original), atol=2e-5)
        assert not np.allclose(got[row], original, atol=0.1)
    assert mrcfile.validate(tmp_path / "flipped.mrcs")


def test_flipping_twice_gives_the_original_back_but_for_nyquist(tmp_path: Path) -> None:
    images = smooth_images(5, 32)
    path = write_stack(tmp_path / "a.mrcs", images)
    phase_flip(
        import_folder(tmp_path / "one", particle_set([path], [0] * 5, list(range(5)))), tmp_path / "b.mrcs"
    )
    again = particle_set([tmp_path / "b.mrcs"], [0] * 5, list(range(5)))
    phase_flip(import_folder(tmp_path / "two", again), tmp_path / "c.mrcs")
    with mrcfile.open(tmp_path / "c.mrcs") as mrc:
        difference = np.fft.fft2(np.array(mrc.data) - images)
    inner = np.abs(np.fft.fftfreq(32, 1 / 32)) < 16
    assert np.abs(difference[:, inner][:, :, inner]).max() < 1e-2


def test_real_images_flip_by_their_own_ctf(tmp_path: Path, shared_data: Path) -> None:
    images = MrcImages(shared_data / "relion31.mrcs").read(np.arange(5))
    particles = particle_set(
        [shared_data / "relion31.mrcs"], [0] * 5, [4, 3, 2, 1, 0], box_size_px=256, pixel_size_a=2.806
    )
    phase_flip(import_folder(tmp_path / "imported", particles), tmp_path / "f.mrcs")
    with mrcfile.open(tmp_path / "f.mrcs") as mrc:
        for row in range(5):
            wanted = flipped_by_numpy(particles, row, images[4 - row])
            np.testing.assert_allclose(mrc.data[row], wanted, atol=1e-5 * np.abs(images).max())


def test_flipped_images_can_be_cropped_and_mixed_boxes_need_it(tmp_path: Path) -> None:
    paths = [write_stack(tmp_path / f"{box}.mrcs", smooth_images(3, box)) for box in (32, 40)]
    particles = particle_set(paths, [0, 1, 1], [0, 1, 2], box_size_px=[32, 40, 40])
    source = import_folder(tmp_path / "imported", particles)
    with pytest.raises(InputFormatError, match="from 32 to 40 px"):
        phase_flip(source, tmp_path / "f.mrcs")
    with pytest.raises(ConfigError, match="at most 32"):
        phase_flip(source, tmp_path / "f.mrcs", box_size_px=34)
    assert not (tmp_path / "f.mrcs").exists()
    phase_flip(source, tmp_path / "f.mrcs", box_size_px=16)
    with mrcfile.open(tmp_path / "f.mrcs") as mrc:
        assert mrc.data.shape == (3, 16, 16)
        assert float(mrc.voxel_size.x) == pytest.approx(2.0 * 40 / 16)


def test_the_output_must_be_an_mrc_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.mrcs"):
        phase_flip(tmp_path, tmp_path / "out.star")
