"""What a training that starts from the default model begins with, and keeps for a resume."""

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

from cryodrgn_pipeline.io.checkpoints import load_model, load_state, save_model, save_state
from cryodrgn_pipeline.io.manifest import environment
from cryodrgn_pipeline.models.basis import BasisModel
from cryodrgn_pipeline.models.vae import VaeConfig
from cryodrgn_pipeline.ranks import Ranks
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.basis import Seen
from cryodrgn_pipeline.subspace.fit import Fit
from cryodrgn_pipeline.subspace.poses import PoseOffsets
from cryodrgn_pipeline.subspace.run import Learnt, SubspaceRequest, about, learn, write_learnt
from cryodrgn_pipeline.training.batch import Placed

log = logging.getLogger(__name__)

MODEL, KNOWN = "start.safetensors", "start.pt"
COLUMNS = ("contrast", "log_evidence")  # of the latent table; and those of poses


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The default model and what is known of its N particles.

    `seen`: what their images say about the maps of `model.subspace`; `poses`, what corrects theirs (None:
    nothing); `is_noise` `(N,)` bool; `columns` of the latent table that further training leaves as they are;
    `about`: what the manifest says of the subspace.
    """

    model: BasisModel
    seen: Seen
    poses: PoseOffsets | None
    is_noise: Tensor
    columns: dict[str, NDArray[Any]]
    about: dict[str, Any]

    @classmethod
    def of(cls, fit: Fit, learnt: Learnt, about: dict[str, Any]) -> Start:
        """What a finished default model gives."""
        if not isinstance(learnt.model, BasisModel) or learnt.seen is None:
            raise ValueError("without components there is nothing to start from")
        kept = {
            name: values
            for name, values in learnt.columns.items()
            if name in COLUMNS or name.startswith("pose_")
        }
        return cls(
            model=learnt.model,
            seen=learnt.seen,
            poses=fit.known.poses,
            is_noise=fit.posterior.is_noise,
            columns=kept,
            about=about,
        )

    @property
    def placed(self) -> Placed:
        """What batches need."""
        contrast = torch.from_numpy(self.columns["contrast"])
        return Placed(features=self.seen.features, contrast=contrast, poses=self.poses)

    def save(self, folder: Path, fingerprint: str) -> None:
        """Write it for `load`; the fingerprint last, so that it stands for a whole."""
        save_model(folder / MODEL, self.model)
        poses = self.poses
        save_state(
            folder / KNOWN,
            {
                "fingerprint": fingerprint,
                "seen": {name: getattr(self.seen, name) for name in Seen.__slots__},
                "poses": None if poses is None else {"offset": poses.offset, "spread": poses.shift_spread},
                "is_noise": self.is_noise,
                "columns": {name: torch.from_numpy(values) for name, values in self.columns.items()},
                "about": self.about,
            },
        )

    @classmethod
    def load(cls, folder: Path, fingerprint: str) -> Start | None:
        """What `save` left of this very training, if it did."""
        if not (folder / KNOWN).is_file():
            return None
        state = load_state(folder / KNOWN)
        if state["fingerprint"] != fingerprint:
            return None
        model, poses = load_model(folder / MODEL), state["poses"]
        if not isinstance(model, BasisModel):
            return None
        log.info("the subspace and the model in it are there from before: %s", folder / MODEL)
        return cls(
            model=model,
            seen=Seen(**state["seen"]),
            poses=poses and PoseOffsets(offset=poses["offset"], shift_spread=poses["spread"]),
            is_noise=state["is_noise"],
            columns={name: values.numpy() for name, values in state["columns"].items()},
            about=state["about"],
        )


def learn_start(
    request: SubspaceRequest,
    stack: Stack,
    rows: NDArray[np.int64],
    model: VaeConfig,
    fingerprint: str,
    folder: Path,
    ranks: Ranks,
) -> Start | None:
    """Learn the default model and keep it in the folder of checkpoints; rank 0 writes.

    Where held-out images support no component there is nothing to start from: the run is written as it then
    is, the mean map with z = 0, and the result is None.
    """
    started = time.monotonic()
    fit, learnt = learn(request, stack, rows)
    described = about(request, stack, fit)
    if isinstance(learnt.model, BasisModel):
        start = Start.of(fit, learnt, described)
        if ranks.leads:
            start.save(folder, fingerprint)
        return start
    if not ranks.leads:
        return None
    log.warning(
        "no component is supported by held-out images: the model is the mean map, z is 0, and there is "
        "nothing for encoder %s and decoder %s to learn",
        model.encoder,
        model.decoder,
    )
    seconds = time.monotonic() - started
    manifest = environment() | {
        "method": "vae",
        "encoder": model.encoder,
        "decoder": model.decoder,
        "fingerprint": fingerprint,
        **described,
        "epochs": 0,
        "training_seconds": seconds,
        "wall_seconds": seconds,
    }
    write_learnt(request.run, stack.particles.particle_id[rows], fit, learnt, manifest)
    return None
