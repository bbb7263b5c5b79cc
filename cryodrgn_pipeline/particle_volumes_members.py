"""Whose images speak in volumes from particles: a run's particles as a stack has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.half_sets import half_sets
from cryodrgn_pipeline.io.ids import read_id_rows
from cryodrgn_pipeline.io.runs import read_covariances, read_json, read_latents
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.poses import PoseOffsets, read_pose_offsets
from cryodrgn_pipeline.subspace.posterior import NOISE_LIKELIER


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """N particles of a run as its stack has them, by rising row.

    `rows` `(N,)`; `z` `(N, J)` and `covariance` `(N, J, J)` their posterior; `half` and `contrast` `(N,)`;
    `counted` `(N,)` bool: those that are not taken for noise (and, by ids, are asked for); `poses`: what
    corrects their poses, as far as the run did.
    """

    rows: NDArray[np.int64]
    z: NDArray[np.float64]
    covariance: NDArray[np.float64]
    half: NDArray[np.int64]
    contrast: NDArray[np.float32]
    counted: NDArray[np.bool_]
    poses: PoseOffsets | None


def members_of(run: Path, stack: Stack, ids: Path | None = None, *, split_again: bool = False) -> Members:
    """The run's particles in its stack: joined by id, with posterior, half set and contrast.

    Parameters
    ----------
    ids
        Count only the particles of this file.
    split_again
        The run is that of one half set: deal its images to two halves at random.
    """
    latents = read_latents(run)
    found = rows_in(stack, latents.particle_id, run)
    n, j = latents.z.shape
    covariance = read_covariances(run)
    counted = np.ones(n, dtype=bool)
    if latents.log_evidence is not None:
        counted = latents.log_evidence >= NOISE_LIKELIER
    if ids is not None:
        asked = read_id_rows(ids, latents.particle_id, f"the run {run}")
        counted = counted & np.isin(np.arange(n), asked)
    if split_again:
        half, _ = half_sets(replace(stack.particles.take(found), half_set=None), seed=1)
    else:
        half, _ = half_sets(stack.particles)
        half = half[found]
    if len(np.unique(half[counted])) < 2:
        raise InputFormatError(
            f"{ids or run}: {int(counted.sum())} particles, all of one half set: a map and "
            "its half maps need particles of both"
        )
    order = np.argsort(found)
    poses = read_pose_offsets(run, stack.box_size_px * stack.pixel_size_a)
    contrast = np.ones(n, np.float32) if latents.contrast is None else latents.contrast
    return Members(
        rows=found[order],
        z=latents.z[order].astype(np.float64),
        covariance=np.zeros((n, j, j)) if covariance is None else covariance[order].astype(np.float64),
        half=half[order],
        contrast=contrast[order],
        counted=counted[order],
        poses=None if poses is None else poses.of(order),
    )


def rows_in(stack: Stack, particle_id: NDArray[Any], run: Path) -> NDArray[np.int64]:
    """The stack's rows of a run's particles `(N,)`, in their order."""
    known = {identity: row for row, identity in enumerate(stack.particles.particle_id.tolist())}
    found = np.array([known.get(identity, -1) for identity in particle_id.tolist()])
    if (found < 0).any():
        example = particle_id[int(np.argmin(found))]
        raise InputFormatError(
            f"{stack.path}: {int((found < 0).sum())} of the {len(found)} particles of the run {run} "
            f"are not in this stack, such as {example}; give the folder that `preprocess` made of them with "
            "--stack"
        )
    return found


def stack_of(run: Path, path: Path | None) -> Stack:
    """The stack at `path`, or where there is none the one that the run was trained on.

    Raises `InputFormatError` if it is missing or has no poses.
    """
    if path is None:
        manifest = read_json(run / "run.json", "give the stack with --stack")
        path = Path(manifest.get("stack", "")) if manifest.get("stack") else None
    if path is None or not path.is_dir():
        raise InputFormatError(
            f"{path or run / 'run.json'}: no stack of the run's particles there; volumes from "
            "particles need their images: give the folder that `preprocess` wrote with --stack"
        )
    stack = Stack.open(path)
    stack.particles.require_poses("volumes --source particles")
    return stack
