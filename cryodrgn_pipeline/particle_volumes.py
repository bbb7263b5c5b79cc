"""Volumes from the particles themselves: the images near each latent point correct the model's own map.

`particle_volumes_sums` says which particles speak for a point and sums their images, `particle_volumes_maps`
makes the map, the half maps and the FSC of it; here they meet run, stack and files. See docs/volumes.md.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.fourier.fsc import resolution_a
from cryodrgn_pipeline.fourier.slices import resample_volume, volume_grid
from cryodrgn_pipeline.half_sets import half_sets
from cryodrgn_pipeline.io.atomic import replacing_directory
from cryodrgn_pipeline.io.checkpoints import Model, TrainedModel, load_model
from cryodrgn_pipeline.io.ids import read_id_rows
from cryodrgn_pipeline.io.mrc import write_volume
from cryodrgn_pipeline.io.runs import read_covariances, read_json, read_latents, write_columns
from cryodrgn_pipeline.particle_volumes_maps import BANDS, StateMap, state_map
from cryodrgn_pipeline.particle_volumes_sums import (
    SHARES,
    Rings,
    accumulate_targets,
    rings_of,
    squared_distances,
    sums_bytes,
)
from cryodrgn_pipeline.progress import duration, progress
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.poses import PoseOffsets, read_pose_offsets
from cryodrgn_pipeline.subspace.posterior import NOISE_LIKELIER
from cryodrgn_pipeline.volumes import OURS, MapOptions, check_options, finished_map, support_columns

log = logging.getLogger(__name__)

BUDGET_BYTES = 4 * 2**30  # of sums held at a time: more targets take more passes over the images
LARGEST_BYTES = 6 * 2**30  # of one target's sums: a larger box has fewer kernel widths to choose from


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticleVolumes:
    """What to make: maps at `targets` `(T, J)` of a run.

    `ids`: only the particles of this file, all alike, at one target. `stack`: a stack of the run's particles,
    None for the run's own.
    """

    run: Path
    targets: NDArray[np.float32]
    ids: Path | None
    stack: Path | None
    options: MapOptions


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


def particle_volumes(request: ParticleVolumes, output: Path, device: torch.device) -> list[Path]:
    """Make one map per target and write them with their half maps and `volumes.parquet`; the maps' paths.

    The folder appears whole or not at all.

    Parameters
    ----------
    device
        Where the model draws its maps; images are summed up on the CPU.

    Raises
    ------
    InputFormatError
        If the stack is missing or lacks particles of the run, or the targets do not fit the model.
    ConfigError
        If crop or filter do not fit the maps.
    """
    started = time.monotonic()
    model = load_model(request.run, device)
    if request.targets.shape[1] != model.latent_dim:
        raise InputFormatError(
            f"z holds rows of {request.targets.shape[1]} numbers; the model of {request.run} expects rows of "
            f"{model.latent_dim}"
        )
    stack = _stack_of(request)
    check_options(request.options, stack.box_size_px, stack.pixel_size_a)
    members = members_of(request, stack)
    squared = squared_distances(members.z, members.covariance, request.targets.astype(np.float64))
    log.info(
        "%d particles, %d targets at %d px; the model saw both half sets, so their FSC is optimistic "
        "(fsc_independent is false)",
        *(int(members.counted.sum()), len(request.targets), stack.box_size_px),
    )
    outside = np.where(members.counted[:, None], 0.0 if request.ids else squared, np.inf)
    most = 1 if request.ids else max(1, LARGEST_BYTES // sums_bytes(stack.box_size_px, 1))
    rings = rings_of(outside, SHARES[-most:])
    models, grids, combination = predictions(model, request.targets, members.z, squared, stack)
    per_pass = max(1, BUDGET_BYTES // sums_bytes(stack.box_size_px, rings.widths))
    blocks = [slice(at, at + per_pass) for at in range(0, len(models), per_pass)]
    log.info(
        "%d kernel widths, sums of %.2f GiB, passes over the images: %d",
        *(rings.widths, min(per_pass, len(models)) * sums_bytes(stack.box_size_px, rings.widths) / 2**30),
        len(blocks),
    )
    names = [f"vol_{number:03d}.mrc" for number in range(len(models))]
    table: list[dict[str, Any]] = []
    with replacing_directory(output, ours=OURS) as folder:
        (folder / "halves").mkdir()
        for block in blocks:
            around = rings.ring[:, block]
            with progress("volumes from particles", int((around >= 0).any(axis=1).sum())) as advance:
                sums = accumulate_targets(
                    stack,
                    members.rows,
                    around,
                    members.half,
                    members.contrast,
                    grids,
                    combination,
                    poses=members.poses,
                    advance=advance,
                )
            for number, of_target in zip(range(len(models))[block], sums.sums, strict=True):
                found = state_map(of_target, rings.weights(number), models[number])
                row = _row(found, rings, number, stack)
                table.append(row | _write(folder, names[number], found, request.options, stack.pixel_size_a))
                log.info("%s: %s", names[number], _in_words(row))
            del sums, of_target  # before the next block's are made
        latent = {f"z_{j}": request.targets[:, j] for j in range(model.latent_dim)}
        measured = {key: np.array([row[key] for row in table]) for key in table[0] if key not in _PATHS}
        paths = {key: [row[key] for row in table] for key in _PATHS}
        support = support_columns(request.run, request.targets)
        write_columns(folder / "volumes.parquet", {"path": names, **latent, **paths, **measured, **support})
    log.info("%d volumes in %s: %s", len(models), duration(time.monotonic() - started), output)
    return [output / name for name in names]


def members_of(request: ParticleVolumes, stack: Stack) -> Members:
    """The run's particles in its stack: joined by id, with posterior, half set and contrast."""
    latents = read_latents(request.run)
    known = {identity: row for row, identity in enumerate(stack.particles.particle_id.tolist())}
    found = np.array([known.get(identity, -1) for identity in latents.particle_id.tolist()])
    if (found < 0).any():
        example = latents.particle_id[int(np.argmin(found))]
        raise InputFormatError(
            f"{stack.path}: {int((found < 0).sum())} of the {len(found)} particles of the run {request.run} "
            f"are not in this stack, such as {example}; give the folder that `preprocess` made of them with "
            "--stack"
        )
    n, j = latents.z.shape
    covariance = read_covariances(request.run)
    counted = np.ones(n, dtype=bool)
    if latents.log_evidence is not None:
        counted = latents.log_evidence >= NOISE_LIKELIER
    if request.ids is not None:
        asked = read_id_rows(request.ids, latents.particle_id, f"the run {request.run}")
        counted = counted & np.isin(np.arange(n), asked)
    half, source = half_sets(stack.particles)
    if len(np.unique(half[found[counted]])) < 2:
        raise InputFormatError(
            f"{request.ids or request.run}: {int(counted.sum())} particles, all of one half set: a map and "
            "its half maps need particles of both"
        )
    log.info("half sets: %s", source)
    order = np.argsort(found)
    poses = read_pose_offsets(request.run, stack.box_size_px * stack.pixel_size_a)
    contrast = np.ones(n, np.float32) if latents.contrast is None else latents.contrast
    return Members(
        rows=found[order],
        z=latents.z[order].astype(np.float64),
        covariance=np.zeros((n, j, j)) if covariance is None else covariance[order].astype(np.float64),
        half=half[found[order]],
        contrast=contrast[order],
        counted=counted[order],
        poses=None if poses is None else poses.of(order),
    )


