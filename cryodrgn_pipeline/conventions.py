"""The one place that knows how RELION and cryoSPARC write angles, shifts, pixel sizes and aberrations.

Canonical form, and each source's deviation from it, is told in docs/conventions.md. In short: rotation R maps
object to image coordinates, +shift (Å) centres the particle, defocus and Cs as in RELION, angles in degrees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.particles import Poses

Array = NDArray[np.float64]

A_PER_UM = 1e4
A_PER_MM = 1e7
MIRROR = np.array([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]])
"""Entry signs of M R M for M = diag(1, 1, −1)."""


def rotation_from_relion(rot_deg: Array, tilt_deg: Array, psi_deg: Array) -> Array:
    """Rotation matrices of RELION's Euler angles, equal to its `Euler_angles2matrix`.

    Parameters
    ----------
    rot_deg, tilt_deg, psi_deg
        `(N,)` rlnAngleRot, rlnAngleTilt and rlnAnglePsi in degrees.

    Returns
    -------
    `(N, 3, 3)`, object to image.
    """
    from scipy.spatial.transform import Rotation

    angles = np.stack([rot_deg, tilt_deg, psi_deg], axis=-1)
    matrices: Array = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix()
    return matrices.swapaxes(-1, -2)


def relion_from_rotation(rotation: Array) -> tuple[Array, Array, Array]:
    """RELION's rot, tilt and psi `(N,)` in degrees of `(N, 3, 3)` rotations, tilt in [0, 180].

    Where tilt is 0 or 180, rot and psi are not determined one by one; any noise in rot is made up by psi, so
    that the three together always give the rotation back.
    """
    inverse = rotation.swapaxes(-1, -2)  # = Rz(rot) Ry(tilt) Rz(psi)
    sine = np.hypot(inverse[:, 0, 2], inverse[:, 1, 2])
    rot = np.where(sine > 0, np.arctan2(inverse[:, 1, 2], inverse[:, 0, 2]), 0.0)
    tilt = np.arctan2(sine, inverse[:, 2, 2])
    # first column of Ry(−tilt) Rz(−rot) · inverse = Rz(psi): (cos psi, sin psi, 0)
    along = np.cos(rot) * inverse[:, 0, 0] + np.sin(rot) * inverse[:, 1, 0]
    cosine = np.cos(tilt) * along - np.sin(tilt) * inverse[:, 2, 0]
    psi = np.arctan2(np.cos(rot) * inverse[:, 1, 0] - np.sin(rot) * inverse[:, 0, 0], cosine)
    return np.rad2deg(rot), np.rad2deg(tilt), np.rad2deg(psi)


def rotation_from_cryosparc(pose: Array) -> Array:
    """Rotation matrices `(N, 3, 3)`, object to image, of cryoSPARC's rotation vectors `(N, 3)` in rad."""
    from scipy.spatial.transform import Rotation

    matrices: Array = Rotation.from_rotvec(np.asarray(pose, dtype=np.float64)).as_matrix()
    return matrices.swapaxes(-1, -2)


def cryosparc_from_rotation(rotation: Array) -> Array:
    """CryoSPARC's rotation vectors `(N, 3)` in rad of `(N, 3, 3)` rotations."""
    from scipy.spatial.transform import Rotation

    vectors: Array = Rotation.from_matrix(rotation.swapaxes(-1, -2)).as_rotvec()
    return vectors


def shift_from_px(shift_px: Array, pixel_size_a: Array) -> Array:
    """Shifts `(N, 2)` in Å from pixels of the given size `(N,)`; both packages write the + sign.

    For RELION ≤ 3.0 that is the size of the image's pixels, for cryoSPARC `alignments3D/psize_A`, the pixel
    the refinement worked at.
    """
    return np.asarray(shift_px, dtype=np.float64) * np.asarray(pixel_size_a, dtype=np.float64)[:, None]


def pixel_size_from_magnification(detector_pixel_size_um: Array, magnification: Array) -> Array:
    """Pixel size in Å from rlnDetectorPixelSize (µm) and rlnMagnification, as RELION ≤ 3.0 writes it."""
    return detector_pixel_size_um * A_PER_UM / magnification


def half_set_from_split(split: NDArray[np.integer]) -> NDArray[np.int64]:
    """Half set 1 or 2, as rlnRandomSubset counts, of cryoSPARC's `alignments3D/split` 0 or 1."""
    return split.astype(np.int64) + 1


