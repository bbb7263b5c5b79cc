"""Where new images lie in a subspace that others made, whatever their grey scale and noise are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.models.subspace import Subspace
from cryodrgn_pipeline.subspace.basis import Seen, seen_of
from cryodrgn_pipeline.subspace.em import LevelState, SubspaceSettings, products_of
from cryodrgn_pipeline.subspace.em import place as place_level
from cryodrgn_pipeline.subspace.fit import Fit
from cryodrgn_pipeline.subspace.images import LevelImages
from cryodrgn_pipeline.subspace.poses import PoseOffsets
from cryodrgn_pipeline.subspace.posterior import Posterior, posterior
from cryodrgn_pipeline.subspace.solve import Lattice

if TYPE_CHECKING:
    from cryodrgn_pipeline.stack import Stack

GREY_IMAGES = 5000  # enough to tell the grey scale
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


def kept_subspace(
    stack: Stack, rows: NDArray[np.int64], fit: Fit, maps: Tensor, drawn: Tensor | None
) -> Subspace:
    """What a model keeps of the fit to these rows: `maps` and `drawn` as `Subspace` has them."""
    poses, mask = fit.known.poses, fit.level.lattice.mask
    return Subspace(
        maps=maps,
        mask=mask,
        drawn=drawn,
        grey=_grey_scale(stack, rows, maps, mask, fit.known.scale_spread),
        scale_spread=fit.known.scale_spread,
        shift_spread=None if poses is None else poses.shift_spread,
    )


def place(stack: Stack, rows: NDArray[np.int64], subspace: Subspace) -> Placement:
    """Look where images lie, with the maps in their grey scale and, where training found such, poses off.

    Raises
    ------
    InputFormatError
        If the images do not show the particle.
    """
    settings, spread = SubspaceSettings(), subspace.scale_spread
    grey = _grey_scale(stack, rows, subspace.maps, subspace.mask, spread) / subspace.grey
    level = _level(stack, rows, subspace.maps * grey, subspace.mask)
    poses = None
    if subspace.shift_spread is not None:
        poses = replace(PoseOffsets.start(len(rows)), shift_spread=subspace.shift_spread)
        for _ in range(POSE_ROUNDS):
            _, step = place_level(level, poses, spread, settings)
            if step is not None:
                poses = poses.after(step)
            level.images = level.images.posed(poses)
    where, _ = place_level(level, poses, spread, settings)
    seen = None
    if subspace.drawn is not None:
        level.maps = subspace.drawn * grey
        seen = seen_of(level, poses, where, settings)
    return Placement(posterior=where, poses=poses, seen=seen, grey=grey)


def _level(stack: Stack, rows: NDArray[np.int64], maps: Tensor, mask: Tensor) -> LevelState:
    lattice = Lattice(int(maps.shape[-1]))
    lattice.mask = mask
    images = LevelImages(stack, rows, lattice.box_size_px)
    return LevelState(images=images, lattice=lattice, mean_power=torch.zeros(0), maps=maps)


def _grey_scale(
    stack: Stack, rows: NDArray[np.int64], maps: Tensor, mask: Tensor, scale_spread: float
) -> float:
    """The factor on the maps that explains a sample of the images best, without those of noise alone."""
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), GREY_IMAGES)).astype(int)]
    level = _level(stack, rows, maps, mask)
    products = products_of(level, None, SubspaceSettings())
    factor = float(products.inner[:, 0].sum() / products.gram[:, 0, 0].sum())
    for _ in range(GREY_ROUNDS):
        seen = replace(products, gram=products.gram * factor**2, inner=products.inner * factor)
        where = posterior(seen, level.images.coefficients, scale_spread)
        counted = ~where.is_noise
        if factor <= 0 or not bool(counted.any()):
            raise not_shown(stack, factor)
        linear, second = where.factors()
        explained = (seen.gram * second).sum((1, 2))
        change = float((linear * seen.inner).sum(1)[counted].sum() / explained[counted].sum())
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
