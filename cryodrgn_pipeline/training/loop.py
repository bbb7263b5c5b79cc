"""The training loop: read top to bottom, it is the whole method.

Each batch: what the encoder reads → z; slices of the decoder at the known poses, times the CTF; mean squared
error against the images, plus β/n_pixels times the KL divergence (Zhong et al. 2021). A decoder in the span
of maps needs no slices: images enter by their inner products with the maps.

Several ranks share each batch: gradients are summed by DistributedDataParallel, so that the model is the one
that a single process learns from the same batches, up to the order of the sums.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cryodrgn_pipeline.errors import Interrupted, TrainingError
from cryodrgn_pipeline.models.from_subspace import ImageBasisVae, ResidualVae
from cryodrgn_pipeline.models.vae import Vae
from cryodrgn_pipeline.progress import checkpointed, measured, progress
from cryodrgn_pipeline.ranks import ALONE, Ranks
from cryodrgn_pipeline.subspace.basis import Seen
from cryodrgn_pipeline.training.batch import Batch
from cryodrgn_pipeline.training.data import TrainingData
from cryodrgn_pipeline.training.losses import kl_divergence, reconstruction
from cryodrgn_pipeline.training.settings import TrainingSettings
from cryodrgn_pipeline.training.state import StopRequest

log = logging.getLogger(__name__)

# Points of the decoder that are in flight together: activations stay in the cache of a CPU core, and
# within a GPU's memory at any batch and box.
POINTS_IN_FLIGHT = {"cpu": 6_500, "cuda": 1_000_000}
LOSSES_IN_FLIGHT = {"cpu": 1, "cuda": 64}  # reading a loss from a GPU waits for it
FIRST_DISC = 0.25  # of the full radius, where frequency marching starts
SAVED = "a checkpoint; go on with the same command and --resume"
EVIDENCE_BETA = 2.0  # the loss is then −2/n times the evidence lower bound, where noise has unit power
# what tells that buffers, which are the same in all ranks, need not be sent with every batch
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"  # torch before 2.13
)

Network = Vae | ResidualVae | ImageBasisVae


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a training stands; what it holds besides tensors goes into the checkpoint as it is."""

    epoch: int = 0  # epochs completed
    batch: int = 0  # batches completed in the epoch under way
    step: int = 0
    seconds: float = 0.0  # of training and evaluation, over all sessions
    epoch_seconds: float = 0.0  # of training in the epoch under way
    sums: dict[str, float] = field(default_factory=lambda: {"reconstruction": 0.0, "kld": 0.0, "images": 0.0})
    metrics: list[dict[str, Any]] = field(default_factory=list)


class _Parts(nn.Module):
    """Encoder and decoder behind the one `forward` that DistributedDataParallel watches."""

    def __init__(self, vae: Network) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, part: str, *inputs: Tensor) -> Any:
        return getattr(self.vae, part)(*inputs)


