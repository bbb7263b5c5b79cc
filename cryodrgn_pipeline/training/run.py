"""One training from a stack to a run folder: what is read, what is checked, what is left behind."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import ConfigError
from cryodrgn_pipeline.half_sets import split_held_out
from cryodrgn_pipeline.io.atomic import replacing, write_json
from cryodrgn_pipeline.io.checkpoints import MODEL_FILE, TrainedModel, save_model
from cryodrgn_pipeline.io.manifest import digest, environment
from cryodrgn_pipeline.io.runs import write_columns
from cryodrgn_pipeline.models.vae import Vae, VaeConfig
from cryodrgn_pipeline.progress import duration
from cryodrgn_pipeline.stack import Stack, stack_rows
from cryodrgn_pipeline.training.data import TrainingData
from cryodrgn_pipeline.training.loop import Trainer
from cryodrgn_pipeline.training.settings import TrainingSettings
from cryodrgn_pipeline.training.state import (
    MANIFEST,
    CheckpointFolder,
    StopRequest,
    finished,
    only_writer,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRequest:
    """A stack, the particles of it to use (a file of ids, or all), the model and the recipe."""

    stack: Path
    run: Path
    subset: Path | None
    model: VaeConfig
    settings: TrainingSettings
    resume: bool


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; `cuda` without one is a `ConfigError`."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name}: expected auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "--device cuda: this torch sees no GPU. Use --device auto or cpu, or check the driver."
        )
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def train_vae(request: TrainingRequest) -> None:
    """Train, then write latents, weights, metrics and manifest into the run folder.

    A finished run of the same fingerprint and epochs is left as it is. Raises `InputFormatError` without
    poses or with unknown ids, `TrainingError` when the loss is not a number or the folder is in use.
    """
    settings = request.settings
    device = choose_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    stack, rows = stack_rows(request.stack, request.subset)
    described = {
        "method": "vae",
        "stack": stack.fingerprint,
        "particles": digest([str(i) for i in stack.particles.particle_id[rows]]),
        "model": request.model.as_dict(),
        "settings": settings.that_shape_the_result(),
    }
    fingerprint = digest(described)
    with only_writer(request.run), StopRequest().listening() as stop:
        if finished(request.run, fingerprint, settings.epochs):
            log.info("%s: already trained with these images and settings, nothing to do", request.run)
            return
        _train(request, stack, rows, fingerprint, device, stop)


def _train(
    request: TrainingRequest,
    stack: Stack,
    rows: NDArray[np.int64],
    fingerprint: str,
    device: torch.device,
    stop: StopRequest,
) -> None:
    settings, run, started = request.settings, request.run, time.monotonic()
    folder = CheckpointFolder(run, fingerprint)
    state = folder.open(resume=request.resume, epochs=settings.epochs)
    (run / MANIFEST).unlink(missing_ok=True)  # what a shorter run left is no longer the whole
    data = TrainingData(
        stack,
        rows,
        request.model,
        in_memory=settings.in_memory,
        device=device,
        scale=None if state is None else state["scale"],
    )
    train_rows, held_out_rows = split_held_out(
        rows, stack.particles.particle_id[rows], settings.held_out_fraction, settings.seed
    )
    trainer = Trainer(
        Vae(request.model),
        data,
        settings,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        device=device,
        state=state,
    )
    if state is not None:
        log.info("resuming after %d epochs and %d batches", state["epoch"], trainer.progress.batch)
    log.info(
        "VAE: z %d, encoder %d x %d, decoder %d x %d, %d training and %d held-out particles, on %s",
        request.model.latent_dim,
        request.model.encoder_layers,
        request.model.encoder_width,
        request.model.decoder_layers,
        request.model.decoder_width,
        len(train_rows),
        len(held_out_rows),
        device,
    )

    def save() -> None:
        folder.save(trainer.state())
        _write_metrics(run, trainer)
        if trainer.progress.batch == 0 and trainer.progress.epoch < settings.epochs:
            epoch = trainer.progress.epoch
            save_model(folder.path / f"weights_epoch_{epoch:04d}.safetensors", _trained(trainer, stack))

    trainer.run(save, stop)
    low_resolution = (
        data.plane.radius <= data.plane.radius.max() / 2
    )  # where images say most of their content
    latents = trainer.evaluate(rows, torch.nonzero(low_resolution).squeeze(1))
    _write_latents(run, data.particle_id, latents, np.isin(rows, held_out_rows))
    save_model(run / MODEL_FILE, _trained(trainer, stack))
    _write_metrics(run, trainer)
    write_json(run / MANIFEST, _manifest(request, stack, trainer, fingerprint, time.monotonic() - started))
    log.info("trained in %s: %s", duration(trainer.progress.seconds), run)


def _manifest(
    request: TrainingRequest, stack: Stack, trainer: Trainer, fingerprint: str, wall_seconds: float
) -> dict[str, Any]:
    return environment() | {
        "method": "vae",
        "fingerprint": fingerprint,
        "stack": str(request.stack),
        "stack_fingerprint": stack.fingerprint,
        "subset": None if request.subset is None else str(request.subset),
        "n_particles": len(trainer.data),
        "n_held_out": len(trainer.held_out_rows),
        "box_size_px": stack.box_size_px,
        "pixel_size_a": stack.pixel_size_a,
        "scale": trainer.data.scale,
        "model": request.model.as_dict(),
        "settings": request.settings.as_dict(),
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "epochs": trainer.progress.epoch,
        "training_seconds": trainer.progress.seconds,
        "wall_seconds": wall_seconds,
    }


def _trained(trainer: Trainer, stack: Stack) -> TrainedModel:
    return TrainedModel(vae=trainer.vae, scale=trainer.data.scale, pixel_size_a=stack.pixel_size_a)


def _write_latents(
    run: Path, particle_id: NDArray[Any], latents: dict[str, NDArray[Any]], held_out: NDArray[np.bool_]
) -> None:
    columns = {"particle_id": particle_id}
    for prefix, values in (("z", latents["mean"]), ("std", latents["std"])):
        columns |= {f"{prefix}_{j}": values[:, j].astype(np.float32) for j in range(values.shape[1])}
    columns |= {"loss": latents["loss"].astype(np.float32), "held_out": held_out}
    write_columns(run / "latent.parquet", columns)


def _write_metrics(run: Path, trainer: Trainer) -> None:
    with replacing(run / "metrics.jsonl") as temporary:
        temporary.write_text(
            "".join(json.dumps(row) + "\n" for row in trainer.progress.metrics), encoding="utf-8"
        )
