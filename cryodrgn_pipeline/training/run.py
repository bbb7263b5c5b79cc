"""One training from a stack to a run folder: what is read, what is checked, what is left behind."""

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

from cryodrgn_pipeline.devices import choose_device, use_threads
from cryodrgn_pipeline.half_sets import split_held_out
from cryodrgn_pipeline.io.atomic import write_json
from cryodrgn_pipeline.io.checkpoints import MODEL_FILE, TrainedModel, load_state, save_model
from cryodrgn_pipeline.io.manifest import digest, environment
from cryodrgn_pipeline.io.runs import write_columns, write_metrics
from cryodrgn_pipeline.models.basis import BasisModel, BasisVae
from cryodrgn_pipeline.models.encoder import Reading
from cryodrgn_pipeline.models.from_subspace import ImageBasisVae, ResidualVae
from cryodrgn_pipeline.models.vae import Vae, VaeConfig
from cryodrgn_pipeline.progress import duration, recorded
from cryodrgn_pipeline.ranks import Ranks, joined
from cryodrgn_pipeline.stack import Stack, stack_rows
from cryodrgn_pipeline.subspace.journal import keeping
from cryodrgn_pipeline.subspace.run import SubspaceRequest, journal_of
from cryodrgn_pipeline.training.data import TrainingData
from cryodrgn_pipeline.training.grey import grey_reference
from cryodrgn_pipeline.training.loop import Network, Trainer
from cryodrgn_pipeline.training.settings import TrainingSettings
from cryodrgn_pipeline.training.start import Start, learn_start
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


def train_vae(request: TrainingRequest) -> None:
    """Train, then write latents, weights, metrics and manifest into the run folder.

    An encoder of the subspace or a decoder in its maps starts from the default model, which is learnt first.
    A finished run of the same fingerprint and epochs is left as it is. Under torchrun all ranks train it
    together; it does not depend on how many there are, and rank 0 writes. Raises `InputFormatError` without
    poses or with unknown ids, `TrainingError` when the loss is not a number or the folder is in use.
    """
    settings = request.settings
    device = choose_device(settings.device)
    use_threads(settings.threads)
    stack, rows = stack_rows(request.stack, request.subset)
    described = {
        "method": "vae",
        "stack": stack.fingerprint,
        "particles": digest([str(i) for i in stack.particles.particle_id[rows]]),
        "model": request.model.as_dict(),
        "settings": settings.that_shape_the_result(),
    }
    fingerprint = digest(described)
    with joined(device) as ranks:
        lock = only_writer(request.run) if ranks.leads else nullcontext()
        with lock, StopRequest().listening() as stop:
            # of a rigid particle there is nothing to train: no epochs, however many are asked for
            lengths = (settings.epochs, 0) if ranks.leads else ()
            done = any(finished(request.run, fingerprint, epochs) for epochs in lengths)
            if any(ranks.largest(done)):
                log.info("%s: already trained with these images and settings, nothing to do", request.run)
                return
            with recorded(request.run) if ranks.leads else nullcontext():
                _train(request, stack, rows, fingerprint, device, stop, ranks)


def _train(
    request: TrainingRequest,
    stack: Stack,
    rows: NDArray[np.int64],
    fingerprint: str,
    device: torch.device,
    stop: StopRequest,
    ranks: Ranks,
) -> None:
    settings, run, started = request.settings, request.run, time.monotonic()
    folder = CheckpointFolder(run, fingerprint)
    from_subspace = request.model.encoder == "subspace" or request.model.decoder == "basis"
    state, start = _saved(folder, request, from_subspace, ranks)
    if from_subspace and start is None:
        subspace = _of_subspace(request)
        with keeping(journal_of(subspace, stack, folder, stop, ranks)):
            start = learn_start(subspace, stack, rows, request.model, fingerprint, folder.path, ranks)
        if start is None:
            return
    data = TrainingData(
        stack,
        rows,
        request.model,
        in_memory=settings.in_memory,
        device=device,
        scale=None if state is None else state["scale"],
        input_scale=None if state is None else state["input_scale"],
        placed=None if start is None else start.placed,
        copies=ranks.local_size,
    )
    train_rows, held_out_rows = split_held_out(
        rows, stack.particles.particle_id[rows], settings.held_out_fraction, settings.seed
    )
    if start is not None:
        train_rows = np.setdiff1d(train_rows, rows[start.is_noise.numpy()])
    trainer = Trainer(
        _network(request.model, start, data.scale),
        data,
        settings,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        device=device,
        state=state,
        products=start.seen if start is not None and request.model.decoder == "basis" else None,
        ranks=ranks,
    )
    if state is not None:
        log.info("resuming after %d epochs and %d batches", state["epoch"], trainer.progress.batch)
    log.info(
        "VAE: z %d, encoder %s, decoder %s, %d training and %d held-out particles, on %s%s",
        request.model.latent_dim,
        _in_words(request.model, "encoder", "image"),
        _in_words(request.model, "decoder", "mlp"),
        len(train_rows),
        len(held_out_rows),
        device.type,
        f" in {ranks.size} processes" if ranks.size > 1 else "",
    )

    def save() -> None:
        if not ranks.leads:
            return
        folder.save(trainer.state())
        write_metrics(run, trainer.progress.metrics)
        if trainer.progress.batch == 0 and trainer.progress.epoch < settings.epochs:
            epoch = trainer.progress.epoch
            save_model(
                folder.path / f"weights_epoch_{epoch:04d}.safetensors", _trained(trainer, stack, start)
            )

    trainer.run(save, stop)
    latents = trainer.evaluate(rows, low_resolution_points(data))
    if ranks.leads:
        _write_results(request, stack, rows, trainer, start, latents)
        about = _manifest(request, stack, trainer, fingerprint, start, time.monotonic() - started)
        write_json(run / MANIFEST, about)
        log.info("trained in %s: %s", duration(trainer.progress.seconds), run)


