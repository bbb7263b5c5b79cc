"""`train --method subspace`: from a stack to a run folder with a linear model."""

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

from cryodrgn_pipeline.io.atomic import replacing, write_json
from cryodrgn_pipeline.io.checkpoints import MODEL_FILE, save_linear_model
from cryodrgn_pipeline.io.manifest import digest, environment
from cryodrgn_pipeline.io.runs import write_columns
from cryodrgn_pipeline.models.linear import LinearModel
from cryodrgn_pipeline.progress import duration
from cryodrgn_pipeline.stack import stack_rows
from cryodrgn_pipeline.subspace.fit import SubspaceSettings, fit_subspace
from cryodrgn_pipeline.subspace.maps import final_model
from cryodrgn_pipeline.subspace.posterior import Posterior
from cryodrgn_pipeline.training.state import MANIFEST, finished, only_writer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubspaceRequest:
    """A stack, the rows of it to use, the recipe, and threads (None: all)."""

    stack: Path
    run: Path
    subset: Path | None
    settings: SubspaceSettings
    threads: int | None = None


def train_subspace(request: SubspaceRequest) -> None:
    """Learn the subspace, then write latents, maps, log and manifest into the run folder.

    A finished run of the same fingerprint is left as it is. Raises `InputFormatError` without poses or with
    unknown ids, `TrainingError` when the folder is in use.
    """
    started = time.monotonic()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    stack, rows = stack_rows(request.stack, request.subset)
    described = {
        "method": "subspace",
        "stack": stack.fingerprint,
        "particles": digest([str(i) for i in stack.particles.particle_id[rows]]),
        "settings": asdict(request.settings) | {"kernel": None},
    }
    fingerprint, run = digest(described), request.run
    with only_writer(run):
        if finished(run, fingerprint):
            log.info("%s: already trained with these images and settings, nothing to do", run)
            return
        (run / MANIFEST).unlink(missing_ok=True)
        fit = fit_subspace(stack, rows, request.settings)
        learnt = time.monotonic()
        model = final_model(stack, rows, fit, request.settings)
        save_linear_model(run / MODEL_FILE, model)
        _write_latents(run, stack.particles.particle_id[rows], fit.posterior, model)
        with replacing(run / "metrics.jsonl") as temporary:
            lines = (
                json.dumps({"epoch": number + 1, "reconstruction": entry["loss"], **entry})
                for number, entry in enumerate(fit.history)
            )
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        content: dict[str, Any] = environment() | {
            "method": "subspace",
            "fingerprint": fingerprint,
            "stack": str(request.stack),
            "stack_fingerprint": stack.fingerprint,
            "subset": None if request.subset is None else str(request.subset),
            "n_particles": len(rows),
            "box_size_px": stack.box_size_px,
            "pixel_size_a": stack.pixel_size_a,
            "components": model.components,
            "held_out_gain": [{"mean": mean, "standard_error": error} for mean, error in fit.gains],
            "contrast_spread": fit.scale_spread,
            "noise_images": int(fit.posterior.is_noise.sum()),
            "settings": asdict(request.settings),
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "epochs": len(fit.history),
            "training_seconds": learnt - started,
            "wall_seconds": time.monotonic() - started,
        }
        write_json(run / MANIFEST, content)
    log.info("learnt in %s: %s", duration(time.monotonic() - started), run)


def _write_latents(run: Path, particle_id: NDArray[Any], where: Posterior, model: LinearModel) -> None:
    """Coordinates with their whole posterior; those of components that were not kept are 0 ± 0."""
    where = where.turned(torch.diag(model.spread.double()))
    n, kept = where.z.shape
    latent_dim = model.latent_dim
    z, std = np.zeros((n, latent_dim), np.float32), np.zeros((n, latent_dim), np.float32)
    z[:, :kept] = where.z.numpy()
    std[:, :kept] = where.covariance.diagonal(dim1=1, dim2=2).sqrt().numpy()
    columns: dict[str, NDArray[Any]] = {"particle_id": particle_id}
    columns |= {f"z_{j}": z[:, j] for j in range(latent_dim)}
    columns |= {f"std_{j}": std[:, j] for j in range(latent_dim)}
    for j in range(kept):
        for k in range(j):
            columns[f"cov_{j}_{k}"] = where.covariance[:, j, k].float().numpy()
    columns |= {
        "loss": where.loss.float().numpy(),
        "contrast": where.scale.float().numpy(),
        "log_evidence": where.evidence.float().numpy(),
        "held_out": np.zeros(n, dtype=bool),
    }
    write_columns(run / "latent.parquet", columns)
