"""Particles of another stack in the latent space of a trained model: no learning, only looking."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.io.atomic import replacing, write_json
from cryodrgn_pipeline.io.checkpoints import MODEL_FILE, Model, load_model
from cryodrgn_pipeline.io.manifest import environment
from cryodrgn_pipeline.io.runs import write_columns
from cryodrgn_pipeline.models.basis import BasisModel
from cryodrgn_pipeline.models.encoder import Reading
from cryodrgn_pipeline.models.from_subspace import ImageBasisVae, ResidualVae
from cryodrgn_pipeline.models.kernel import KernelModel
from cryodrgn_pipeline.models.linear import LinearModel
from cryodrgn_pipeline.models.subspace import Subspace
from cryodrgn_pipeline.stack import Stack, stack_rows
from cryodrgn_pipeline.subspace.basis import encoded
from cryodrgn_pipeline.subspace.kernel import placed
from cryodrgn_pipeline.subspace.placing import Placement, not_shown, place
from cryodrgn_pipeline.subspace.run import coordinates, kernel_columns, linear_columns
from cryodrgn_pipeline.training.batch import Placed
from cryodrgn_pipeline.training.data import TrainingData
from cryodrgn_pipeline.training.grey import grey_gain
from cryodrgn_pipeline.training.loop import Network, Trainer
from cryodrgn_pipeline.training.run import latent_columns, low_resolution_points
from cryodrgn_pipeline.training.settings import TrainingSettings
from cryodrgn_pipeline.training.state import MANIFEST, only_writer

log = logging.getLogger(__name__)

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeRequest:
    """A run folder, a stack of the same particle, which rows of it (a file of ids, or all), a folder."""

    run: Path
    stack: Path
    subset: Path | None
    output: Path


def encode(request: EncodeRequest, device: torch.device) -> None:
    """Write latent.parquet with the columns of `train`, the model, and run.json, which says of what it is.

    Raises
    ------
    InputFormatError
        If the stack does not fit the model, or the model keeps nothing that places new images.
    ConfigError
        If the output is the run itself.
    """
    if request.output.resolve() == request.run.resolve():
        raise ConfigError(f"-o {request.output}: that is the run itself; choose another folder")
    model = load_model(request.run, device)
    stack, rows = stack_rows(request.stack, request.subset)
    stack = _in_pixels_of(model, stack)
    grey, columns = _placed(model, stack, rows, device, request.run)
    log.info("%d particles; grey scale %.4g of that of the training", len(rows), grey)
    particle_id = stack.particles.particle_id[rows]
    # none of them was learnt from
    columns = {"particle_id": particle_id} | columns | {"held_out": np.ones(len(rows), dtype=bool)}
    with only_writer(request.output):
        (request.output / MANIFEST).unlink(missing_ok=True)
        write_columns(request.output / "latent.parquet", columns)
        source = request.run / MODEL_FILE if request.run.is_dir() else request.run
        with replacing(request.output / MODEL_FILE) as temporary:
            shutil.copyfile(source, temporary)
        described = {
            "method": "encode",
            "model": str(source),
            "stack": str(request.stack),
            "stack_fingerprint": stack.fingerprint,
            "subset": None if request.subset is None else str(request.subset),
            "n_particles": len(rows),
            "box_size_px": stack.box_size_px,
            "pixel_size_a": stack.pixel_size_a,
            "grey_scale": grey,
            "device": str(device),
        }
        write_json(request.output / MANIFEST, environment() | described)


def _in_pixels_of(model: Model, stack: Stack) -> Stack:
    """The stack with the model's pixel size as that of its volumes; images keep theirs."""
    if stack.box_size_px != model.box_size_px:
        raise InputFormatError(
            f"{stack.path}: images of {stack.box_size_px} px, the model was trained on {model.box_size_px} "
            f"px; make the stack with `cryodrgn-pipeline preprocess --box-size {model.box_size_px}`"
        )
    return replace(stack, info=stack.info | {"pixel_size_a": model.pixel_size_a})