def _saved(
    folder: CheckpointFolder, request: TrainingRequest, from_subspace: bool, ranks: Ranks
) -> tuple[dict[str, Any] | None, Start | None]:
    """What an earlier attempt left: the state of training, and what was learnt for it to start from."""
    state, start = None, None
    if ranks.leads:
        state = folder.open(resume=request.resume, epochs=request.settings.epochs)
        (request.run / MANIFEST).unlink(missing_ok=True)  # what a shorter run left is no longer the whole
    if ranks.leads and from_subspace:
        start = Start.load(folder.path, folder.fingerprint)
    resuming, started_from = ranks.largest(state is not None, start is not None)
    if not ranks.leads:  # rank 0 has put in order what the others read
        state = load_state(folder.state_file) if resuming else None
        start = Start.load(folder.path, folder.fingerprint) if started_from else None
    return state, start


def _write_results(
    request: TrainingRequest,
    stack: Stack,
    rows: NDArray[np.int64],
    trainer: Trainer,
    start: Start | None,
    latents: dict[str, NDArray[Any]],
) -> None:
    """Latents, model and metrics; the manifest, which says that they are whole, comes after them."""
    run = request.run
    columns = latent_columns(latents) | {"held_out": np.isin(rows, trainer.held_out_rows)}
    write_columns(
        run / "latent.parquet",
        {"particle_id": trainer.data.particle_id} | columns | ({} if start is None else start.columns),
    )
    model = _trained(trainer, stack, start)
    if isinstance(model, TrainedModel) and start is None:
        model = replace(model, grey=grey_reference(model, stack, rows, latents["mean"]))
    save_model(run / MODEL_FILE, model)
    write_metrics(run, trainer.progress.metrics)


def _of_subspace(request: TrainingRequest) -> SubspaceRequest:
    settings = request.settings
    return SubspaceRequest(
        stack=request.stack,
        run=request.run,
        subset=request.subset,
        latent_dim=request.model.latent_dim,
        decoder="basis",
        learn_from=settings.learn_from,
        held_out_fraction=settings.held_out_fraction,
        seed=settings.seed,
        threads=settings.threads,
        checkpoint_every_minutes=settings.checkpoint_every_minutes,
        device=choose_device(settings.device).type,
    )


def _network(model: VaeConfig, start: Start | None, scale: float) -> Network:
    if start is None:
        return Vae(model)
    if model.decoder == "mlp":
        return ResidualVae(model, start.model, scale)
    if not isinstance(start.model.vae, BasisVae):
        raise ValueError("the start is the model whose encoder reads the subspace")
    return ImageBasisVae(model, start.model.vae)


def _in_words(model: VaeConfig, part: str, sized: str) -> str:
    kind, layers, width = (getattr(model, f"{part}{ending}") for ending in ("", "_layers", "_width"))
    return f"{kind} {layers} x {width}" if kind == sized else str(kind)


def _manifest(
    request: TrainingRequest,
    stack: Stack,
    trainer: Trainer,
    fingerprint: str,
    start: Start | None,
    wall_seconds: float,
) -> dict[str, Any]:
    return (
        environment()
        | ({} if start is None else start.about)
        | {
            "method": "vae",
            "encoder": request.model.encoder,
            "decoder": request.model.decoder,
            "fingerprint": fingerprint,
            "stack": str(request.stack),
            "stack_fingerprint": stack.fingerprint,
            "subset": None if request.subset is None else str(request.subset),
            "n_particles": len(trainer.data),
            "n_held_out": len(trainer.held_out_rows),
            "box_size_px": stack.box_size_px,
            "pixel_size_a": stack.pixel_size_a,
            "scale": trainer.data.scale,
            "beta": trainer.beta,
            "model": request.model.as_dict(),
            "settings": request.settings.as_dict(),
            "device": trainer.device.type,
            "processes": trainer.ranks.size,
            "threads": torch.get_num_threads(),
            "epochs": trainer.progress.epoch,
            "training_seconds": trainer.progress.seconds,
            "wall_seconds": wall_seconds,
        }
    )


def _trained(trainer: Trainer, stack: Stack, start: Start | None) -> TrainedModel | BasisModel:
    data, vae = trainer.data, trainer.vae
    if isinstance(vae, ImageBasisVae):
        if start is None:
            raise ValueError("a decoder in the span of maps comes with them")
        reading = Reading(scale=data.scale, input_scale=data.input_scale)
        return replace(start.model, vae=vae, reading=reading)
    return TrainedModel(
        vae=vae, scale=data.scale, pixel_size_a=stack.pixel_size_a, input_scale=data.input_scale
    )


def low_resolution_points(data: TrainingData) -> Tensor:
    """The half of the radius at which images say most of their content: what `loss` is taken on."""
    return torch.nonzero(data.plane.radius <= data.plane.radius.max() / 2).squeeze(1)


def latent_columns(latents: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Columns z_j, std_j and loss of what `Trainer.evaluate` gives."""
    columns: dict[str, NDArray[Any]] = {}
    for prefix, values in (("z", latents["mean"]), ("std", latents["std"])):
        columns |= {f"{prefix}_{j}": values[:, j].astype(np.float32) for j in range(values.shape[1])}
    return columns | {"loss": latents["loss"].astype(np.float32)}
