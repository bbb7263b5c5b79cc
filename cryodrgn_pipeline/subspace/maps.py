"""The maps that go with learnt coordinates, at full box: one pass over the images, one solve."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.models.basis import BasisModel, BasisVae
from cryodrgn_pipeline.models.linear import LinearModel, factors
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.basis import BasisLatents
from cryodrgn_pipeline.subspace.em import (
    LevelState,
    SubspaceSettings,
    accumulate,
    component_shares,
    start_level,
)
from cryodrgn_pipeline.subspace.fit import Fit
from cryodrgn_pipeline.subspace.journal import journal
from cryodrgn_pipeline.subspace.memory import affordable, affordable_curves
from cryodrgn_pipeline.subspace.solve import solve
from cryodrgn_pipeline.subspace.sums import pack

log = logging.getLogger(__name__)

CURVED_PRIOR = 0.05  # power of the maps of squares and products, as a share of the mean map's


def linear_model(
    stack: Stack, rows: NDArray[np.int64], fit: Fit, latent_dim: int, settings: SubspaceSettings
) -> LinearModel:
    """Mean, components and the maps of squares and products, regressed on the images' coordinates.

    Coordinates are taken at their posterior means, which is where volumes will be drawn. Their spreads stand
    to each other as the components' powers: distances between coordinates are distances between volumes. At
    boxes whose normal equations would take more than 8 GiB, first the curved maps, then the exact solve are
    left out.
    """
    where, d = fit.posterior, stack.box_size_px
    kept = where.z.shape[1]
    curved, iterations = affordable_curves(d, kept, settings.cg_iterations + 1)
    products = curved * (curved + 1) // 2
    log.info("maps at %d px: %d components, %d of them curved", d, kept, curved)
    shares = torch.cat([component_shares(kept, settings), torch.full((products,), CURVED_PRIOR).double()])
    maps = regressed_maps(stack, rows, fit, factors(where.z, curved), shares, iterations, settings)
    powers = maps[1 : 1 + kept].flatten(1).norm(dim=1)
    return LinearModel(
        maps=maps,
        spread=powers / powers.max() if kept else powers,
        latent_dim=latent_dim,
        curved=curved,
        pixel_size_a=stack.pixel_size_a,
    )


def basis_model(
    stack: Stack,
    rows: NDArray[np.int64],
    fit: Fit,
    vae: BasisVae,
    latents: BasisLatents,
    settings: SubspaceSettings,
) -> BasisModel:
    """The network with maps at the stack's box, regressed on the factors at each image's z.

    The factors are turned to their principal axes; at boxes whose normal equations would take more than
    8 GiB the weakest are left out, then the exact solve.
    """
    d = stack.box_size_px
    good = ~fit.posterior.is_noise
    moving = latents.factors[good, 1:].double()
    mean = moving.mean(0)
    _, spread, axes = torch.linalg.svd(moving - mean, full_matrices=False)
    spread = spread / len(moving) ** 0.5
    rank = max(1, int((spread > 1e-3 * spread[0]).sum()))
    rank, iterations = affordable(d, rank, settings.cg_iterations + 1)
    log.info("maps at %d px: the mean and %d of %d factors", d, rank, len(mean))
    turn = torch.zeros(1 + len(mean), 1 + rank, dtype=torch.float64)
    turn[0, 0] = 1
    turn[1:, 1:] = axes[:rank].T / spread[:rank]
    turn[0, 1:] = -mean @ turn[1:, 1:]
    shares = torch.cat([torch.ones(1).double(), settings.component_prior * (spread[:rank] / spread[0]) ** 2])
    maps = regressed_maps(stack, rows, fit, latents.factors.double() @ turn, shares, iterations, settings)
    return BasisModel(vae=vae, maps=maps, turn=turn.float(), pixel_size_a=stack.pixel_size_a)


def regressed_maps(
    stack: Stack,
    rows: NDArray[np.int64],
    fit: Fit,
    weights: Tensor,
    shares: Tensor,
    iterations: int,
    settings: SubspaceSettings,
) -> Tensor:
    """Maps `(K, D, D, D)` at the stack's box, masked, from images with weights `(N, K)` on each.

    Parameters
    ----------
    shares
        `(K,)` prior power of each map as a share of the mean map's.
    """
    d = stack.box_size_px
    if fit.level.lattice.box_size_px != d:
        used, poses = ~fit.posterior.is_noise, fit.known.poses
        if fit.taught is not None:
            rows, used = rows[fit.taught.numpy()], used[fit.taught]
            poses = None if poses is None else poses.of(fit.taught.numpy())
        fit.level = journal().once(
            "mean map",
            lambda: start_level(stack, rows, d, used, poses, settings, exact=iterations > 0),
        )
    return journal().once("maps", lambda: maps_of(fit.level, fit, weights, shares, iterations, settings))


def maps_of(
    state: LevelState,
    fit: Fit,
    weights: Tensor,
    shares: Tensor,
    iterations: int,
    settings: SubspaceSettings,
) -> Tensor:
    """The same at the box of a level: `(K, d, d, d)`."""
    images, where = state.images, fit.posterior
    if fit.taught is not None:
        images = images if len(images) == len(fit.taught) else images.of(fit.taught.numpy())
        where, weights = where.part(fit.taught), weights[fit.taught]

    def factors(part: slice) -> tuple[Tensor, Tensor]:
        here, weight = where.part(part), weights[part]
        squared = (here.scale**2 + here.scale_variance) * ~here.is_noise
        second = pack(weight[:, :, None] * weight[:, None]) * squared[:, None]
        return weight * (here.scale * ~here.is_noise)[:, None], second

    maps = weights.shape[1]
    back, normal = accumulate(images, state.lattice, maps, factors, settings, exact=iterations > 0)
    prior = shares[:, None] * state.mean_power
    solved = solve(state.lattice, back, normal, prior, iterations=iterations, kernel=settings.kernel)
    return solved * state.lattice.mask