class Trainer:
    """One model, its optimiser, its data; `run` trains until the asked number of epochs is done.

    Parameters
    ----------
    vae, data, settings
        Model, batches and recipe; the model is moved to `device`.
    train_rows, held_out_rows
        Stack rows that are learnt from, and those that only measure.
    device
        Where to compute.
    state
        A state from an earlier `state()` to go on from.
    products
        The images' inner products with the maps of an `ImageBasisVae`.
    ranks
        Processes that train the model together, each with a share of every batch.
    """

    def __init__(
        self,
        vae: Network,
        data: TrainingData,
        settings: TrainingSettings,
        *,
        train_rows: NDArray[np.int64],
        held_out_rows: NDArray[np.int64],
        device: torch.device,
        state: dict[str, Any] | None = None,
        products: Seen | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.vae, self.data, self.settings, self.device = vae.to(device), data, settings, device
        self.train_rows, self.held_out_rows, self.ranks = train_rows, held_out_rows, ranks
        self.products = None if products is None else products.to(device)
        usual = 1 / vae.config.latent_dim if isinstance(vae, Vae) else EVIDENCE_BETA
        self.beta = usual if settings.beta is None else settings.beta
        self._radius = data.plane.radius.cpu()
        self.optimizer = torch.optim.Adam(vae.parameters(), lr=settings.step_size)
        amp = settings.amp if settings.amp is not None else device.type == "cuda"
        half = device.type == "cuda" and not torch.cuda.is_bf16_supported()
        self.autocast: dict[str, Any] = {
            "device_type": device.type,
            "dtype": torch.float16 if half else torch.bfloat16,
            "enabled": amp,
        }
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp and half)
        self.progress = Progress()
        if state is not None:
            self.vae.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
        self.network: nn.Module = _Parts(vae)
        if ranks.size > 1:
            words: dict[str, Any] = {SYNC_BUFFERS: False}
            self.network = DistributedDataParallel(self.network, **words)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on as if nothing had happened."""
        standing = self.progress
        return {
            "model": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "scale": self.data.scale,
            "input_scale": self.data.input_scale,
            "epoch": standing.epoch,
            "progress": {name: getattr(standing, name) for name in Progress.__slots__},
        }

    def run(self, save: Callable[[], None], stop: StopRequest) -> None:
        """Train to the last epoch, calling `save` as often as the settings say.

        Raises `Interrupted` after saving when `stop` is set, `TrainingError` when the loss is not a number.
        """
        settings, standing = self.settings, self.progress
        batches_per_epoch = -(-len(self.train_rows) // settings.batch_size)
        done = standing.epoch * len(self.train_rows) + standing.batch * settings.batch_size
        last_save = time.monotonic()
        with progress("training", settings.epochs * len(self.train_rows), done=done) as advance:
            measured(standing.metrics, settings.epochs)
            while standing.epoch < settings.epochs:
                tick = time.monotonic()
                pending: list[tuple[Batch, Tensor, Tensor]] = []
                order = self.data.epoch_order(self.train_rows, settings.seed, standing.epoch)
                self.vae.train()
                first = standing.batch
                for batch in self.data.batches(order, settings.batch_size, first=first, ranks=self.ranks):
                    pending.append((batch, *self._step(batch)))
                    standing.batch += 1
                    standing.step += 1
                    minutes = (time.monotonic() - last_save) / 60
                    ended_by, save_due = self._agreed(stop, minutes > settings.checkpoint_every_minutes)
                    if save_due or len(pending) >= LOSSES_IN_FLIGHT[self.device.type]:
                        self._account(pending)
                    tick = self._clock(tick)
                    advance(len(batch.whole), note=f"epoch {standing.epoch + 1} of {settings.epochs}")
                    if save_due and standing.batch < batches_per_epoch:
                        save()
                        checkpointed()
                        last_save = time.monotonic()
                        if ended_by:
                            raise Interrupted(ended_by, saved=SAVED)
                self._account(pending)
                self._end_epoch()
                measured(standing.metrics, settings.epochs)
                last = standing.epoch == settings.epochs
                ended_by, save_due = self._agreed(stop, save_due or last)
                if save_due or standing.epoch % settings.checkpoint_every_epochs == 0:
                    save()
                    checkpointed()
                    last_save = time.monotonic()
                if ended_by and not last:
                    raise Interrupted(ended_by, saved=SAVED)

    def _agreed(self, stop: StopRequest, save_due: bool) -> tuple[int, bool]:
        """The number of the signal that any rank got (0: none), and whether all save now."""
        signal_number, due = self.ranks.largest(stop.signal_number or 0, save_due)
        return int(signal_number), bool(signal_number or due)

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One update; returns reconstruction loss and KL divergence per image of this rank, `(B,)` each."""
        draws = torch.Generator().manual_seed(_mix(self.settings.seed, self.progress.step))
        n_points = self.points_in_disc()
        chosen = max(1, round(self.settings.coordinate_fraction * n_points))
        points: Tensor | slice = slice(n_points)  # points are ordered by rising |k|
        if chosen < n_points:
            points = torch.randperm(n_points, generator=draws)[:chosen].to(self.device)
        with torch.autocast(**self.autocast), self._summing(last=False):
            mean, log_variance = self.network("encode", batch.seen)
        mean, log_variance = mean.float(), log_variance.float()
        noise = torch.randn(len(batch.whole), mean.shape[1], generator=draws)
        noise = noise[self.ranks.share(len(noise))].to(self.device)
        z = mean + noise * torch.exp(0.5 * log_variance)
        self.optimizer.zero_grad(set_to_none=True)
        # the decoder's part of the graph is cut here and freed by pieces
        z_leaf = z.detach().requires_grad_()
        errors, pieces = [], self._pieces(len(batch.rows), chosen)
        for piece in pieces:
            with self._summing(last=piece is pieces[-1]):
                errors.append(self._backward_piece(batch, piece, points, z_leaf))
        divergence = kl_divergence(mean, log_variance)
        penalty = self.beta / self._n_pixels(n_points) * self._share_of_mean(divergence, batch)
        torch.autograd.backward([z, self.scaler.scale(penalty)], [z_leaf.grad, None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.cat(errors), divergence.detach()

    def _backward_piece(self, batch: Batch, piece: slice, points: Tensor | slice, z: Tensor) -> Tensor:
        error = self._error(batch, piece, points, z[piece])
        torch.autograd.backward(self.scaler.scale(self._share_of_mean(error, batch)))
        return error.detach()

    def _share_of_mean(self, values: Tensor, batch: Batch) -> Tensor:
        """What gives the mean over the batch once it is averaged over ranks, as their gradients are."""
        return values.sum() * self.ranks.size / len(batch.whole)

    def _summing(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around each call of the network in an update: only with the last do gradients go to all ranks."""
        if last or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()

    def _error(self, batch: Batch, piece: slice, points: Tensor | slice, z: Tensor) -> Tensor:
        """Mean squared error `(b,)` of some images at latents `(b, z)`."""
        if isinstance(self.vae, ImageBasisVae):
            if self.products is None:
                raise ValueError("a decoder in the span of maps needs the images' inner products with them")
            return self.products.loss(self.network("factors", z), batch.position[piece])
        coordinates = batch.coordinates(self.data.plane, points, piece)
        with torch.autocast(**self.autocast):
            predicted = self.network("decode_slices", coordinates, z, batch.transfer(points, piece))
        return reconstruction(predicted, batch.coefficients[piece, points], batch.weights(points, piece))

    def points_in_disc(self) -> int:
        """How many points of the half plane the next update may use: all, once marching is over."""
        batches = -(-len(self.train_rows) // self.settings.batch_size)
        steps = self.settings.frequency_marching * batches
        if self.progress.step >= steps:
            return len(self._radius)
        share = FIRST_DISC + (1 - FIRST_DISC) * self.progress.step / steps
        return max(1, int((self._radius <= share * self._radius[-1]).sum()))

    def _n_pixels(self, n_points: int) -> int:
        """How many real numbers of an image a loss over these points takes the mean of."""
        return 2 * n_points if self.products is None else self.products.coefficients

    def _pieces(self, n_images: int, n_points: int) -> list[slice]:
        images = max(1, POINTS_IN_FLIGHT[self.device.type] // n_points)
        # a rank without an image in a batch takes part with an empty piece
        return [slice(i, i + images) for i in range(0, max(n_images, 1), images)]

    def _account(self, pending: list[tuple[Batch, Tensor, Tensor]]) -> None:
        if not pending:
            return
        sums = self.progress.sums
        found = torch.stack([torch.stack([error.sum(), kld.sum()]) for _, error, kld in pending]).double()
        self.ranks.sum_(found)
        for (batch, _, _), (error, kld) in zip(pending, found.tolist(), strict=True):
            values = {"reconstruction": error, "kld": kld}
            if not np.isfinite(sum(values.values())):
                ids = self.data.stack.particles.particle_id[batch.whole]
                raise TrainingError(
                    f"the loss is not a number in epoch {self.progress.epoch + 1} (reconstruction "
                    f"{values['reconstruction']}, KL divergence {values['kld']}). The batch's particles: "
                    f"{', '.join(str(i) for i in ids)}. Look at these images; if they are sound, lower "
                    "--learning-rate or use --no-amp. The last checkpoint is untouched."
                )
            for name, value in values.items():
                sums[name] += value
            sums["images"] += len(batch.whole)
        pending.clear()

    def _end_epoch(self) -> None:
        standing = self.progress
        images = standing.sums["images"]
        error, divergence = standing.sums["reconstruction"] / images, standing.sums["kld"] / images
        standing.epoch += 1
        n_points = self.points_in_disc()
        row = {
            "kind": "epoch",
            "epoch": standing.epoch,
            "step": standing.step,
            "loss": error + self.beta * divergence / self._n_pixels(n_points),
            "reconstruction": error,
            "kld": divergence,
            "beta": self.beta,
            "learning_rate": self.settings.step_size,
            "images_per_s": images / standing.epoch_seconds,
        }
        if self.settings.frequency_marching:
            row["frequencies"] = n_points
        if len(self.held_out_rows):
            started = time.monotonic()
            held_out = self.evaluate(self.held_out_rows)
            row["held_out_reconstruction"] = float(held_out["loss"].mean())
            row["held_out_kld"] = float(held_out["kld"].mean())
            standing.seconds += time.monotonic() - started
        row["seconds"] = standing.seconds
        standing.metrics.append(row)
        standing.batch, standing.epoch_seconds, standing.sums = 0, 0.0, Progress().sums
        held = f", held-out {row['held_out_reconstruction']:.5f}" if len(self.held_out_rows) else ""
        log.info(
            "epoch %d of %d: reconstruction %.5f%s, KL %.3f, %.0f images/s",
            standing.epoch,
            self.settings.epochs,
            error,
            held,
            divergence,
            row["images_per_s"],
        )

    def _clock(self, since: float) -> float:
        now = time.monotonic()
        self.progress.seconds += now - since
        self.progress.epoch_seconds += now - since
        return now

    @torch.no_grad()
    def evaluate(
        self, rows: NDArray[np.int64], points: Tensor | slice = slice(None)
    ) -> dict[str, NDArray[Any]]:
        """Per image: latent `mean` and `std` `(N, z)`; `loss` at the mean over `points` and `kld`, `(N,)`.

        Ranks share the images; all of them get all results.
        """
        self.vae.eval()
        rows = rows[self.ranks.share(len(rows))]
        n_points = len(self.data.plane.at(points))
        parts: dict[str, list[Tensor]] = {"mean": [], "std": [], "loss": [], "kld": []}
        for batch in self.data.batches(rows, max(self.settings.batch_size, 64)):
            with torch.autocast(**self.autocast):
                mean, log_variance = self.vae.encode(batch.seen)
            mean, log_variance = mean.float(), log_variance.float()
            for piece in self._pieces(len(batch.rows), n_points):
                parts["loss"].append(self._error(batch, piece, points, mean[piece]))
            parts["mean"].append(mean)
            parts["std"].append(torch.exp(0.5 * log_variance))
            parts["kld"].append(kl_divergence(mean, log_variance))
        one_latent = torch.zeros(0, self.vae.config.latent_dim, device=self.device)
        empty = {"mean": one_latent, "std": one_latent, "loss": one_latent[:, 0], "kld": one_latent[:, 0]}
        return {
            name: self.ranks.gathered(torch.cat([empty[name], *values])).cpu().numpy()
            for name, values in parts.items()
        }


def _mix(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
