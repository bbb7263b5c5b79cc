"""Where new images lie in a subspace that others made, whatever their grey scale and noise are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.models.subspace import Subspace
from cryodrgn_pipeline.subspace.basis import Seen, seen_of
from cryodrgn_pipeline.subspace.em import LevelState, SubspaceSettings, look
from cryodrgn_pipeline.subspace.images import LevelImages
from cryodrgn_pipeline.subspace.poses import PoseOffsets
from cryodrgn_pipeline.subspace.posterior import Posterior, posterior
from cryodrgn_pipeline.subspace.solve import Lattice
from cryodrgn_pipeline.subspace.sums import InnerProducts

if TYPE_CHECKING:
    from cryodrgn_pipeline.stack import Stack

GREY_IMAGES = 20_000  # enough to tell the grey scale
GREY_ROUNDS, GREY_SETTLED = 30, 1e-5
POSE_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Of N images: their `posterior` and pose offsets, what they say about the maps that a network's factors
    multiply (None: there is no network), and `grey`, their grey scale over that of the training.
    """

    posterior: Posterior
    poses: PoseOffsets | None
    seen: Seen | None
    grey: float


def place(stack: Stack, rows: NDArray[np.int64], subspace: Subspace) -> Placement:
    """Look where images lie, with the maps in their grey scale and, where training found such, poses off.

    Raises
    ------
    InputFormatError
        If the images do not show the particle.
    """
    settings = SubspaceSettings()
    lattice = Lattice(subspace.level_px)
    lattice.mask = subspace.mask
    images = LevelImages(stack, rows, subspace.level_px)
    level = LevelState(images=images, lattice=lattice, mean_power=torch.zeros(0), maps=subspace.maps)
    spread, n_reals = subspace.scale_spread, images.coefficients
    products, _ = look(level, None, settings)
    grey = _grey_scale(products, n_reals, spread, stack)
    products, poses = _brighter(products, grey), None
    if subspace.shift_spread is not None:
        poses = replace(PoseOffsets.start(len(rows)), shift_spread=subspace.shift_spread)
        for _ in range(POSE_ROUNDS):
            level.maps, level.images = subspace.maps * grey, images.posed(poses)
            products, answer = look(level, poses, settings)
            where = posterior(products, n_reals, spread)
            if answer is not None:
                poses = poses.answered(answer, where.z)
            grey *= _grey_scale(products, n_reals, spread, stack)
        level.maps, level.images = subspace.maps * grey, images.posed(poses)
        products, _ = look(level, poses, settings)
    where, seen = posterior(products, n_reals, spread), None
    if subspace.drawn is not None:
        level.maps = subspace.drawn * grey
        seen = seen_of(level, poses, where, settings)
    return Placement(posterior=where, poses=poses, seen=seen, grey=grey)


def _brighter(products: InnerProducts, factor: float) -> InnerProducts:
    """As if the maps had been multiplied by this."""
    return replace(products, gram=products.gram * factor**2, inner=products.inner * factor)


def _grey_scale(products: InnerProducts, n_reals: int, scale_spread: float, stack: Stack) -> float:
    """The factor on the maps with which images have contrast 1 on average: noise alone is not counted."""
    some = torch.arange(0, len(products.inner), max(1, len(products.inner) // GREY_IMAGES))
    products = products.of(some, products.inner.shape[1])
    factor = float(products.inner[:, 0].sum() / products.gram[:, 0, 0].sum())
    for _ in range(GREY_ROUNDS):
        seen = _brighter(products, factor)
        where = posterior(seen, n_reals, scale_spread)
        counted = ~where.is_noise
        if factor <= 0 or not bool(counted.any()):
            raise not_shown(stack, factor)
        first, second = where.factors()
        explained = (seen.gram * second).sum((1, 2))
        change = float((first * seen.inner).sum(1)[counted].sum() / explained[counted].sum())
        factor *= change
        if abs(change - 1) < GREY_SETTLED:
            break
    return factor


def not_shown(stack: Stack, grey: float) -> InputFormatError:
    """That images do not show what the model draws."""
    return InputFormatError(
        f"{stack.path}: its images do not show the particle of the model (grey scale {grey:.3g} of that of "
        "the training): check that it is the same particle in the same frame, and contrast and conventions "
        "with `cryodrgn-pipeline consensus`"
    )
