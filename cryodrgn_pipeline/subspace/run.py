"""From a stack to a run folder with a linear subspace, or with a nonlinear model in its span."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.devices import use_threads
from cryodrgn_pipeline.half_sets import split_held_out
from cryodrgn_pipeline.io.atomic import write_json
from cryodrgn_pipeline.io.checkpoints import MODEL_FILE, save_model
from cryodrgn_pipeline.io.manifest import digest, environment
from cryodrgn_pipeline.io.runs import write_columns, write_metrics
from cryodrgn_pipeline.models.basis import BasisConfig, BasisModel
from cryodrgn_pipeline.models.kernel import KernelModel
from cryodrgn_pipeline.models.linear import LinearModel
from cryodrgn_pipeline.progress import duration, recorded
from cryodrgn_pipeline.ranks import ALONE, Ranks
from cryodrgn_pipeline.stack import Stack, stack_rows
from cryodrgn_pipeline.subspace.basis import Seen, train_basis
from cryodrgn_pipeline.subspace.em import LEARN_FROM, Known, LevelState, SubspaceSettings
from cryodrgn_pipeline.subspace.fit import Fit, fit_subspace, metric_rows
from cryodrgn_pipeline.subspace.journal import Journal, keeping
from cryodrgn_pipeline.subspace.kernel import KernelLatents, kernel_model
from cryodrgn_pipeline.subspace.maps import basis_model, linear_model
from cryodrgn_pipeline.subspace.placing import kept_subspace
from cryodrgn_pipeline.subspace.poses import PoseOffsets, PoseStep
from cryodrgn_pipeline.subspace.posterior import Posterior
from cryodrgn_pipeline.subspace.sums import InnerProducts
from cryodrgn_pipeline.training.state import MANIFEST, CheckpointFolder, StopRequest, finished, only_writer

log = logging.getLogger(__name__)

NONLINEAR_COMPONENTS = 12  # tried, of the subspace that a nonlinear model moves in
DECODERS = ("linear", "basis", "kernel")


@dataclass(frozen=True, slots=True, kw_only=True)
class SubspaceRequest:
    """A stack, the rows of it to use, how many coordinates, threads (None: all), and what sums are made on.

    `learn_from`: how many particles teach subspace and maps at most; all are placed.
    `decoder`: stay linear, or go on to functions of a kernel or to a network (basis) in the span of the maps;
    `held_out_fraction` of the particles only measure that network. `half_set`: the rows are of this half set
    (0 or 1), and noise is taken from its images alone. At most `checkpoint_every_minutes` of work are lost by
    an interruption; `resume`: go on from its checkpoints.
    """

    stack: Path
    run: Path
    subset: Path | None
    latent_dim: int
    decoder: str
    learn_from: int = LEARN_FROM
    held_out_fraction: float = 0.05
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    half_set: int | None = None
    checkpoint_every_minutes: float = 15.0
    resume: bool = True

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder {self.decoder!r} is none of {', '.join(DECODERS)}")

    def settings(self) -> SubspaceSettings:
        """The recipe of the linear fit."""
        tried = self.latent_dim if self.decoder == "linear" else NONLINEAR_COMPONENTS
        return SubspaceSettings(
            max_components=tried, seed=self.seed, learn_from=self.learn_from, device=self.device
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """A model with the columns of its latent table, and what the images say about its network's maps."""

    model: LinearModel | BasisModel | KernelModel
    columns: dict[str, NDArray[Any]]
    seen: Seen | None = None


