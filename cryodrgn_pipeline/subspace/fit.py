"""Expectation maximisation of a mean map and J components, from coarse to fine.

The model of probabilistic principal components with known poses and CTFs (Tipping & Bishop 1999; Punjani &
Fleet 2021; Gilles & Singer 2025): image = scale · CTF · slice(V₀ + Σ zⱼ Vⱼ) + noise, z ~ N(0, 1). Random
coordinates start it; alternating least squares and expectation maximisation at a coarse level find the
subspace; only the coordinates go on to finer levels, where the maps are solved for anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.half_sets import split_held_out
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.images import LevelImages
from cryodrgn_pipeline.subspace.posterior import Posterior, posterior
from cryodrgn_pipeline.subspace.solve import Lattice, solve
from cryodrgn_pipeline.subspace.sums import InnerProducts, NormalEquations, inner_products, pack
from cryodrgn_pipeline.subspace.support import support_mask

log = logging.getLogger(__name__)

COARSEST_PX = 16
FINEST_PX = 64  # coordinates are learnt up to here; finer maps are made with what they then are
FIRST_SCALE_SPREAD = 0.1
SMALLEST_SCALE_SPREAD, LARGEST_SCALE_SPREAD = 0.01, 0.5
KEEP_ABOVE_SE = 3.0
IMAGES_PER_COMPONENT = 50  # fewer say nothing about it


@dataclass(frozen=True, slots=True, kw_only=True)
class SubspaceSettings:
    """`max_components` are tried, those that held-out images support are kept; iterations per level are
    those of alternating least squares, of EM at the coarsest level and of EM at each finer one.
    `component_prior` is the power of a component, per shell, as a share of the mean map's.
    """

    max_components: int = 8
    als_iterations: int = 4
    coarse_iterations: int = 6
    fine_iterations: int = 2
    cg_iterations: int = 4
    component_prior: float = 0.6
    held_out_fraction: float = 0.1
    contrast: bool = True
    white_noise: bool = False
    seed: int = 0
    kernel: str = "auto"


@dataclass(slots=True)
class LevelState:
    """One level's lattice, prior `(D/2+1,)` of the mean map, and maps `(K, D, D, D)` once there are any."""

    images: LevelImages
    lattice: Lattice
    mean_power: Tensor
    maps: Tensor


@dataclass(slots=True)
class Fit:
    """What EM leaves: the posterior of all N rows at the finest level, the level itself, and the log.

    `gains` of held-out log evidence with 1 … J components, and how many components they support.
    """

    posterior: Posterior
    level: LevelState
    scale_spread: float
    history: list[dict[str, float]] = field(default_factory=list)
    gains: list[tuple[float, float]] = field(default_factory=list)
    supported: int = 0


def levels_of(box_size_px: int) -> list[int]:
    """Boxes from coarse to fine: 16, 32, 64 as far as they are below D, then D or 64."""
    finest = min(box_size_px, FINEST_PX)
    return [d for d in (COARSEST_PX, 2 * COARSEST_PX) if d < finest] + [finest]


def accumulate(
    images: LevelImages,
    box_size_px: int,
    linear: Tensor,
    second: Tensor,
    settings: SubspaceSettings,
) -> tuple[Tensor, Tensor]:
    """The normal equations of all images for factors `(N, K)` and their second moments `(N, K, K)`."""
    sums = NormalEquations(box_size_px, linear.shape[1], kernel=settings.kernel)
    packed = pack(second)
    for part, chunk in images.chunks():
        sums.add(chunk, images.weight, linear[part], packed[part])
    return sums.complete()


def all_inner_products(
    images: LevelImages, lattice: Lattice, maps: Tensor, settings: SubspaceSettings
) -> InnerProducts:
    """The inner products of all images with the maps, one pass."""
    columns, parts = lattice.columns(maps), []
    for _, chunk in images.chunks():
        parts.append(inner_products(columns, lattice.size, chunk, images.weight, kernel=settings.kernel))
    return InnerProducts(
        gram=torch.cat([part.gram for part in parts]),
        inner=torch.cat([part.inner for part in parts]),
        power=torch.cat([part.power for part in parts]),
    )


