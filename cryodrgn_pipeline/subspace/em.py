"""One iteration of expectation maximisation at one level: maps from coordinates, coordinates from maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.errors import TrainingError
from cryodrgn_pipeline.fourier_images import FourierImages
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.images import LevelImages
from cryodrgn_pipeline.subspace.journal import journal
from cryodrgn_pipeline.subspace.poses import PoseAnswer, PoseOffsets, PoseStep, marginalised, moves
from cryodrgn_pipeline.subspace.posterior import Posterior, posterior
from cryodrgn_pipeline.subspace.solve import Lattice, solve
from cryodrgn_pipeline.subspace.sums import InnerProducts, NormalEquations, inner_products, pack
from cryodrgn_pipeline.subspace.support import support_mask

SMALLEST_SCALE_SPREAD, LARGEST_SCALE_SPREAD = 0.01, 0.5
LEARN_FROM = 200_000

T = TypeVar("T")

# Of a slice of the images: the factor of each map E[a] `(B, K)`, and E[a aᵀ] packed `(B, K(K+1)/2)`.
Factors = Callable[[slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubspaceSettings:
    """`max_components` are tried, those that held-out images support are kept; iterations per level are
    those of alternating least squares, of EM at the coarsest level and of EM at each finer one.
    `component_prior` is the power of a component, per shell, as a share of the mean map's; `pose_offsets`:
    ask the images whether their poses are right. At most `learn_from` images, a random choice, teach the
    subspace and make the maps; all are placed in it. Sums over images are made on `device`, by
    `kernel`.
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
    learn_from: int = LEARN_FROM
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
    maps: int,
    factors: Factors,
    settings: SubspaceSettings,
    *,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """What `solve` needs of all images; second moments are made a chunk at a time, and never held."""
    device = lattice.device
    sums = NormalEquations(lattice.box_size_px, maps, exact=exact, kernel=settings.kernel, device=device)

    def add(part: slice, chunk: FourierImages) -> None:
        linear, second = factors(part)
        sums.add(chunk, images.weight, linear.to(device), second.to(device))

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

    def factors(part: slice) -> tuple[Tensor, Tensor]:
        return ones[part], ones[part]

    back, normal = accumulate(images, lattice, 1, factors, settings, exact=exact)
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
    state: LevelState,
    poses: PoseOffsets | None,
    settings: SubspaceSettings,
    says: Callable[[slice, InnerProducts, PoseAnswer | None], T],
) -> T:
    """One pass over the images, whose chunks are asked about the maps: what `says` makes of the answers.

    Parameters
    ----------
    says
        Called with the place of a chunk, what its images say about the maps, pose offsets integrated out, and
        what about those; gives dataclasses or tuples of tensors with a row per image, of all as one.
    """
    lattice, images = state.lattice, state.images
    maps = state.maps if poses is None else torch.cat([state.maps, moves(state.maps[0] * lattice.mask)])
    columns = lattice.columns(maps)

    def ask(part: slice, chunk: FourierImages) -> T:
        products = inner_products(columns, lattice.size, chunk, images.weight, kernel=settings.kernel)
        answer = None
        if poses is not None:
            products, answer = marginalised(products, poses, part)
        return says(part, products, answer)

    return journal().gathered(f"{lattice.box_size_px} px: where images lie", images, ask)


def products_of(state: LevelState, poses: PoseOffsets | None, settings: SubspaceSettings) -> InnerProducts:
    """What all images say about the maps, 8 K² bytes an image: for a bounded number of them."""
    return look(state, poses, settings, lambda part, products, answer: products)


def place(
    state: LevelState, poses: PoseOffsets | None, scale_spread: float, settings: SubspaceSettings
) -> tuple[Posterior, PoseStep | None]:
    """Where all images lie, and where their pose offsets would then be: one pass."""
    coefficients = state.images.coefficients

    def says(
        part: slice, products: InnerProducts, answer: PoseAnswer | None
    ) -> tuple[Posterior, PoseStep | None]:
        where = posterior(products, coefficients, scale_spread)
        if poses is None or answer is None:
            return where, None
        return where, poses.step(answer, where.z, part)

    return look(state, poses, settings, says)


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
    spread, poses = known.scale_spread, known.poses
    where, step = place(state, poses, 0 if points_only else spread, settings)
    if points_only:
        where.covariance.zero_()
    elif poses is not None and step is not None:
        poses = poses.after(step).centred(step, learnt)
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

    def factors(part: slice) -> tuple[Tensor, Tensor]:
        linear, second = where.part(part).factors()
        return linear * learnt[part, None], pack(second) * learnt[part, None]

    back, normal = accumulate(state.images, state.lattice, 1 + where.z.shape[1], factors, settings)
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
