"""Angles, shifts and remedies mean what RELION and cryoSPARC mean by them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryodrgn_pipeline.conventions import (
    SETTABLE_COLUMNS,
    Remedies,
    coma_effect,
    coma_from_beam_tilt,
    cryosparc_from_rotation,
    electron_wavelength_a,
    half_set_from_split,
    pixel_size_from_magnification,
    relion_from_rotation,
    rotation_from_cryosparc,
    rotation_from_relion,
    shift_from_px,
    split_from_half_set,
)
from cryodrgn_pipeline.particles import Poses

angle = st.floats(-180, 180, allow_nan=False)
MIRROR_Z = np.diag([1.0, 1.0, -1.0])


def euler_angles_2_matrix(rot: float, tilt: float, psi: float) -> np.ndarray:
    """RELION's formula, written out."""
    ca, cb, cg = np.cos(np.deg2rad([rot, tilt, psi]))
    sa, sb, sg = np.sin(np.deg2rad([rot, tilt, psi]))
    return np.array(
        [
            [cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb],
            [-sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb],
            [sb * ca, sb * sa, cb],
        ]
    )


def single(rot: float, tilt: float, psi: float) -> np.ndarray:
    return rotation_from_relion(np.array([rot]), np.array([tilt]), np.array([psi]))


@settings(deadline=None)
@given(angle, angle, angle)
def test_relion_angles_give_relions_own_matrix(rot: float, tilt: float, psi: float) -> None:
    np.testing.assert_allclose(single(rot, tilt, psi)[0], euler_angles_2_matrix(rot, tilt, psi), atol=2e-15)


@settings(deadline=None)
@given(angle, st.one_of(angle, st.sampled_from([0.0, 180.0, 1e-9, -1e-7, 179.9999999])), angle)
def test_rotations_come_back_from_relion_angles_even_at_poles(rot: float, tilt: float, psi: float) -> None:
    rotation = single(rot, tilt, psi)
    angles = relion_from_rotation(rotation)
    assert 0 <= angles[1][0] <= 180
    np.testing.assert_allclose(rotation_from_relion(*angles), rotation, atol=1e-14)


def test_noise_at_the_pole_does_not_turn_the_image() -> None:
    rotation = single(40, 0, 25).astype(np.float32).astype(np.float64)
    rotation[:, 0, 2] += 3e-8
    rotation[:, 2, 1] -= 2e-8
    np.testing.assert_allclose(rotation_from_relion(*relion_from_rotation(rotation)), rotation, atol=2e-7)


@settings(deadline=None)
@given(angle, angle, angle)
def test_rotations_come_back_from_cryosparc_poses(rot: float, tilt: float, psi: float) -> None:
    rotation = single(rot, tilt, psi)
    back = rotation_from_cryosparc(cryosparc_from_rotation(rotation))
    np.testing.assert_allclose(back, rotation, atol=1e-12)


def test_pose_zero_is_the_identity() -> None:
    np.testing.assert_array_equal(rotation_from_cryosparc(np.zeros((2, 3))), np.tile(np.eye(3), (2, 1, 1)))


def test_a_cryosparc_pose_is_the_inverse_of_its_rotation_vector() -> None:
    quarter_about_z = rotation_from_cryosparc(np.array([[0, 0, np.pi / 2]]))[0]
    np.testing.assert_allclose(quarter_about_z @ [1, 0, 0], [0, -1, 0], atol=1e-15)


def test_shifts_are_pixels_times_the_pixel_size_of_their_row() -> None:
    shift = shift_from_px(np.array([[1.0, -2.0], [3.0, 0.5]]), np.array([2.0, 10.0]))
    np.testing.assert_array_equal(shift, [[2, -4], [30, 5]])


def test_magnification_38168_of_a_5_um_detector_is_1_31_a() -> None:
    assert pixel_size_from_magnification(np.array(5.0), np.array(38168.0)) == pytest.approx(1.31, abs=1e-4)


def test_split_0_is_half_set_1() -> None:
    np.testing.assert_array_equal(half_set_from_split(np.array([0, 1], dtype=np.uint32)), [1, 2])
    np.testing.assert_array_equal(split_from_half_set(np.array([1, 2])), [0, 1])


@pytest.mark.parametrize(("kv", "wavelength_a"), [(300, 0.019687), (200, 0.025079), (100, 0.037014)])
def test_wavelengths_are_those_of_the_tables(kv: float, wavelength_a: float) -> None:
    assert electron_wavelength_a(np.array(kv)) == pytest.approx(wavelength_a, rel=1e-4)


def test_the_effect_of_a_beam_tilt_is_the_resolution_of_a_45_degree_phase_error() -> None:
    coma = coma_from_beam_tilt(0.5, 2.7)
    effect = coma_effect(coma, 300)
    resolution = float(effect.split(" at ")[1].split()[0])
    phase = 2 * np.pi * 0.019687**2 * coma / resolution**3
    assert np.rad2deg(phase) == pytest.approx(45, rel=0.1)  # the text has two digits


def test_each_remedy_undoes_the_mistake_it_is_for() -> None:
    rng = np.random.default_rng(0)
    rotation = rotation_from_relion(*rng.uniform(-180, 180, (3, 5)))
    shift = rng.normal(size=(5, 2))
    true = Poses(rotation=rotation, shift_a=shift)
    mistakes = {
        Remedies(transpose_rotations=True): Poses(rotation=rotation.swapaxes(1, 2), shift_a=shift),
        Remedies(negate_shifts=True): Poses(rotation=rotation, shift_a=-shift),
        Remedies(shift_scale=2.0): Poses(rotation=rotation, shift_a=shift / 2),
        Remedies(mirror_hand=True): Poses(rotation=MIRROR_Z @ rotation @ MIRROR_Z, shift_a=shift),
        Remedies(transpose_rotations=True, negate_shifts=True, shift_scale=4, mirror_hand=True): Poses(
            rotation=(MIRROR_Z @ rotation @ MIRROR_Z).swapaxes(1, 2), shift_a=-shift / 4
        ),
    }
    for remedy, mistaken in mistakes.items():
        mended = remedy.apply(mistaken)
        np.testing.assert_allclose(mended.rotation, true.rotation, atol=1e-15)
        np.testing.assert_allclose(mended.shift_a, true.shift_a, atol=1e-15)
        assert (np.abs(mistaken.rotation - rotation).max() + np.abs(mistaken.shift_a - shift).max()) > 0.1


def test_mirroring_shows_the_mirror_image_from_the_same_side() -> None:
    rotation = single(30, 60, 110)[0]
    points = np.random.default_rng(1).normal(size=(3, 7))
    mended = Remedies(mirror_hand=True).apply(Poses(rotation=rotation[None], shift_a=np.zeros((1, 2))))
    projected = (rotation @ points)[:2]
    np.testing.assert_allclose((mended.rotation[0] @ MIRROR_Z @ points)[:2], projected, atol=1e-14)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_shift_scale_that_is_no_positive_number_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="shift_scale"):
        Remedies(shift_scale=scale)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("voltage_kv", 300, 300000),
        ("pixel_size_a", 1.31, 0),
        ("contrast_sign", -1, 0),
        ("amplitude_contrast", 0.07, 7),
        ("box_size_px", 128, 128.5),
        ("defocus_u_a", -5000, 1e9),
    ],
)
def test_values_in_the_wrong_unit_are_not_plausible(name: str, good: float, bad: float) -> None:
    rule = SETTABLE_COLUMNS[name]
    np.testing.assert_array_equal(rule.plausible(np.array([good, bad])), [True, False])
