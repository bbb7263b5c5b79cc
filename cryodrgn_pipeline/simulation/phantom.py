"""A procedural molecule of Gaussian atoms: a body, an arm that moves, and a subunit present or absent.

It has no symmetry and a hand, so that every convention error shows. Its Fourier transform is known in
closed form, hence images and truth volumes need no grid and no interpolation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryodrgn_pipeline.errors import ConfigError

Array = NDArray[np.float64]

MOTIONS = ("hinge", "twist", "slide", "none")
BODY, ARM, SUBUNIT, ARM_SUBUNIT = 0, 1, 2, 3  # the last moves, and comes and goes

# Ellipsoids (centre, radii, share of the atoms) in units of the final scale: chosen by hand so that no two
# domains look alike, and so that they do not lie in one plane.
DOMAINS: dict[int, tuple[tuple[tuple[float, float, float], tuple[float, float, float], float], ...]] = {
    BODY: (
        ((-0.10, -0.05, 0.02), (0.14, 0.09, 0.11), 0.26),
        ((0.00, -0.16, 0.08), (0.07, 0.06, 0.08), 0.10),
        ((-0.13, 0.06, -0.11), (0.06, 0.07, 0.06), 0.08),
    ),
    ARM: (
        ((0.13, 0.05, 0.01), (0.11, 0.05, 0.05), 0.20),
        ((0.21, 0.10, -0.05), (0.05, 0.05, 0.08), 0.16),
    ),
    SUBUNIT: (((-0.06, 0.02, 0.18), (0.09, 0.08, 0.06), 0.20),),
}
HINGE_POINT = np.array([0.02, 0.01, 0.0])
HINGE_AXIS = np.array([0.30, -0.25, 0.92])
ARM_AXIS = np.array([0.90, 0.42, -0.10])


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantom:
    """`A` Gaussian atoms of one width, and how they move.

    `position_a` `(A, 3)` in Å from the box centre, at the middle of the motion; `weight` `(A,)`;
    `domain` `(A,)` (BODY, ARM, SUBUNIT or ARM_SUBUNIT); `sigma_a` in Å; `motion` one of `MOTIONS`;
    `motion_range` in degrees (hinge, twist) or Å (slide); `pivot_a` `(3,)` in Å; `axis` `(3,)` of unit
    length.
    """

    position_a: Array
    weight: Array
    domain: NDArray[np.int64]
    sigma_a: float
    motion: str
    motion_range: float
    pivot_a: Array
    axis: Array

    def states(self, motion: Array, occupancy: Array) -> tuple[Array, Array]:
        """Atoms of B states: positions `(B, A, 3)` in Å and weights `(B, A)`.

        `motion` `(B,)` runs from 0 to 1 over the range; `occupancy` `(B,)` scales the subunit.
        """
        weight = np.where(np.isin(self.domain, (SUBUNIT, ARM_SUBUNIT)), occupancy[:, None], 1.0) * self.weight
        position = np.repeat(self.position_a[None], len(motion), axis=0)
        if self.motion == "none":
            return position, weight
        amount = (motion - 0.5) * self.motion_range
        arm = np.isin(self.domain, (ARM, ARM_SUBUNIT))
        if self.motion == "slide":
            position[:, arm] += amount[:, None, None] * self.axis
        else:
            turn = Rotation.from_rotvec(np.deg2rad(amount)[:, None] * self.axis).as_matrix()
            position[:, arm] = np.einsum("bij,aj->bai", turn, position[0, arm] - self.pivot_a) + self.pivot_a
        return position, weight


def ellipsoid(centre: Array, radii: Array, count: int, rng: np.random.Generator) -> Array:
    """Points `(count, 3)` spread evenly within an ellipsoid along the axes."""
    ball = rng.normal(size=(count, 3))
    ball *= rng.uniform(size=(count, 1)) ** (1 / 3) / np.linalg.norm(ball, axis=1, keepdims=True)
    return np.asarray(centre + ball * radii, dtype=np.float64)


def make_phantom(
    *,
    diameter_a: float,
    sigma_a: float,
    atoms: int,
    motion: str = "hinge",
    motion_range: float = 90.0,
    seed: int = 0,
) -> Phantom:
    """Build the molecule.

    Parameters
    ----------
    diameter_a
        Diameter in Å of the sphere about the box centre that holds every atom in every state.
    sigma_a
        Standard deviation of one atom's density in Å.
    atoms
        About how many atoms.
    motion, motion_range
        One of `MOTIONS`, and the whole range it sweeps: degrees for hinge and twist, Å for slide.
    seed
        Places the atoms within the domains; the domains themselves are always the same.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion {motion!r} is none of {', '.join(MOTIONS)}")
    rng = np.random.default_rng([seed, 0xA70])
    positions, domains = [], []
    for domain, ellipsoids in DOMAINS.items():
        for centre, radii, share in ellipsoids:
            count = max(4, round(share * atoms))
            positions.append(ellipsoid(np.array(centre), np.array(radii), count, rng))
            domains.append(np.full(count, domain))
    position, domain_of = np.concatenate(positions), np.concatenate(domains)
    centre_of_mass = position.mean(axis=0)
    axis = {"hinge": HINGE_AXIS, "twist": ARM_AXIS, "slide": ARM_AXIS, "none": HINGE_AXIS}[motion]
    unscaled = Phantom(
        position_a=position - centre_of_mass,
        weight=np.exp(rng.normal(0.0, 0.3, size=len(position))),
        domain=domain_of,
        sigma_a=sigma_a,
        motion="hinge" if motion == "slide" else motion,
        motion_range=90.0 if motion == "slide" else motion_range,
        pivot_a=HINGE_POINT - centre_of_mass,
        axis=axis / np.linalg.norm(axis),
    )
    swept, _ = unscaled.states(np.linspace(0, 1, 19), np.ones(19))
    slack = motion_range / 2 if motion == "slide" else 0.0
    scale = (diameter_a / 2 - slack) / np.linalg.norm(swept, axis=-1).max()
    if scale <= 0:
        raise ConfigError(
            f"simulate: a slide of {motion_range:g} Å does not fit a particle of {diameter_a:g} Å; "
            "lower --motion-range"
        )
    return Phantom(
        position_a=unscaled.position_a * scale,
        weight=unscaled.weight,
        domain=domain_of,
        sigma_a=sigma_a,
        motion=motion,
        motion_range=motion_range,
        pivot_a=unscaled.pivot_a * scale,
        axis=unscaled.axis,
    )