def _placed(
    model: Model, stack: Stack, rows: NDArray[np.int64], device: torch.device, run: Path
) -> tuple[float, Columns]:
    """The grey scale of the images and the columns of their latent table."""
    if isinstance(model, LinearModel):
        where = place(stack, rows, _subspace(model, run))
        return where.grey, linear_columns(where.posterior, model) | _offsets(where, stack)
    if isinstance(model, KernelModel):
        where = place(stack, rows, _subspace(model, run))
        if where.seen is None:
            raise _older(run)
        latents = placed(where.seen, where.posterior.z, model.placing, model.axes)
        return where.grey, kernel_columns(latents, where.posterior.scale, model) | _offsets(where, stack)
    if isinstance(model, BasisModel):
        reading = model.reading
        vae: Network | None = model.vae if isinstance(model.vae, ImageBasisVae) else None
        return _from_start(model, vae, reading, stack, rows, device, run)
    if isinstance(model.vae, ResidualVae):
        reading = Reading(scale=model.scale)
        return _from_start(model.vae.start, model.vae, reading, stack, rows, device, run)
    if model.grey is None:
        raise _older(run)
    grey = grey_gain(model, stack, rows, torch.tensor(model.grey.z)) / model.grey.gain
    if grey <= 0:
        raise not_shown(stack, grey)
    reading = Reading(scale=model.scale * grey, input_scale=model.input_scale)
    return grey, _evaluated(model.vae, reading, stack, rows, device, None)


def _from_start(
    start: BasisModel,
    vae: Network | None,
    reading: Reading | None,
    stack: Stack,
    rows: NDArray[np.int64],
    device: torch.device,
    run: Path,
) -> tuple[float, Columns]:
    """... of a model in the span of the subspace's maps, or of a network that starts from it."""
    where = place(stack, rows, _subspace(start, run))
    basis = start.vae.basis if isinstance(start.vae, ImageBasisVae) else start.vae
    if where.seen is None:
        raise _older(run)
    latents = encoded(basis, where.seen.to(device))
    known = {
        "contrast": where.posterior.scale.float().numpy(),
        "log_evidence": latents.evidence.cpu().numpy(),
    } | _offsets(where, stack)
    if vae is None or reading is None:
        columns = coordinates(latents.z.cpu(), latents.std.cpu(), start.latent_dim)
        return where.grey, columns | {"loss": latents.loss.cpu().numpy()} | known
    reading = replace(reading, scale=reading.scale * where.grey)
    return where.grey, _evaluated(vae, reading, stack, rows, device, where) | known


def _offsets(where: Placement, stack: Stack) -> Columns:
    if where.poses is None:
        return {}
    return dict(where.poses.columns(stack.box_size_px * stack.pixel_size_a))


def _evaluated(
    vae: Network,
    reading: Reading,
    stack: Stack,
    rows: NDArray[np.int64],
    device: torch.device,
    where: Placement | None,
) -> Columns:
    """What the encoder of a trained network says of images, and what its decoder leaves of them."""
    placed = None
    if where is not None and where.seen is not None:
        contrast = where.posterior.scale
        placed = Placed(features=where.seen.features, contrast=contrast, poses=where.poses)
    data = TrainingData(
        stack,
        rows,
        vae.config,
        in_memory=False,
        device=device,
        scale=reading.scale,
        input_scale=reading.input_scale,
        placed=placed,
    )
    trainer = Trainer(
        vae,
        data,
        TrainingSettings(),
        train_rows=rows,
        held_out_rows=rows[:0],
        device=device,
        products=where.seen if where is not None and isinstance(vae, ImageBasisVae) else None,
    )
    return latent_columns(trainer.evaluate(rows, low_resolution_points(data)))


def _subspace(model: LinearModel | BasisModel | KernelModel, run: Path) -> Subspace:
    if model.subspace is None:
        raise _older(run)
    return model.subspace


def _older(run: Path) -> InputFormatError:
    return InputFormatError(
        f"{run}: the model was written by an earlier version, which kept nothing that places new images; "
        "train again"
    )
