"""Half maps that share nothing but the place they are asked for: one model, one choice, one sum per half set.

From each half set's own images its subspace is learnt, with coordinates, contrasts, pose offsets and noise of
its own. What crosses between the half sets is where a target lies: a point of the run's latent space, which
each half set finds in its own. See docs/volumes.md.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.half_sets import half_sets
from cryodrgn_pipeline.io.ids import write_ids
from cryodrgn_pipeline.io.runs import read_covariances, read_json, read_latents
from cryodrgn_pipeline.particle_volumes_maps import half_state
from cryodrgn_pipeline.particle_volumes_members import Members, members_of, rows_in, stack_of
from cryodrgn_pipeline.particle_volumes_memory import plan_passes
from cryodrgn_pipeline.particle_volumes_rings import SHARES, Rings, rings_of, squared_distances
from cryodrgn_pipeline.particle_volumes_sums import accumulate_targets
from cryodrgn_pipeline.progress import duration, progress
from cryodrgn_pipeline.ranks import ALONE, Ranks
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.em import LEARN_FROM
from cryodrgn_pipeline.subspace.run import SubspaceRequest, train_subspace

log = logging.getLogger(__name__)

NEIGHBOURS = 1 / 4  # of a half set's particles, from which a target's place in its own space is learnt
FEWEST_NEIGHBOURS = 50
RIDGE = 1e-3  # of the mean square of the coordinates around a target


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnHalves:
    """The runs of both half sets beside a run, how many components their images support, and whether the
    half sets are the source's own.
    """

    runs: tuple[Path, Path]
    components: tuple[int, int]
    of_source: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfState:
    """One half set's map `(D, D, D)` near a target, the kernel widths of its bands, in its own metric, and
    (Σ w)² / Σ w² of the narrowest of them.
    """

    density: Tensor
    edges: list[float]
    n_effective: float


def own_halves(run: Path, latent_dim: int) -> OwnHalves:
    """Learn a subspace from each half set of a run's particles, in RUN/halves, unless it is there.

    The recipe is that of `train --method subspace`. A process that finds another one learning waits for it.

    Raises
    ------
    InputFormatError
        If the run's stack is missing, or holds particles of one half set only.
    """
    stack, manifest = stack_of(run, None), read_json(run / "run.json")
    settings = manifest.get("settings", {})
    particle_id = read_latents(run).particle_id
    half, source = half_sets(stack.particles)
    half = half[rows_in(stack, particle_id, run)]
    runs = run / "halves" / "half1", run / "halves" / "half2"
    if source != "source":
        log.warning(
            "%s: the source names no half sets, so particles are dealt at random; their poses may have been "
            "refined against one map of all particles, so fsc_independent stays false",
            stack.path,
        )
    with _only_one(run / "halves"):
        for number, own in enumerate(runs):
            ids = particle_id[half == number]
            if len(ids) == 0:
                raise InputFormatError(f"{run}: no particles of half set {number + 1}; a FSC needs both")
            write_ids(run / "halves" / f"{own.name}.txt", ids)
            log.info("half set %d: a subspace of its own from %d particles", number + 1, len(ids))
            train_subspace(
                SubspaceRequest(
                    stack=stack.path,
                    run=own,
                    subset=run / "halves" / f"{own.name}.txt",
                    latent_dim=latent_dim,
                    decoder="linear",
                    learn_from=int(settings.get("learn_from", LEARN_FROM)),
                    seed=int(settings.get("seed", 0)),
                    half_set=number,
                )
            )
    one, two = (int(read_json(own / "run.json")["components"]) for own in runs)
    of_all = min(latent_dim, int(manifest.get("components", 0)))
    if min(one, two) < max(one, two, of_all):
        log.warning(
            "the half sets support %d and %d components, all particles %s: half maps average over what "
            "their half set does not see",
            *(one, two, of_all or "an unknown number"),
        )
    return OwnHalves(runs=runs, components=(one, two), of_source=source == "source")


def half_states(
    run: Path,
    halves: OwnHalves,
    number: int,
    stack: Stack,
    targets: NDArray[np.float32],
    *,
    kept: int,
    memory_gb: float | None,
    ranks: Ranks = ALONE,
) -> Iterator[HalfState]:
    """The map of one half set, 0 or 1, at each target `(T, J)` of a run in turn, for rank 0.

    Nothing of the other half set is read. `kept`: bytes that the caller holds meanwhile; `memory_gb`: as in
    `plan_passes`.
    """
    own = halves.runs[number]
    members = members_of(own, stack, split_again=True)
    placed = located(run, own, targets.astype(np.float64))
    squared = squared_distances(members.z, members.covariance, placed)
    apart = np.where(members.counted[:, None], squared, np.inf)
    shares = SHARES if halves.components[number] else SHARES[-1:]  # without a component all are alike
    rings = rings_of(apart, shares)
    kept += len(targets) * 4 * stack.box_size_px**3  # the maps of the first half set
    plan = plan_passes(
        *(stack.box_size_px, len(targets), rings.widths),
        grids=0,
        kept=kept,
        memory_gb=memory_gb,
        ranks=ranks,
    )
    if plan.widths < rings.widths:
        rings = rings_of(apart, shares[-plan.widths :])
    passes = plan.passes(len(targets))
    for turn in range(passes):
        block = slice(turn * plan.per_pass, min((turn + 1) * plan.per_pass, len(targets)))
        yield from _states_of(members, rings.of(block), stack, number, f"{turn + 1} of {passes}", ranks)


def _states_of(
    members: Members, around: Rings, stack: Stack, number: int, turn: str, ranks: Ranks
) -> Iterator[HalfState]:
    started = time.monotonic()
    with progress(f"half set {number + 1}", len(around.counted)) as advance:
        sums = accumulate_targets(
            stack.with_half_noise(number),
            members.rows,
            around,
            members.half,
            members.contrast,
            poses=members.poses,
            advance=advance,
            ranks=ranks,
        )
    log.info("half set %d, pass %s: %s", number + 1, turn, duration(time.monotonic() - started))
    for target in range(around.ring.shape[1] if ranks.leads else 0):
        density, widths = half_state(sums.around(target, around.weights(target)))
        effective = around.n_effective(target)
        yield HalfState(
            density=density,
            edges=[float(around.edge[target, width]) for width in widths],
            n_effective=float(min(effective[width] for width in widths)),
        )


def located(run: Path, own: Path, targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where targets `(T, J)` of a run lie in the latent space of one half set: `(T, J')`.

    Its own coordinates of its own particles, regressed on the run's coordinates of these same particles: a
    line fitted to the quarter of them nearest to the target (local linear regression, Fan 1993).
    """
    theirs, latents = read_latents(own), read_latents(run)
    row = {identity: place for place, identity in enumerate(latents.particle_id.tolist())}
    rows = np.array([row[identity] for identity in theirs.particle_id.tolist()])
    z, goal = latents.z[rows].astype(np.float64), theirs.z.astype(np.float64)
    covariance = read_covariances(run, rows)
    metric = np.zeros((*z.shape, z.shape[1])) if covariance is None else covariance.astype(np.float64)
    squared = squared_distances(z, metric, targets)
    count = min(len(z), max(FEWEST_NEIGHBOURS, round(NEIGHBOURS * len(z))))
    return np.stack(
        [_line_at(z - target, goal, away, count) for target, away in zip(targets, squared.T, strict=True)]
    )


def _line_at(
    offset: NDArray[np.float64], goal: NDArray[np.float64], squared: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    """The goal `(N, J')` at offset 0, from the `count` rows at the smallest squared distances `(N,)`."""
    near = np.argsort(squared, kind="stable")[:count]
    weight = np.clip(1 - squared[near] / max(squared[near[-1]], 1e-30), 1e-3, None)
    terms = np.column_stack([np.ones(count), offset[near]])
    gram = terms.T @ (weight[:, None] * terms)
    ridge = RIDGE * np.trace(gram[1:, 1:]) / max(1, len(gram) - 1) + 1e-12
    gram[np.arange(1, len(gram)), np.arange(1, len(gram))] += ridge
    line = np.linalg.solve(gram, terms.T @ (weight[:, None] * goal[near]))
    at_target: NDArray[np.float64] = line[0]
    return at_target


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, waiting for whoever holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: another process learns the half sets' subspaces; waiting for it", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
