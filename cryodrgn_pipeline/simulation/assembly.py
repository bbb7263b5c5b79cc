"""A mixture of distinct species: one core, domains that are there or not, and an arm in one of two poses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryodrgn_pipeline.simulation.phantom import ellipsoid

Array = NDArray[np.float64]

DOMAINS = 6
FEWEST_DOMAINS = 2
ARM_TURN_DEG = 70.0
CORE_SHARE, ARM_SHARE = 0.3, 0.16
# codes of 7 bits, presence of the domains and pose of the arm, with at least two domains
CODES = np.array([c for c in range(2 ** (DOMAINS + 1)) if (c % 2**DOMAINS).bit_count() >= FEWEST_DOMAINS])
MOST_SPECIES = len(CODES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """K species of the same `A` Gaussian atoms.

    `position_a` `(K, A, 3)` in Å from the box centre; `weight` `(K, A)`, 0 where a domain is absent;
    `sigma_a` in Å.
    """

    position_a: Array
    weight: Array
    sigma_a: float

    def states(self, species: NDArray[np.int64]) -> tuple[Array, Array]:
        """Atoms of B particles of these species `(B,)`: positions `(B, A, 3)` in Å and weights `(B, A)`."""
        return self.position_a[species], self.weight[species]


def make_mixture(*, species: int, diameter_a: float, sigma_a: float, atoms: int, seed: int = 0) -> Mixture:
    """Build the species.

    Parameters
    ----------
    species
        How many, 2 to `MOST_SPECIES`; no two have the same domains and the same pose.
    diameter_a
        Diameter in Å of the sphere about the box centre that holds every atom of every species.
    sigma_a
        Standard deviation of one atom's density in Å.
    atoms
        About how many atoms the whole assembly has.
    seed
        Shapes and places the domains and chooses the species.
    """
    if not 2 <= species <= MOST_SPECIES:
        raise ValueError(f"species cannot be {species}")
    rng = np.random.default_rng([seed, 0x59E])
    directions = _spread_directions(DOMAINS + 1) @ Rotation.random(rng=rng).as_matrix().T
    share = (1 - CORE_SHARE - ARM_SHARE) / DOMAINS

    def points(centre: Array, radii: Array, share: float) -> Array:
        return ellipsoid(centre, radii, max(4, round(share * atoms)), rng)

    parts = [points(np.zeros(3), np.array([0.13, 0.10, 0.11]), CORE_SHARE)]
    for direction in directions[:DOMAINS]:
        centre, radii = direction * rng.uniform(0.17, 0.22), rng.uniform(0.05, 0.09, size=3)
        parts.append(points(centre, radii, share))
    reach = directions[DOMAINS]
    parts += [points(reach * at, np.full(3, 0.045), ARM_SHARE / 3) for at in (0.14, 0.2, 0.26)]
    part = np.repeat(np.arange(len(parts)), [len(each) for each in parts])
    base = np.concatenate(parts)
    is_arm = part > DOMAINS
    pivot, axis = 0.1 * reach, np.cross(reach, directions[0])
    axis /= np.linalg.norm(axis)
    code = rng.choice(CODES, size=species, replace=False)
    position = np.repeat(base[None], species, axis=0)
    weight = np.repeat(np.exp(rng.normal(0.0, 0.3, size=len(base)))[None], species, axis=0)
    for row in range(species):
        side = 1 if code[row] >> DOMAINS else -1
        turn = Rotation.from_rotvec(np.deg2rad(side * ARM_TURN_DEG / 2) * axis)
        position[row, is_arm] = turn.apply(base[is_arm] - pivot) + pivot
        for domain in range(DOMAINS):
            if not code[row] >> domain & 1:
                weight[row, part == domain + 1] = 0.0
    scale = diameter_a / 2 / np.linalg.norm(position, axis=-1).max()
    return Mixture(position_a=position * scale, weight=weight, sigma_a=sigma_a)


def _spread_directions(count: int) -> Array:
    """Unit vectors `(count, 3)` far from each other: a Fibonacci sphere."""
    height = 1 - 2 * (np.arange(count) + 0.5) / count
    turn = np.pi * (3 - np.sqrt(5)) * np.arange(count)
    across = np.sqrt(1 - height**2)
    return np.stack([across * np.cos(turn), across * np.sin(turn), height], axis=1)