def start_level(
    stack: Stack, rows: NDArray[np.int64], level_px: int, used: Tensor, settings: SubspaceSettings
) -> LevelState:
    """The mean map of a level, its shell powers and the mask that it gives."""
    images = LevelImages(stack, rows, level_px, white=settings.white_noise)
    lattice = Lattice(level_px)
    ones = used[:, None].double()
    right, normal = accumulate(images, level_px, ones, ones[:, None], settings)
    power = 1e3 / lattice.mean_weight(normal[:, 0])[None].expand(1, level_px // 2 + 1)  # next to no prior
    mean = torch.zeros(0)
    for round_number in range(3):
        mean = solve(
            lattice, right, normal, power, iterations=settings.cg_iterations + 2, kernel=settings.kernel
        )
        if round_number:
            lattice.mask = support_mask(mean[0])
        shells = lattice.shell_power(mean * lattice.mask) / lattice.mask_fraction
        power = shells.clamp(min=1e-3 * float(shells[0, 1:].min()))
    return LevelState(images=images, lattice=lattice, mean_power=power[0], maps=mean)


def fit_subspace(
    stack: Stack,
    rows: NDArray[np.int64],
    settings: SubspaceSettings,
    *,
    report: Callable[[str], None] = log.info,
) -> Fit:
    """Learn mean, components and the coordinates of the given rows of a stack.

    Raises
    ------
    ValueError
        If there are no rows.
    """
    if len(rows) == 0:
        raise ValueError("no particles to learn from")
    rng = torch.Generator().manual_seed(settings.seed)
    n = len(rows)
    j = min(settings.max_components, n // IMAGES_PER_COMPONENT)
    _, kept_out = split_held_out(
        rows, stack.particles.particle_id[rows], settings.held_out_fraction, settings.seed
    )
    held_out = torch.from_numpy(np.isin(rows, kept_out))
    where = Posterior(
        z=torch.randn(n, j, generator=rng, dtype=torch.float64),
        covariance=torch.zeros(n, j, j, dtype=torch.float64),
        scale=torch.ones(n, dtype=torch.float64),
        scale_variance=torch.zeros(n, dtype=torch.float64),
        evidence=torch.zeros(n, dtype=torch.float64),
        loss=torch.ones(n, dtype=torch.float64),
    )
    spread = 0.0
    history: list[dict[str, float]] = []
    gains: list[tuple[float, float]] = []
    supported = j
    for number, level_px in enumerate(levels_of(stack.box_size_px)):
        used = ~where.is_noise
        state = start_level(stack, rows, level_px, used & ~held_out if number == 0 else used, settings)
        als = settings.als_iterations if number == 0 else 0
        for iteration in range(
            als + (settings.coarse_iterations if number == 0 else settings.fine_iterations)
        ):
            learnt = ~where.is_noise & ~held_out if number == 0 else ~where.is_noise
            warm = None if iteration <= als else state.maps
            state.maps = solve_components(state, where, learnt, settings, start=warm)
            products = all_inner_products(state.images, state.lattice, state.maps, settings)
            if iteration >= als and settings.contrast:
                spread = spread or FIRST_SCALE_SPREAD
            where = posterior(products, state.images.coefficients, spread)
            if iteration < als:
                where.covariance.zero_()
            where, state.maps = whitened(where, state.maps, learnt)
            if spread:
                where = where.rescaled()
                good = ~where.is_noise
                moment = (where.scale[good] - 1) ** 2 + where.scale_variance[good]
                spread = min(max(float(moment.mean()) ** 0.5, SMALLEST_SCALE_SPREAD), LARGEST_SCALE_SPREAD)
            history.append(summary(level_px, iteration, where, spread))
            report(_line(history[-1]))
        if number == 0:
            products = all_inner_products(state.images, state.lattice, state.maps, settings)
            supported, gains = supported_components(products, state.images.coefficients, spread, held_out)
            report(f"{supported} of {j} components are supported by held-out images")
            where = _first(where, supported)
            state.maps = state.maps[: supported + 1]
    return Fit(
        posterior=where,
        level=state,
        scale_spread=spread,
        history=history,
        gains=gains,
        supported=supported,
    )


def solve_components(
    state: LevelState,
    where: Posterior,
    learnt: Tensor,
    settings: SubspaceSettings,
    *,
    start: Tensor | None = None,
) -> Tensor:
    """M-step: the maps `(J+1, D, D, D)` that explain the images best where these now lie."""
    linear, second = where.factors()
    linear, second = linear * learnt[:, None], second * learnt[:, None, None]
    level_px, j = state.lattice.box_size_px, where.z.shape[1]
    right, normal = accumulate(state.images, level_px, linear, second, settings)
    prior = component_shares(j, settings)[:, None] * state.mean_power
    return solve(
        state.lattice,
        right,
        normal,
        prior,
        start=start,
        iterations=settings.cg_iterations,
        kernel=settings.kernel,
    )


def component_shares(components: int, settings: SubspaceSettings) -> Tensor:
    """Prior power of the mean and of each component, as a share of the mean map's: `(J+1,)` float64."""
    return torch.cat([torch.ones(1), torch.full((components,), settings.component_prior)]).double()


def whitened(where: Posterior, maps: Tensor, counted: Tensor) -> tuple[Posterior, Tensor]:
    """Coordinates of mean 0 and covariance 1 over the counted images, components by falling power."""
    if where.z.shape[1] == 0:
        return where, maps
    z, covariance = where.z[counted], where.covariance[counted]
    mean = z.mean(0)
    moment = (z - mean).T @ (z - mean) / len(z) + covariance.mean(0)
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp(min=1e-12).sqrt()
    components = maps[1:].double().flatten(1)
    centre = maps[0].double() + (mean @ components).reshape(maps[0].shape)
    components = (vectors * root).T @ components
    _, turn = torch.linalg.eigh(components @ components.T)
    turn = turn.flip(1)
    components = turn.T @ components
    moved = replace(where, z=where.z - mean)
    volumes = torch.cat([centre[None], components.reshape(-1, *centre.shape)]).to(maps)
    return moved.turned((vectors / root) @ turn), volumes


def supported_components(
    products: InnerProducts, coefficients: int, scale_spread: float, held_out: Tensor
) -> tuple[int, list[tuple[float, float]]]:
    """How many of the leading components raise the likelihood of images that did not make them.

    Returns
    -------
    The number kept, and for 1 … J components the gain of held-out log evidence per image over the best
    smaller number, with its standard error.
    """
    j = products.gram.shape[-1] - 1
    if not bool(held_out.any()):
        return j, []
    seen = InnerProducts(
        gram=products.gram[held_out], inner=products.inner[held_out], power=products.power[held_out]
    )
    best, kept, gains = posterior(_leading(seen, 0), coefficients, scale_spread).evidence, 0, []
    for count in range(1, j + 1):
        evidence = posterior(_leading(seen, count), coefficients, scale_spread).evidence
        gain = evidence - best
        mean, error = float(gain.mean()), float(gain.std()) / len(gain) ** 0.5
        gains.append((mean, error))
        if mean > KEEP_ABOVE_SE * error:
            best, kept = evidence, count
    return kept, gains


def _leading(products: InnerProducts, components: int) -> InnerProducts:
    k = components + 1
    return InnerProducts(gram=products.gram[:, :k, :k], inner=products.inner[:, :k], power=products.power)


def _first(where: Posterior, components: int) -> Posterior:
    covariance = where.covariance[:, :components, :components]
    return replace(where, z=where.z[:, :components], covariance=covariance)


def summary(level_px: int, iteration: int, where: Posterior, scale_spread: float) -> dict[str, float]:
    """One line of the log of the fit."""
    return {
        "level_px": level_px,
        "iteration": iteration,
        "loss": float(where.loss.mean()),
        "evidence": float(where.evidence.mean()),
        "scale_spread": scale_spread,
        "noise_images": int(where.is_noise.sum()),
    }


def _line(entry: dict[str, float]) -> str:
    return (
        f"{entry['level_px']:.0f} px, iteration {entry['iteration']:.0f}: loss {entry['loss']:.4f}, log "
        f"evidence {entry['evidence']:.2f} an image, contrast spread {entry['scale_spread']:.3f}, "
        f"{entry['noise_images']:.0f} images like noise"
    )
