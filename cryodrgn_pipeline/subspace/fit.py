"""Expectation maximisation of a mean map and J components, from coarse to fine.

The model of probabilistic principal components with known poses and CTFs (Tipping & Bishop 1999; Punjani &
Fleet 2021; Gilles & Singer 2025): image = scale · CTF · slice(V₀ + Σ zⱼ Vⱼ) + noise, z ~ N(0, 1). Random
coordinates start it; alternating least squares and expectation maximisation at a coarse level find the
subspace; only the coordinates go on to finer levels, where the maps are solved for anew. At the coarse level
it is done twice, with poses as they are and with small offsets, and held-out images choose.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.half_sets import split_held_out
from cryodrgn_pipeline.progress import measured
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.em import (
    Known,
    LevelState,
    SubspaceSettings,
    iterate,
    level_images,
    place,
    products_of,
    start_level,
)
from cryodrgn_pipeline.subspace.journal import journal
from cryodrgn_pipeline.subspace.levels import levels_of
from cryodrgn_pipeline.subspace.poses import PoseOffsets
from cryodrgn_pipeline.subspace.posterior import Posterior, posterior
from cryodrgn_pipeline.subspace.sums import InnerProducts

log = logging.getLogger(__name__)

COARSE_IMAGES = 50_000  # enough to find the subspace at the coarsest level
PLACING_ROUNDS = 2  # passes that place the other images, where poses are off
FIRST_SCALE_SPREAD = 0.1
SURE_ABOVE_SE = 3.0  # that there is anything at all
MORE_ABOVE_SE = 2.0  # that there is one component more
IMAGES_PER_COMPONENT = 50  # fewer say nothing about it


@dataclass(slots=True)
class Fit:
    """What EM leaves: what is known of all N rows, the finest level, and the log.

    `iterations`: rows that the log will have. `gains` of held-out log evidence with 1 … J components, and how
    many components they support; `pose_gain` of offsets, with its standard error, where they were tried.
    `taught`: which images subspace and maps are learnt from; None: all.
    """

    known: Known
    level: LevelState
    iterations: int
    history: list[dict[str, float]] = field(default_factory=list)
    gains: list[tuple[float, float]] = field(default_factory=list)
    supported: int = 0
    pose_gain: tuple[float, float] | None = None
    taught: Tensor | None = None

    @property
    def posterior(self) -> Posterior:
        """Where the images lie."""
        return self.known.posterior


def _planned_iterations(box_size_px: int, settings: SubspaceSettings) -> int:
    finer = len(levels_of(box_size_px)) - 1
    return settings.als_iterations + settings.coarse_iterations + finer * settings.fine_iterations


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
    first, *finer = levels_of(stack.box_size_px)
    everything, taught = rows, _some(len(rows), settings.learn_from, [settings.seed, 3])
    if len(taught) < len(everything):
        rows = rows[taught]
        report(f"{len(rows)} of {len(everything)} images teach the subspace; then all are placed in it")
    some = _some(len(rows), COARSE_IMAGES, [settings.seed, 2])
    coarse = journal().once("coarse", lambda: _coarse_fit(stack, rows[some], first, settings, report))
    steps: list[Callable[[Fit], Fit]] = []
    if len(some) < len(rows):
        steps.append(lambda fit: _place(fit, stack, rows, some, settings))
    steps += [partial(_refine, stack, rows, level_px, settings, report) for level_px in finer]
    if len(taught) < len(everything):
        steps.append(
            lambda fit: replace(
                _place(fit, stack, everything, taught, settings), taught=torch.from_numpy(taught)
            )
        )
    return journal().loop("levels", coarse, steps)


def _refine(
    stack: Stack,
    rows: NDArray[np.int64],
    level_px: int,
    settings: SubspaceSettings,
    report: Callable[[str], None],
    fit: Fit,
) -> Fit:
    """The same coordinates and their maps at a finer level, then some iterations there."""

    def iteration(number: int, fit: Fit) -> Fit:
        used = ~fit.posterior.is_noise
        fit.known = iterate(fit.level, fit.known, used, settings, warm=number > 0)
        _tell(fit, summary(level_px, number, fit.known, stack.box_size_px), report)
        return fit

    used = ~fit.posterior.is_noise
    fit.level = journal().once(
        "mean map", lambda: start_level(stack, rows, level_px, used, fit.known.poses, settings)
    )
    steps = [partial(iteration, number) for number in range(settings.fine_iterations)]
    return journal().loop("iterations", fit, steps)


def _some(count: int, most: int, seed: list[int]) -> NDArray[np.int64]:
    """At most so many of `count` images, drawn at random, in rising order."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def _coarse_fit(
    stack: Stack,
    rows: NDArray[np.int64],
    level_px: int,
    settings: SubspaceSettings,
    report: Callable[[str], None],
) -> Fit:
    """The subspace at the coarsest level, with the components and the pose offsets that images support."""
    n = len(rows)
    _, kept_out = split_held_out(
        rows, stack.particles.particle_id[rows], settings.held_out_fraction, settings.seed
    )
    held_out = torch.from_numpy(np.isin(rows, kept_out))
    start = journal().once("mean map", lambda: start_level(stack, rows, level_px, ~held_out, None, settings))

    def run(poses: PoseOffsets | None) -> tuple[Fit, Tensor]:
        return _coarse_run(start, poses, held_out, settings, stack.box_size_px, report)

    fit, evidence = journal().once("poses as they are", lambda: run(None))
    if settings.pose_offsets and bool(held_out.any()):
        report("once more, with poses that may be off")
        other, with_offsets = journal().once("poses that may be off", lambda: run(PoseOffsets.start(n)))
        gain = with_offsets - evidence
        mean, error = float(gain.mean()), float(gain.std()) / len(gain) ** 0.5
        sure = mean > SURE_ABOVE_SE * error
        fit = other if sure else fit
        fit.pose_gain = (mean, error)
        report(
            f"poses {'are corrected' if sure else 'stay as they are'}: offsets change the log evidence of a "
            f"held-out image by {mean:+.2f} ± {error:.2f}"
        )
    return fit