def train_subspace(request: SubspaceRequest, ranks: Ranks = ALONE) -> None:
    """Learn, then write latents, maps, log and manifest into the run folder.

    A finished run of the same fingerprint is left as it is. Ranks share the images; rank 0 writes. Raises
    `InputFormatError` without poses or with unknown ids, `TrainingError` when the folder is in use.
    """
    started = time.monotonic()
    use_threads(request.threads)
    stack, rows = stack_rows(request.stack, request.subset)
    if request.half_set is not None:
        stack = stack.with_half_noise(request.half_set)
    described = {
        "method": "subspace" if request.decoder == "linear" else "vae",
        "decoder": request.decoder,
        "stack": stack.fingerprint,
        "particles": digest([str(i) for i in stack.particles.particle_id[rows]]),
        "settings": request.settings().recipe() | {"latent_dim": request.latent_dim},
        "held_out_fraction": request.held_out_fraction if request.decoder == "basis" else 0,
    }
    if request.half_set is not None:
        described["noise_of_half_set"] = request.half_set
    fingerprint, run = digest(described), request.run
    with only_writer(run) if ranks.leads else nullcontext(), StopRequest().listening() as stop:
        if any(ranks.largest(ranks.leads and finished(run, fingerprint))):
            log.info("%s: already trained with these images and settings, nothing to do", run)
            return
        folder = CheckpointFolder(run, fingerprint)
        if ranks.leads:
            (run / MANIFEST).unlink(missing_ok=True)
            folder.open(resume=request.resume)
        progress_file = recorded(run) if ranks.leads else nullcontext()
        with progress_file, keeping(journal_of(request, stack, folder, stop, ranks)):
            fit, learnt = learn(request, stack, rows)
            if not ranks.leads:
                return
            seconds = time.monotonic() - started
            manifest = environment() | {
                "method": described["method"],
                "encoder": "subspace",
                "decoder": request.decoder,
                "fingerprint": fingerprint,
                **about(request, stack, fit),
                "epochs": len(fit.history),
                "training_seconds": seconds,
                "wall_seconds": seconds,
                "processes": ranks.size,
            }
            write_learnt(run, stack.particles.particle_id[rows], fit, learnt, manifest)
        folder.close()
    log.info("learnt in %s: %s", duration(time.monotonic() - started), run)


def journal_of(
    request: SubspaceRequest, stack: Stack, folder: CheckpointFolder, stop: StopRequest, ranks: Ranks
) -> Journal:
    """What a run keeps of its steps while it learns."""
    return Journal(
        folder.journal,
        stack,
        (Fit, LevelState, Known, Posterior, PoseOffsets, PoseStep, InnerProducts, Seen, KernelLatents),
        every_minutes=request.checkpoint_every_minutes,
        stop=stop,
        device=request.device,
        ranks=ranks,
    )


def learn(request: SubspaceRequest, stack: Stack, rows: NDArray[np.int64]) -> tuple[Fit, Learnt]:
    """The subspace of some rows of a stack, and the linear model in it or a nonlinear one.

    Where held-out images support no component, the model is the mean map: a linear one either way.
    """
    settings = request.settings()
    fit = fit_subspace(stack, rows, settings)
    if request.decoder == "kernel" and fit.supported:
        kernel, latents = kernel_model(stack, rows, fit, request.latent_dim, settings)
        learnt = Learnt(model=kernel, columns=kernel_columns(latents, fit.posterior.scale, kernel))
    elif request.decoder == "basis" and fit.supported:
        learnt = _network(request, stack, rows, fit, settings)
    else:
        subspace = kept_subspace(stack, rows, fit, fit.level.maps, None)
        model = replace(linear_model(stack, rows, fit, request.latent_dim, settings), subspace=subspace)
        learnt = Learnt(model=model, columns=linear_columns(fit.posterior, model))
    poses = fit.known.poses
    offsets = {} if poses is None else poses.columns(stack.box_size_px * stack.pixel_size_a)
    return fit, replace(learnt, columns=learnt.columns | offsets)


def write_learnt(
    run: Path, particle_id: NDArray[Any], fit: Fit, learnt: Learnt, manifest: dict[str, Any]
) -> None:
    """Write model, latents, log and, last, the manifest into the run folder."""
    save_model(run / MODEL_FILE, learnt.model)
    write_columns(run / "latent.parquet", {"particle_id": particle_id} | learnt.columns)
    write_metrics(run, metric_rows(fit.history))
    write_json(run / MANIFEST, manifest)


