"""Between what no method should fall below and what none can know: the consensus and the oracle of a set.

The consensus is one map of all images. The oracle is told the true state of every image and backprojects
those of like state together, with a kernel over the true coordinates: what these images give without a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.consensus import maps_from_sums
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.evaluate import Truth, volume_scores
from cryodrgn_pipeline.half_sets import half_sets
from cryodrgn_pipeline.progress import progress
from cryodrgn_pipeline.reconstruct import Backprojection, accumulate_stack
from cryodrgn_pipeline.stack import Stack

BANDWIDTHS = (0.0, 0.04, 0.08, 0.15, 0.3)  # of each coordinate's range; 0: images of the very state only
BUDGET_BYTES = 8 * 2**30


def reference_scores(stack_path: Path, truth: Truth, states: NDArray[np.int64]) -> dict[str, Any]:
    """FSC-AUC of the consensus and of the oracle, per image, against the same true states as the volumes.

    Parameters
    ----------
    stack_path
        The stack (`preprocess`) of the set, at the box of the true volumes.
    states
        `(M,)` rows of `truth.volumes`, as `evaluate.volume_scores` was given them.

    Returns
    -------
    `consensus` and `oracle` (the bandwidth of the grid that scores best), each by mask; `bandwidth`;
    `oracle_by_bandwidth`.

    Raises
    ------
    InputFormatError
        If the stack is of another box than the truth.
    ConfigError
        If the sums of all states would take more than 8 GiB.
    """
    stack = Stack.open(stack_path)
    d, count = stack.box_size_px, len(truth.volumes)
    if d != truth.volumes.shape[1]:
        raise InputFormatError(
            f"{stack_path}: its box is {d} px and that of the true volumes {truth.volumes.shape[1]} px: "
            f"make a stack with `preprocess --box-size {truth.volumes.shape[1]}`"
        )
    sums = sums_by_state(stack, truth)
    consensus = maps_from_sums(_mixed(sums, torch.ones(count + 1), d))
    wanted, inverse = np.unique(states, return_inverse=True)

    def scores_of(maps: list[NDArray[np.float32]]) -> dict[str, list[float]]:
        each = volume_scores(maps, truth, wanted)["fsc_auc_each"]
        return {name: np.asarray(values)[inverse].tolist() for name, values in each.items()}

    oracle: dict[float, dict[str, list[float]]] = {}
    with progress("oracle", len(BANDWIDTHS) * len(wanted), "maps") as advance:
        for bandwidth in BANDWIDTHS:
            maps = []
            for state in wanted:
                near = torch.from_numpy(kernel(truth.distance(truth.states[[state]])[0], bandwidth)).float()
                weights = torch.cat([near, torch.zeros(1)])  # the last one holds the junk
                maps.append(maps_from_sums(_mixed(sums, weights, d), consensus.mask).density.numpy())
                advance(1)
            oracle[bandwidth] = scores_of(maps)
    base = scores_of([consensus.density.numpy()] * len(wanted))
    telling = "moving" if "moving" in base else "union"
    best = max(oracle, key=lambda bandwidth: float(np.mean(oracle[bandwidth][telling])))
    return {
        "consensus": {name: float(np.mean(values)) for name, values in base.items()},
        "oracle": {name: float(np.mean(values)) for name, values in oracle[best].items()},
        "bandwidth": best,
        "oracle_by_bandwidth": {f"{key:g}": float(np.mean(each[telling])) for key, each in oracle.items()},
    }


def headroom(score: float, consensus: float, oracle: float) -> float | None:
    """(A − A_consensus) / (A_oracle − A_consensus); None where the oracle gains nothing. May exceed 1."""
    return (score - consensus) / (oracle - consensus) if oracle > consensus else None


def kernel(distance: NDArray[np.float64], bandwidth: float) -> NDArray[np.float64]:
    """Weights `(S,)` of states at these distances: Gaussian up to four bandwidths; at 0 the state itself."""
    if bandwidth == 0:
        return np.where(distance == 0, 1.0, 0.0)
    return np.where(distance <= 4 * bandwidth, np.exp(-0.5 * (distance / bandwidth) ** 2), 0.0)


def sums_by_state(stack: Stack, truth: Truth) -> Tensor:
    """Backprojection sums of each state's images in two halves: `(S + 1, 2, E, E, E/2+1, 3)`, junk last."""
    count, edge = len(truth.volumes), 2 * stack.box_size_px
    required = 2 * (count + 1) * edge * edge * (edge // 2 + 1) * 3 * 4
    if required > BUDGET_BYTES:
        raise ConfigError(
            f"the oracle would hold sums of {count} states at {stack.box_size_px} px in "
            f"{required / 2**30:.0f} GiB, {BUDGET_BYTES / 2**30:.0f} GiB are allowed: leave --stack away, or "
            "use a smaller box or fewer true states"
        )
    rows = truth.rows_of(stack.particles.particle_id)
    state = np.where(truth.junk[rows], count, truth.nearest_state(truth.particle_states[rows]))
    half, _ = half_sets(stack.particles)
    with progress("true states", len(stack)) as advance:
        sums = accumulate_stack(
            stack, np.arange(len(stack)), 2 * state + half, sets=2 * (count + 1), advance=advance
        )
    by_state: Tensor = sums.sums.reshape(count + 1, 2, *sums.sums.shape[1:])
    return by_state


def _mixed(sums: Tensor, weights: Tensor, box_size_px: int) -> Backprojection:
    """The halves' sums of weighted states: `(S + 1, 2, …)` and `(S + 1,)`."""
    mixed = Backprojection(box_size_px, sets=2)
    for state in weights.nonzero()[:, 0].tolist():
        mixed.sums += weights[state] * sums[state]
    return mixed