def _coarse_run(
    start: LevelState,
    poses: PoseOffsets | None,
    held_out: Tensor,
    settings: SubspaceSettings,
    box_size_px: int,
    report: Callable[[str], None],
) -> tuple[Fit, Tensor]:
    """One run from random coordinates; also the log evidence of the held-out images."""
    n = len(held_out)
    j = min(settings.max_components, n // IMAGES_PER_COMPONENT)
    rng = torch.Generator().manual_seed(settings.seed)
    where = Posterior.start(torch.randn(n, j, generator=rng, dtype=torch.float64))
    spread = FIRST_SCALE_SPREAD if settings.contrast else 0.0
    fit = Fit(
        known=Known(posterior=where, poses=poses, scale_spread=spread),
        level=replace(start),
        iterations=_planned_iterations(box_size_px, settings),
    )

    def iteration(number: int, fit: Fit) -> Fit:
        als, warm = number < settings.als_iterations, number > settings.als_iterations
        learnt = ~fit.posterior.is_noise & ~held_out
        fit.known = iterate(fit.level, fit.known, learnt, settings, warm=warm, points_only=als)
        _tell(fit, summary(start.images.level_px, number, fit.known, box_size_px), report)
        return fit

    numbers = range(settings.als_iterations + settings.coarse_iterations)
    fit = journal().loop("iterations", fit, [partial(iteration, number) for number in numbers])
    products = products_of(fit.level, fit.known.poses, settings)
    coefficients, spread = start.images.coefficients, fit.known.scale_spread
    fit.supported, fit.gains = supported_components(products, coefficients, spread, held_out)
    report(f"{fit.supported} of {j} components are supported by held-out images")
    fit.known = replace(fit.known, posterior=fit.posterior.first(fit.supported))
    fit.level.maps = fit.level.maps[: fit.supported + 1]
    seen = products.of(held_out, fit.supported + 1)
    return fit, posterior(seen, coefficients, spread).evidence


def _place(
    fit: Fit, stack: Stack, rows: NDArray[np.int64], some: NDArray[np.int64], settings: SubspaceSettings
) -> Fit:
    """Where all rows lie, from maps that some of them made."""
    images = level_images(stack, rows, fit.level.images.level_px, settings).streamed()
    level = replace(fit.level, images=images)

    def look_once(known: Known) -> Known:
        poses = known.poses
        level.images = images.posed(poses)
        where, step = place(level, poses, known.scale_spread, settings)
        if poses is not None and step is not None:
            poses = poses.after(step)
        return replace(known, posterior=where, poses=poses)

    poses = fit.known.poses
    rounds = 1 if poses is None else PLACING_ROUNDS
    known = replace(fit.known, poses=None if poses is None else poses.among(len(rows), some))
    known = journal().loop("rounds", known, [look_once] * rounds)
    level.images = images.posed(known.poses)
    return replace(fit, known=known, level=level)


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
    best = posterior(products.of(held_out, 1), coefficients, scale_spread).evidence
    kept, gains = 0, []
    for count in range(1, j + 1):
        evidence = posterior(products.of(held_out, count + 1), coefficients, scale_spread).evidence
        gain = evidence - best
        mean, error = float(gain.mean()), float(gain.std()) / len(gain) ** 0.5
        gains.append((mean, error))
        if mean > (MORE_ABOVE_SE if kept else SURE_ABOVE_SE) * error:
            best, kept = evidence, count
    return kept, gains


def summary(level_px: int, iteration: int, known: Known, box_size_px: int) -> dict[str, float]:
    """One line of the log of the fit."""
    where, poses = known.posterior, known.poses
    entry = {
        "level_px": level_px,
        "iteration": iteration,
        "loss": float(where.loss.mean()),
        "evidence": float(where.evidence.mean()),
        "scale_spread": known.scale_spread,
        "noise_images": int(where.is_noise.sum()),
    }
    if poses is not None:
        entry |= {"pose_shift_px": poses.shift_spread * box_size_px}
    return entry


def metric_rows(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The log of a fit as the rows of metrics.jsonl."""
    return [
        {"epoch": number, "reconstruction": entry["loss"], **entry}
        for number, entry in enumerate(history, start=1)
    ]


def _tell(fit: Fit, entry: dict[str, float], report: Callable[[str], None]) -> None:
    fit.history.append(entry)
    measured(metric_rows(fit.history), fit.iterations)
    report(_line(entry))


def _line(entry: dict[str, float]) -> str:
    offsets = f", shifts off by {entry['pose_shift_px']:.2f} px" if "pose_shift_px" in entry else ""
    return (
        f"{entry['level_px']:.0f} px, iteration {entry['iteration']:.0f}: loss {entry['loss']:.4f}, log "
        f"evidence {entry['evidence']:.2f} an image, contrast spread {entry['scale_spread']:.3f}, "
        f"{entry['noise_images']:.0f} images like noise{offsets}"
    )
