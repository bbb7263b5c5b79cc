"""One iteration of expectation maximisation at one level: maps from coordinates, coordinates from maps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.errors import TrainingError
from cryodrgn_pipeline.fourier_images import FourierImages
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.images import LevelImages
from cryodrgn_pipeline.subspace.journal import journal
from cryodrgn_pipeline.subspace.poses import PoseAnswer, PoseOffsets, marginalised, moves
from cryodrgn_pipeline.subspace.posterior import Posterior, posterior
from cryodrgn_pipeline.subspace.solve import Lattice, solve
from cryodrgn_pipeline.subspace.sums import InnerProducts, NormalEquations, inner_products, pack
from cryodrgn_pipeline.subspace.support import support_mask

SMALLEST_SCALE_SPREAD, LARGEST_SCALE_SPREAD = 0.01, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SubspaceSettings:
    """`max_components` are tried, those that held-out images support are kept; iterations per level are
    those of alternating least squares, of EM at the coarsest level and of EM at each finer one.
    `component_prior` is the power of a component, per shell, as a share of the mean map's; `pose_offsets`:
    ask the images whether their poses are right. Sums over images are made on `device`, by `kernel`.
    """

    max_components: int = 8
    als_iterations: int = 4
    coarse_iterations: int = 6
    fine_iterations: int = 2
    cg_iterations: int = 4
    component_prior: float = 0.6
    held_out_fraction: float = 0.1
    contrast: bool = True
    pose_offsets: bool = True
    white_noise: bool = False
    seed: int = 0
    kernel: str = "auto"
    device: str = "cpu"

    def recipe(self) -> dict[str, Any]:
        """All that the result depends on but for rounding."""
        return {name: value for name, value in asdict(self).items() if name != "device"}


@dataclass(slots=True)
class LevelState:
    """One level's lattice, prior `(D/2+1,)` of the mean map, and maps `(K, D, D, D)` once there are any."""

    images: LevelImages
    lattice: Lattice
    mean_power: Tensor
    maps: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of N images: where they lie, how far their poses are off (None: not asked), and the
    spread of their contrasts (0: all are 1).
    """

    posterior: Posterior
    poses: PoseOffsets | None
    scale_spread: float


def accumulate(
    images: LevelImages,
    lattice: Lattice,
    linear: Tensor,
    second: Tensor,
    settings: SubspaceSettings,
    *,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """What `solve` needs of all images with factors `(N, K)` and their second moments `(N, K, K)`."""
    device = lattice.device
    sums = NormalEquations(
        lattice.box_size_px, linear.shape[1], exact=exact, kernel=settings.kernel, device=device
    )
    packed = pack(second)

    def add(part: slice, chunk: FourierImages) -> None:
        sums.add(chunk, images.weight, linear[part].to(device), packed[part].to(device))

    what = f"{lattice.box_size_px} px: sums over images"
    journal().summed(what, images, (sums.right, sums.normal), add)
    return sums.complete(lattice)


def level_images(
    stack: Stack, rows: NDArray[np.int64], level_px: int, settings: SubspaceSettings
) -> LevelImages:
    """The images of a level, on the device that works on them."""
    return LevelImages(stack, rows, level_px, white=settings.white_noise, device=settings.device)


def start_level(
    stack: Stack,
    rows: NDArray[np.int64],
    level_px: int,
    used: Tensor,
    poses: PoseOffsets | None,
    settings: SubspaceSettings,
    *,
    exact: bool = True,
) -> LevelState:
    """The mean map of a level, its shell powers and the mask that it gives; `exact` as in `accumulate`."""
    images = level_images(stack, rows, level_px, settings).posed(poses)
    lattice = Lattice(level_px, device=settings.device)
    ones = used[:, None].double()
    back, normal = accumulate(images, lattice, ones, ones[:, None], settings, exact=exact)
    power = 1e3 / lattice.mean_weight(normal[:, 0])[None].expand(1, level_px // 2 + 1)  # next to no prior
    mean = torch.zeros(0)
    for round_number in range(3):
        # the first round only weighs the shells
        iterations = settings.cg_iterations + 2 if exact and round_number else 0
        mean = solve(lattice, back, normal.clone(), power, iterations=iterations, kernel=settings.kernel)
        if round_number:
            lattice.mask = support_mask(mean[0])
        shells = lattice.shell_power(mean * lattice.mask) / lattice.mask_fraction
        power = shells.clamp(min=1e-3 * float(shells[0, 1:].min()))
    return LevelState(images=images, lattice=lattice, mean_power=power[0], maps=mean)


def look(
    state: LevelState, poses: PoseOffsets | None, settings: SubspaceSettings
) -> tuple[InnerProducts, PoseAnswer | None]:
    """What all images say about the maps, pose offsets integrated out, and about those: one pass."""
    lattice, images = state.lattice, state.images
    maps = state.maps if poses is None else torch.cat([state.maps, moves(state.maps[0] * lattice.mask)])
    columns = lattice.columns(maps)

    def ask(part: slice, chunk: FourierImages) -> tuple[InnerProducts, PoseAnswer | None]:
        products = inner_products(columns, lattice.size, chunk, images.weight, kernel=settings.kernel)
        return (products, None) if poses is None else marginalised(products, poses, part)

    return journal().gathered(f"{lattice.box_size_px} px: where images lie", images, ask)


def iterate(
    state: LevelState,
    known: Known,
    learnt: Tensor,
    settings: SubspaceSettings,
    *,
    warm: bool,
    points_only: bool = False,
) -> Known:
    """Solve for the maps of a level, then look where the images lie.

    Parameters
    ----------
    learnt
        `(N,)` bool: images that maps are made of; the others are only placed.
    warm
        Go on from the maps that are there.
    points_only
        Alternating least squares: coordinates count as if they were certain, contrasts and poses stay.

    Raises
    ------
    TrainingError
        If no image is left to learn from.
    """
    if not bool(learnt.any()):
        raise TrainingError(
            f"{state.images.stack.path}: all {len(learnt)} images are likelier noise alone than the particle "
            "that they make together: check poses, shifts and contrast with `cryodrgn-pipeline consensus`, "
            "and look at some images"
        )
    state.maps = journal().once(
        "maps",
        lambda: solve_components(
            state, known.posterior, learnt, settings, start=state.maps if warm else None
        ),
    )
    products, answer = look(state, known.poses, settings)
    spread, poses = known.scale_spread, known.poses
    where = posterior(products, state.images.coefficients, 0 if points_only else spread)
    if points_only:
        where.covariance.zero_()
    elif poses is not None and answer is not None:
        poses = poses.answered(answer, where.z).centred(answer, learnt)
        state.images = state.images.posed(poses)
    where, state.maps = whitened(where, state.maps, learnt)
    if spread and not points_only:
        where = where.rescaled()
        good = ~where.is_noise
        moment = (where.scale[good] - 1) ** 2 + where.scale_variance[good]
        spread = min(max(float(moment.mean()) ** 0.5, SMALLEST_SCALE_SPREAD), LARGEST_SCALE_SPREAD)
    return Known(posterior=where, poses=poses, scale_spread=spread)


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
    back, normal = accumulate(state.images, state.lattice, linear, second, settings)
    prior = component_shares(where.z.shape[1], settings)[:, None] * state.mean_power
    return solve(
        state.lattice,
        back,
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
