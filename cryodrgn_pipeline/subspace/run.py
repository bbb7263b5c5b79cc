"""From a stack to a run folder with a linear subspace, or with the nonlinear model in its span."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.half_sets import split_held_out
from cryodrgn_pipeline.io.atomic import replacing, write_json
from cryodrgn_pipeline.io.checkpoints import MODEL_FILE, save_model
from cryodrgn_pipeline.io.manifest import digest, environment
from cryodrgn_pipeline.io.runs import write_columns
from cryodrgn_pipeline.models.basis import BasisConfig, BasisModel
from cryodrgn_pipeline.models.linear import LinearModel
from cryodrgn_pipeline.progress import duration
from cryodrgn_pipeline.stack import Stack, stack_rows
from cryodrgn_pipeline.subspace.basis import train_basis
from cryodrgn_pipeline.subspace.em import SubspaceSettings
from cryodrgn_pipeline.subspace.fit import Fit, fit_subspace
from cryodrgn_pipeline.subspace.maps import basis_model, linear_model
from cryodrgn_pipeline.training.state import MANIFEST, finished, only_writer

log = logging.getLogger(__name__)

BASIS_COMPONENTS = 12  # tried, of the subspace that the nonlinear model moves in


@dataclass(frozen=True, slots=True, kw_only=True)
class SubspaceRequest:
    """A stack, the rows of it to use, how many coordinates, and threads (None: all).

    `nonlinear`: go on to the network in the span of the maps; `held_out_fraction` of the particles then only
    measure. `half_set`: the rows are of this half set (0 or 1), and noise is taken from its images alone.
    """

    stack: Path
    run: Path
    subset: Path | None
    latent_dim: int
    nonlinear: bool
    held_out_fraction: float = 0.05
    seed: int = 0
    threads: int | None = None
    half_set: int | None = None

    def settings(self) -> SubspaceSettings:
        """The recipe of the linear fit."""
        tried = BASIS_COMPONENTS if self.nonlinear else self.latent_dim
        return SubspaceSettings(max_components=tried, seed=self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """A model with the columns of its latent table."""

    model: LinearModel | BasisModel
    columns: dict[str, NDArray[Any]]


def train_subspace(request: SubspaceRequest) -> None:
    """Learn, then write latents, maps, log and manifest into the run folder.

    A finished run of the same fingerprint is left as it is. Raises `InputFormatError` without poses or with
    unknown ids, `TrainingError` when the folder is in use.
    """
    started = time.monotonic()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    stack, rows = stack_rows(request.stack, request.subset)
    if request.half_set is not None:
        stack = stack.with_half_noise(request.half_set)
    settings = request.settings()
    described = {
        "method": "vae" if request.nonlinear else "subspace",
        "stack": stack.fingerprint,
        "particles": digest([str(i) for i in stack.particles.particle_id[rows]]),
        "settings": asdict(settings) | {"latent_dim": request.latent_dim},
        "held_out_fraction": request.held_out_fraction if request.nonlinear else 0,
    }
    if request.half_set is not None:
        described["noise_of_half_set"] = request.half_set
    fingerprint, run = digest(described), request.run
    with only_writer(run):
        if finished(run, fingerprint):
            log.info("%s: already trained with these images and settings, nothing to do", run)
            return
        (run / MANIFEST).unlink(missing_ok=True)
        fit = fit_subspace(stack, rows, settings)
        if request.nonlinear and fit.posterior.z.shape[1]:
            learnt = _nonlinear(request, stack, rows, fit, settings)
        else:
            model = linear_model(stack, rows, fit, request.latent_dim, settings)
            learnt = Learnt(model=model, columns=_linear_columns(fit, model, request.latent_dim))
        save_model(run / MODEL_FILE, learnt.model)
        ids = {"particle_id": stack.particles.particle_id[rows]}
        poses = fit.known.poses
        offsets = {} if poses is None else poses.columns(stack.box_size_px * stack.pixel_size_a)
        write_columns(run / "latent.parquet", ids | learnt.columns | offsets)
        _write_metrics(run, fit)
        seconds = time.monotonic() - started
        write_json(run / MANIFEST, _manifest(request, stack, fit, described, fingerprint, seconds))
    log.info("learnt in %s: %s", duration(time.monotonic() - started), run)


def _nonlinear(
    request: SubspaceRequest, stack: Stack, rows: NDArray[np.int64], fit: Fit, settings: SubspaceSettings
) -> Learnt:
    _, kept_out = split_held_out(
        rows, stack.particles.particle_id[rows], request.held_out_fraction, request.seed
    )
    held_out = torch.from_numpy(np.isin(rows, kept_out))
    config = BasisConfig(
        components=fit.posterior.z.shape[1], latent_dim=request.latent_dim, seed=request.seed
    )
    vae, latents = train_basis(fit, held_out, config, settings)
    columns = _coordinates(latents.z, latents.std, request.latent_dim) | {
        "loss": latents.loss.numpy(),
        "contrast": fit.posterior.scale.float().numpy(),
        "log_evidence": latents.evidence.numpy(),
        "held_out": held_out.numpy(),
    }
    return Learnt(model=basis_model(stack, rows, fit, vae, latents, settings), columns=columns)


def _linear_columns(fit: Fit, model: LinearModel, latent_dim: int) -> dict[str, NDArray[Any]]:
    """Coordinates with their whole posterior; those of components that were not kept are 0 ± 0."""
    where = fit.posterior.turned(torch.diag(model.spread.double()))
    deviation = where.covariance.diagonal(dim1=1, dim2=2).sqrt()
    columns = _coordinates(where.z, deviation, latent_dim)
    for j in range(model.components):
        for k in range(j):
            columns[f"cov_{j}_{k}"] = where.covariance[:, j, k].float().numpy()
    return columns | {
        "loss": where.loss.float().numpy(),
        "contrast": where.scale.float().numpy(),
        "log_evidence": where.evidence.float().numpy(),
        "held_out": np.zeros(len(where.z), dtype=bool),
    }


def _coordinates(z: Tensor, std: Tensor, latent_dim: int) -> dict[str, NDArray[Any]]:
    columns: dict[str, NDArray[Any]] = {}
    for prefix, values in (("z", z), ("std", std)):
        padded = torch.nn.functional.pad(values.float(), (0, latent_dim - values.shape[1])).numpy()
        columns |= {f"{prefix}_{j}": padded[:, j] for j in range(latent_dim)}
    return columns


def _write_metrics(run: Path, fit: Fit) -> None:
    lines = (
        json.dumps({"epoch": number + 1, "reconstruction": entry["loss"], **entry})
        for number, entry in enumerate(fit.history)
    )
    with replacing(run / "metrics.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _pose_offsets(fit: Fit, stack: Stack) -> dict[str, Any] | None:
    """Whether poses were corrected, by how much, and what offsets gained; None where they were not tried."""
    if fit.pose_gain is None:
        return None
    poses, (mean, error) = fit.known.poses, fit.pose_gain
    box_size_a = stack.box_size_px * stack.pixel_size_a
    return {
        "corrected": poses is not None,
        "shift_spread_a": None if poses is None else poses.shift_spread * box_size_a,
        "held_out_gain": {"mean": mean, "standard_error": error},
    }


def _manifest(
    request: SubspaceRequest,
    stack: Stack,
    fit: Fit,
    described: dict[str, Any],
    fingerprint: str,
    seconds: float,
) -> dict[str, Any]:
    return environment() | {
        "method": described["method"],
        "encoder": "subspace",
        "decoder": "basis" if request.nonlinear else "linear",
        "fingerprint": fingerprint,
        "stack": str(request.stack),
        "stack_fingerprint": stack.fingerprint,
        "subset": None if request.subset is None else str(request.subset),
        "n_particles": len(fit.posterior.z),
        "box_size_px": stack.box_size_px,
        "pixel_size_a": stack.pixel_size_a,
        "components": fit.supported,
        "components_tried": described["settings"]["max_components"],
        "held_out_gain": [{"mean": mean, "standard_error": error} for mean, error in fit.gains],
        "contrast_spread": fit.known.scale_spread,
        "pose_offsets": _pose_offsets(fit, stack),
        "noise_images": int(fit.posterior.is_noise.sum()),
        "settings": described["settings"],
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "epochs": len(fit.history),
        "training_seconds": seconds,
        "wall_seconds": seconds,
    }
