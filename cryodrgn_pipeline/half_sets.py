"""Which particles may meet in one half of the data: images, not rows, are dealt to the two sets."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.particles import ParticleSet

REPEAT = re.compile(r"#\d+$")


def image_of_id(particle_id: NDArray[Any]) -> NDArray[Any]:
    """The image that each particle id `(N,)` stands for: `x#2`, a repeat of `x`, is `x` again."""
    if particle_id.dtype.kind in "ui":
        return particle_id
    return np.array([REPEAT.sub("", str(name)) for name in particle_id])


def half_sets(particles: ParticleSet, seed: int = 0) -> tuple[NDArray[np.int64], str]:
    """Which half (0 or 1) each particle belongs to, `(N,)`, and where that comes from.

    The source's own two half sets are kept; otherwise images are dealt at random. Repeats of one image stay
    together, as far as ids tell them: cryoSPARC's symmetry expansion gives each a uid of its own, and only
    its half sets keep those together.
    """
    images, first, inverse = np.unique(
        image_of_id(particles.particle_id), return_index=True, return_inverse=True
    )
    if particles.half_set is not None:
        values = np.unique(particles.half_set)
        if len(values) == 2:
            return (particles.half_set[first] == values[1]).astype(np.int64)[inverse], "source"
    dealt = np.random.default_rng(seed).permutation(len(images)) % 2
    return dealt.astype(np.int64)[inverse], "random"


def split_held_out(
    rows: NDArray[np.int64], particle_id: NDArray[Any], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and held-out rows; repeats of one image (`id#2`, `id#3`) stay on the same side."""
    unique, group = np.unique(image_of_id(particle_id), return_inverse=True)
    count = min(round(fraction * len(unique)), len(unique) - 1)
    chosen = np.random.default_rng([seed, 1]).permutation(len(unique))[:count]
    held_out = np.isin(group, chosen)
    return rows[~held_out], rows[held_out]