def _network(
    request: SubspaceRequest, stack: Stack, rows: NDArray[np.int64], fit: Fit, settings: SubspaceSettings
) -> Learnt:
    _, kept_out = split_held_out(
        rows, stack.particles.particle_id[rows], request.held_out_fraction, request.seed
    )
    held_out = torch.from_numpy(np.isin(rows, kept_out))
    config = BasisConfig(
        components=fit.posterior.z.shape[1], latent_dim=request.latent_dim, seed=request.seed
    )
    placing = fit.level.maps
    vae, latents, seen = train_basis(fit, held_out, config, settings)
    subspace = kept_subspace(stack, rows, fit, placing, fit.level.maps)
    columns = coordinates(latents.z, latents.std, request.latent_dim) | {
        "loss": latents.loss.numpy(),
        "contrast": fit.posterior.scale.float().numpy(),
        "log_evidence": latents.evidence.numpy(),
        "held_out": held_out.numpy(),
    }
    model = replace(basis_model(stack, rows, fit, vae, latents, settings), subspace=subspace)
    return Learnt(model=model, columns=columns, seen=seen)


def linear_columns(where: Posterior, model: LinearModel) -> dict[str, NDArray[Any]]:
    """Coordinates with their whole posterior; those of components that were not kept are 0 ± 0."""
    where = where.turned(torch.diag(model.spread.double()))
    return _with_covariance(where.z, where.covariance, model.latent_dim) | {
        "loss": where.loss.float().numpy(),
        "contrast": where.scale.float().numpy(),
        "log_evidence": where.evidence.float().numpy(),
        "held_out": np.zeros(len(where.z), dtype=bool),
    }


def kernel_columns(latents: KernelLatents, contrast: Tensor, model: KernelModel) -> dict[str, NDArray[Any]]:
    """The same of a kernel's model."""
    return _with_covariance(latents.z, latents.covariance, model.latent_dim) | {
        "loss": latents.loss.float().numpy(),
        "contrast": contrast.float().numpy(),
        "log_evidence": latents.evidence.float().numpy(),
        "held_out": np.zeros(len(latents.z), dtype=bool),
    }


def _with_covariance(z: Tensor, covariance: Tensor, latent_dim: int) -> dict[str, NDArray[Any]]:
    columns = coordinates(z, covariance.diagonal(dim1=1, dim2=2).sqrt(), latent_dim)
    for j in range(z.shape[1]):
        for k in range(j):
            columns[f"cov_{j}_{k}"] = covariance[:, j, k].float().numpy()
    return columns


def coordinates(z: Tensor, std: Tensor, latent_dim: int) -> dict[str, NDArray[Any]]:
    """Columns z_j and std_j; those beyond the coordinates that are there are 0."""
    columns: dict[str, NDArray[Any]] = {}
    for prefix, values in (("z", z), ("std", std)):
        padded = torch.nn.functional.pad(values.float(), (0, latent_dim - values.shape[1])).numpy()
        columns |= {f"{prefix}_{j}": padded[:, j] for j in range(latent_dim)}
    return columns


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


def about(request: SubspaceRequest, stack: Stack, fit: Fit) -> dict[str, Any]:
    """What a manifest says about images, components, contrast and poses."""
    settings = request.settings()
    return {
        "stack": str(request.stack),
        "stack_fingerprint": stack.fingerprint,
        "subset": None if request.subset is None else str(request.subset),
        "n_particles": len(fit.posterior.z),
        "box_size_px": stack.box_size_px,
        "pixel_size_a": stack.pixel_size_a,
        "components": fit.supported,
        "components_tried": settings.max_components,
        "held_out_gain": [{"mean": mean, "standard_error": error} for mean, error in fit.gains],
        "contrast_spread": fit.known.scale_spread,
        "pose_offsets": _pose_offsets(fit, stack),
        "noise_images": int(fit.posterior.is_noise.sum()),
        "settings": settings.recipe() | {"latent_dim": request.latent_dim},
        "device": settings.device,
        "threads": torch.get_num_threads(),
    }