@torch.no_grad()
def predictions(
    model: Model,
    targets: NDArray[np.float32],
    z: NDArray[np.float64],
    squared: NDArray[np.float64],
    stack: Stack,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What the model says at the targets and of each particle, on the grid of the stack.

    A model made of maps predicts every particle at its own z; a decoder would have to be run for each, so
    that particles are predicted at the target nearest to them.

    Parameters
    ----------
    targets, z
        `(T, J)` and `(N, J)`.
    squared
        `(N, T)` squared distances.

    Returns
    -------
    T maps `(D, D, D)`; grids `(K, E, E, E/2+1)` complex64 and their factor in each particle `(N, K)` float32.
    """

    def on_grid(volume: Tensor) -> Tensor:
        d, p = stack.box_size_px, stack.pixel_size_a
        if volume.shape[-1] == d and abs(model.pixel_size_a / p - 1) < 1e-6:
            return volume.cpu()
        # images keep their grey scale in another box, and more, smaller voxels sum up to it
        return resample_volume(volume.cpu(), model.pixel_size_a, d, p) * (p / model.pixel_size_a)

    maps = [on_grid(model.density(torch.from_numpy(target), model.box_size_px)) for target in targets]
    if not isinstance(model, TrainedModel):
        grids = torch.stack([volume_grid(on_grid(each)) for each in model.maps])
        return maps, grids, model.factors(torch.from_numpy(z).float()).float().cpu()
    log.info("a decoder's prediction of each particle is its map at the nearest target")
    nearest = torch.from_numpy(squared.argmin(axis=1))
    one_of_them = torch.nn.functional.one_hot(nearest, len(maps)).float()
    return maps, torch.stack([volume_grid(volume) for volume in maps]), one_of_them


_PATHS = ("half1_path", "half2_path")


def _stack_of(request: ParticleVolumes) -> Stack:
    path = request.stack
    if path is None:
        manifest = read_json(request.run / "run.json", "give the stack with --stack")
        path = Path(manifest.get("stack", "")) if manifest.get("stack") else None
    if path is None or not path.is_dir():
        raise InputFormatError(
            f"{path or request.run / 'run.json'}: no stack of the run's particles there; volumes from "
            "particles need their images: give the folder that `preprocess` wrote with --stack"
        )
    stack = Stack.open(path)
    stack.particles.require_poses("volumes --source particles")
    return stack


def _row(found: StateMap, rings: Rings, number: int, stack: Stack) -> dict[str, Any]:
    d, p = stack.box_size_px, stack.pixel_size_a
    resolutions = {
        "resolution_fsc0143_a": resolution_a(found.curve, 0.143, d, p),
        "resolution_fsc05_a": resolution_a(found.curve, 0.5, d, p),
    }
    edge, effective = rings.edge[number], rings.n_effective(number)
    return {
        **{key: np.nan if value is None else value for key, value in resolutions.items()},
        "n_effective": float(min(effective[width] for width in found.width)),
        "fsc_independent": False,
        "residual_share": found.residual_share,
        **{f"kernel_width_{band}": float(edge[found.width[band]]) for band in range(BANDS)},
        **{
            f"residual_width_{band}": float(edge[width]) if width >= 0 else np.nan
            for band, width in enumerate(found.residual_width)
        },
    }


def _write(
    folder: Path, name: str, found: StateMap, options: MapOptions, pixel_size_a: float
) -> dict[str, str]:
    """Write a map and its half maps, which are mirrored and cropped with it but not filtered."""
    whole = finished_map(found.density, pixel_size_a, options)
    write_volume(folder / name, whole.numpy(), pixel_size_a, "from particles")
    unfiltered = MapOptions(flip_hand=options.flip_hand, crop_px=options.crop_px)
    paths = {}
    for number, half in enumerate(found.halves, start=1):
        path = f"halves/{Path(name).stem}_half{number}.mrc"
        half = finished_map(half, pixel_size_a, unfiltered)
        write_volume(folder / path, half.numpy(), pixel_size_a, f"from particles, half {number}")
        paths[f"half{number}_path"] = path
    return paths


def _in_words(row: dict[str, Any]) -> str:
    resolution = row["resolution_fsc0143_a"]
    resolved = "nothing resolved" if np.isnan(resolution) else f"{resolution:.2f} Å (FSC 0.143)"
    of_model = ", the model's map as it is" if row["residual_share"] == 0 else ""
    return f"{resolved}, {row['n_effective']:.0f} particles in effect{of_model}"
