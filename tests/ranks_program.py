"""What tests of several ranks compute: here by one process, and as a program that torchrun starts."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from cryodrgn_pipeline.consensus import consensus
from cryodrgn_pipeline.errors import Interrupted
from cryodrgn_pipeline.io.checkpoints import save_state
from cryodrgn_pipeline.models.basis import BasisConfig, BasisModel, BasisVae
from cryodrgn_pipeline.models.from_subspace import ImageBasisVae, ResidualVae
from cryodrgn_pipeline.models.vae import Vae, VaeConfig
from cryodrgn_pipeline.particle_volumes import ParticleVolumes, particle_volumes
from cryodrgn_pipeline.ranks import ALONE, Ranks, joined
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.basis import Seen
from cryodrgn_pipeline.subspace.journal import Journal
from cryodrgn_pipeline.subspace.run import SubspaceRequest, train_subspace
from cryodrgn_pipeline.training.batch import Placed
from cryodrgn_pipeline.training.data import TrainingData
from cryodrgn_pipeline.training.loop import Network, Trainer
from cryodrgn_pipeline.training.settings import TrainingSettings
from cryodrgn_pipeline.training.state import StopRequest
from cryodrgn_pipeline.volumes import MapOptions

CPU = torch.device("cpu")
KINDS = ("autoencoder", "residual", "image_basis")
DECODERS = ("linear", "kernel", "basis")
BOX, COMPONENTS, LATENT_DIM = 16, 2, 3
# of 81 particles the last batch of an epoch has one: one of two ranks has none
TRAINING, BATCH = 81, 20
SETTINGS = TrainingSettings(
    epochs=2,
    batch_size=BATCH,
    learning_rate=1e-3,
    coordinate_fraction=0.5,
    frequency_marching=1,
    device="cpu",
)


def trainer(kind: str, stack_path: Path, ranks: Ranks = ALONE, state=None, **settings) -> Trainer:
    """A small model of this kind on a small set; where it starts from a subspace, of made-up numbers."""
    stack = Stack.open(stack_path)
    rows = np.arange(len(stack))
    rng = torch.Generator().manual_seed(3)
    model = VaeConfig(
        box_size_px=BOX,
        latent_dim=LATENT_DIM,
        encoder_width=12,
        decoder_width=12,
        encoder_layers=1,
        encoder="subspace" if kind == "residual" else "image",
        decoder="basis" if kind == "image_basis" else "mlp",
    )
    features = torch.rand(len(rows), 2 * COMPONENTS, generator=rng)
    placed = Placed(features=features, contrast=torch.ones(len(rows)), poses=None)
    data = TrainingData(stack, rows, model, in_memory=True, device=CPU, placed=placed)
    slices, image = torch.randn(len(rows), 3, 40, generator=rng), torch.randn(len(rows), 40, generator=rng)
    seen = Seen(
        features=features,
        gram=slices @ slices.transpose(1, 2),
        inner=(slices @ image[..., None])[..., 0],
        power=(image**2).sum(1),
        known=torch.zeros(len(rows)),
        coefficients=40,
    )
    return Trainer(
        _network(kind, model, rng),
        data,
        replace(SETTINGS, **settings),
        train_rows=rows[:TRAINING],
        held_out_rows=rows[TRAINING:],
        device=CPU,
        state=state,
        products=seen if kind == "image_basis" else None,
        ranks=ranks,
    )


def _network(kind: str, model: VaeConfig, rng: torch.Generator) -> Network:
    if kind == "autoencoder":
        return Vae(model)
    basis = BasisVae(BasisConfig(components=COMPONENTS, latent_dim=LATENT_DIM))
    if kind == "image_basis":
        return ImageBasisVae(model, basis)
    maps = torch.randn(COMPONENTS + 1, BOX, BOX, BOX, generator=rng)
    start = BasisModel(vae=basis, maps=maps, turn=torch.eye(COMPONENTS + 1), pixel_size_a=12.0)
    return ResidualVae(model, start, scale=7.0)


def train(kind: str, stack: Path, ranks: Ranks = ALONE, state=None, **settings) -> dict:
    """The state after training, with the gradients of the last update and the latents of all particles."""
    one = trainer(kind, stack, ranks, state, **settings)
    one.run(lambda: None, StopRequest())
    gradients = {name: value.grad for name, value in one.vae.named_parameters() if value.grad is not None}
    latents = {name: torch.from_numpy(values) for name, values in one.evaluate(one.data.rows).items()}
    return one.state() | {"gradients": gradients, "latents": latents}


def primitives(ranks: Ranks) -> dict:
    """What the ranks tell each other of shares of unequal length."""
    mine = torch.arange(7.0)[ranks.share(7)]
    total = mine.sum()
    ranks.sum_(total)
    return {
        "gathered": ranks.gathered(torch.stack([mine, -mine], dim=1)),
        "sum": total,
        "told": ranks.told(torch.tensor([ranks.rank + 5])),
        "largest": torch.tensor(ranks.largest(ranks.rank, -ranks.rank)),
        "share": torch.tensor([ranks.share(7).start, ranks.share(7).stop]),
    }


def subspace(stack: Path, run: Path, decoder: str = "linear", ranks: Ranks = ALONE) -> None:
    """A model of the subspace of a stack."""
    request = SubspaceRequest(
        stack=stack, run=run, subset=None, latent_dim=2, decoder=decoder, seed=0, threads=1
    )
    with patch("cryodrgn_pipeline.subspace.basis.FEWEST_STEPS", 150):
        train_subspace(request, ranks)


def interrupted_subspace(stack: Path, run: Path, ranks: Ranks) -> None:
    """A linear one that only the last rank is told to stop, in the middle, and that then goes on."""
    whole_pass, passes = Journal._pass, []

    def stopped_in_the_ninth(self, *given, **named):
        passes.append(self)
        if len(passes) == 9 and ranks.rank == ranks.size - 1:
            self.stop.signal_number = signal.SIGTERM
        whole_pass(self, *given, **named)

    with patch.object(Journal, "_pass", stopped_in_the_ninth):
        try:
            subspace(stack, run, "linear", ranks)
        except Interrupted:
            assert len(passes) == 9
            assert not ranks.leads or list(run.glob("checkpoints/journal/*.safetensors"))
    assert not (run / "run.json").exists()
    subspace(stack, run, "linear", ranks)


def reconstructed(stack: Path, run: Path, folder: Path, ranks: Ranks = ALONE) -> None:
    """The consensus and two volumes from particles, with half maps of half sets' own subspaces."""
    consensus(stack, folder / "consensus", check="off", ranks=ranks)
    request = ParticleVolumes(
        run=run,
        targets=np.array([[-1.0, 0.0], [1.0, 0.0]], dtype=np.float32),
        ids=None,
        stack=None,
        options=MapOptions(),
        memory_gb=1.0,
        independent_halves=True,
    )
    particle_volumes(request, folder / "volumes", CPU, ranks)


def main(stack: Path, run: Path, larger: Path, folder: Path) -> None:
    with joined(CPU) as ranks:
        for decoder in DECODERS:
            subspace(larger, folder / decoder, decoder, ranks)
        interrupted_subspace(larger, folder / "interrupted", ranks)
        reconstructed(stack, run, folder, ranks)
        found = {"primitives": primitives(ranks)}
        found |= {kind: train(kind, stack, ranks) for kind in KINDS}
        save_state(folder / f"rank{ranks.rank}.pt", found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