def split_from_half_set(half_set: NDArray[np.integer]) -> NDArray[np.uint32]:
    """CryoSPARC's `alignments3D/split` 0 or 1 of half set 1 or 2."""
    return (half_set - 1).astype(np.uint32)


def electron_wavelength_a(voltage_kv: Array) -> Array:
    """Relativistic electron wavelength in Å; the same formula as `fourier.ctf`, without torch."""
    volts = voltage_kv * 1e3
    return 12.2639 / np.sqrt(volts + 0.97845e-6 * volts**2)


def coma_effect(coma_a: float, voltage_kv: float) -> str:
    """What a cubic phase error 2π λ² s³ c does, in words.

    Parameters
    ----------
    coma_a
        c in Å: Cs × beam tilt (rad) for RELION, `ctf/tilt_A` or `ctf/trefoil_A` for cryoSPARC.
    voltage_kv
        Acceleration voltage in kV.
    """
    wavelength = float(electron_wavelength_a(np.array(voltage_kv)))
    resolution = (8 * wavelength**2 * abs(coma_a)) ** (1 / 3)
    return f"phase error of up to 45 degrees at {resolution:.2g} A resolution"


def coma_from_beam_tilt(beam_tilt_mrad: float, cs_mm: float) -> float:
    """The cubic coefficient in Å of a beam tilt in mrad at a spherical aberration in mm."""
    return cs_mm * A_PER_MM * beam_tilt_mrad * 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedies:
    """What to change about poses whose source deviates from its own format; the convention check names it.

    Parameters
    ----------
    transpose_rotations
        The matrices describe image to object: transpose them.
    negate_shifts
        The shifts say where the particle is: negate them.
    shift_scale
        Factor on the shifts, for shifts in other units or pixels.
    mirror_hand
        The poses belong to the mirror image: R → M R M with M = diag(1, 1, −1), shifts unchanged.
    """

    transpose_rotations: bool = False
    negate_shifts: bool = False
    shift_scale: float = 1.0
    mirror_hand: bool = False

    def __post_init__(self) -> None:
        if not (np.isfinite(self.shift_scale) and self.shift_scale > 0):
            raise ValueError(f"shift_scale must be a positive factor, got {self.shift_scale}")

    def apply(self, poses: Poses) -> Poses:
        """The mended poses; the order of the remedies does not matter."""
        rotation, factor = poses.rotation, -self.shift_scale if self.negate_shifts else self.shift_scale
        if self.transpose_rotations:
            rotation = rotation.swapaxes(-1, -2)
        if self.mirror_hand:
            rotation = rotation * MIRROR
        return Poses(rotation=np.ascontiguousarray(rotation), shift_a=poses.shift_a * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What a value of a particle column may be, as a test and in words."""

    plausible: Callable[[Array], NDArray[np.bool_]]
    expected: str


def _within(low: float, high: float) -> Callable[[Array], NDArray[np.bool_]]:
    return lambda values: (values >= low) & (values <= high)


ANY_ANGLE = Column(plausible=_within(-1e4, 1e4), expected="degrees")
ANY_SHIFT = Column(plausible=_within(-1e5, 1e5), expected="Å")
ANY_DEFOCUS = Column(plausible=_within(-2e6, 2e6), expected="Å, positive for underfocus")

SETTABLE_COLUMNS = {
    "pixel_size_a": Column(plausible=_within(0.05, 100), expected="Å per pixel, 0.05 to 100"),
    "box_size_px": Column(
        plausible=lambda d: (d >= 2) & (d <= 65536) & (d % 1 == 0), expected="a whole number of px"
    ),
    "voltage_kv": Column(plausible=_within(10, 3000), expected="kV (300, not 300000), 10 to 3000"),
    "cs_mm": Column(plausible=_within(-50, 50), expected="mm (2.7), -50 to 50"),
    "amplitude_contrast": Column(plausible=_within(0, 1), expected="a fraction, 0 to 1"),
    "phase_shift_deg": ANY_ANGLE,
    "defocus_u_a": ANY_DEFOCUS,
    "defocus_v_a": ANY_DEFOCUS,
    "defocus_angle_deg": ANY_ANGLE,
    "shift_x_a": ANY_SHIFT,
    "shift_y_a": ANY_SHIFT,
    "contrast_sign": Column(
        plausible=lambda sign: np.abs(sign) == 1,
        expected="1 (particles light on dark) or -1 (dark on light)",
    ),
    "optics_group": Column(plausible=lambda group: group % 1 == 0, expected="a whole number"),
}
"""The columns that `--set` may overwrite, and what every value of them must look like."""
