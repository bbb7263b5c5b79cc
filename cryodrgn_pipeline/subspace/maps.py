"""The maps that go with learnt coordinates, at full box: one pass over the images, one solve."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from cryodrgn_pipeline.models.linear import LinearModel, factors
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.fit import Fit, SubspaceSettings, accumulate, start_level
from cryodrgn_pipeline.subspace.solve import solve

log = logging.getLogger(__name__)

CURVED = 2
CURVED_PRIOR = 0.05  # power of the maps of squares and products, as a share of the mean map's
BUDGET_BYTES = 6 * 2**30


def final_model(stack: Stack, rows: NDArray[np.int64], fit: Fit, settings: SubspaceSettings) -> LinearModel:
    """Mean, components and the maps of squares and products, regressed on the images' coordinates.

    Coordinates are taken at their posterior means, which is where volumes will be drawn. Their spreads stand
    to each other as the components' powers: distances between coordinates are distances between volumes. At
    boxes whose normal equations would take more than 6 GiB, first the curved maps, then the exact solve are
    left out.
    """
    where, d = fit.posterior, stack.box_size_px
    kept = where.z.shape[1]
    used = ~where.is_noise
    exact = settings.cg_iterations + 1
    for curved, iterations in ((min(CURVED, kept), exact), (0, exact), (0, 0)):
        if required_bytes(d, 1 + kept + curved * (curved + 1) // 2, iterations) <= BUDGET_BYTES:
            break
    log.info("maps at %d px: %d components, %d of them curved", d, kept, curved)
    state = fit.level
    if state.lattice.box_size_px != d:
        state = start_level(stack, rows, d, used, settings)
    linear = factors(where.z, curved)
    second = linear[:, :, None] * linear[:, None] * (where.scale**2 + where.scale_variance)[:, None, None]
    linear = linear * where.scale[:, None]
    linear, second = linear * used[:, None], second * used[:, None, None]
    right, normal = accumulate(state.images, d, linear, second, settings)
    share = torch.full((linear.shape[1],), CURVED_PRIOR, dtype=torch.float64)
    share[0], share[1 : 1 + kept] = 1.0, settings.component_prior
    prior = share[:, None] * state.mean_power
    maps = solve(state.lattice, right, normal, prior, iterations=iterations, kernel=settings.kernel)
    maps = maps * state.lattice.mask
    powers = maps[1 : 1 + kept].flatten(1).norm(dim=1)
    return LinearModel(
        maps=maps,
        spread=powers / powers.max() if kept else powers,
        latent_dim=settings.max_components,
        curved=curved,
        pixel_size_a=stack.pixel_size_a,
    )


def required_bytes(box_size_px: int, maps: int, iterations: int) -> int:
    """Memory of the normal equations of K maps: packed weights in 2 (exact: 4) copies, and 6 spectra each."""
    size = 2 * box_size_px
    points = size * size * (size // 2 + 1)
    return points * 4 * ((4 if iterations else 2) * maps * (maps + 1) // 2 + 6 * 2 * maps)
