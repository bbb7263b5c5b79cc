"""Train the nonlinear model in the span of the subspace's maps, on the images' inner products with them.

Given the maps, an image of N pixels says −½ aᵀ G a + aᵀ h about its factors a: a (J+1)² matrix and a vector.
Rounds alternate: the network learns on these for some thousand steps (minibatch ELBO, Kingma & Welling 2014),
then the maps are solved for anew with the factors that it gives, and the inner products are taken again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cryodrgn_pipeline.models.basis import BasisConfig, BasisVae, posterior_features
from cryodrgn_pipeline.progress import measured
from cryodrgn_pipeline.subspace.codec import mapped
from cryodrgn_pipeline.subspace.em import (
    LevelState,
    SubspaceSettings,
    accumulate,
    component_shares,
    look,
)
from cryodrgn_pipeline.subspace.fit import Fit, metric_rows
from cryodrgn_pipeline.subspace.journal import Rows, journal
from cryodrgn_pipeline.subspace.poses import PoseOffsets
from cryodrgn_pipeline.subspace.posterior import Posterior
from cryodrgn_pipeline.subspace.solve import solve
from cryodrgn_pipeline.subspace.sums import InnerProducts, pack

log = logging.getLogger(__name__)

ROUNDS = 2
FEWEST_STEPS, MOST_STEPS = 1500, 20_000
PASSES = 60  # over the particles in a round, within these limits
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
SAMPLES = 8  # of z, for the moments of the factors
ROWS_AT_ONCE = 65_536  # images that pass through the networks together


@dataclass(slots=True)
class Seen:
    """What N images say, per image: encoder features `(N, 2J)`, `gram` `(N, J+1, J+1)` and `inner` `(N, J+1)`
    at the image's contrast, `power` `(N,)` of so many `coefficients`, and `known` `(N,)`, twice the log
    likelihood that its pose offset gains; float32.
    """

    features: Tensor
    gram: Tensor
    inner: Tensor
    power: Tensor
    known: Tensor
    coefficients: int

    def to(self, device: torch.device | str) -> Seen:
        """The same on a device."""
        tensors = {name: getattr(self, name).to(device) for name in self.__slots__ if name != "coefficients"}
        return Seen(**tensors, coefficients=self.coefficients)

    def gain(self, factors: Tensor, rows: Tensor | slice) -> Tensor:
        """log p(image | factors) over log p(image if it were noise alone), `(B,)`."""
        quadratic = (factors[:, None] @ self.gram[rows] @ factors[..., None])[:, 0, 0]
        return (factors * self.inner[rows]).sum(1) + (self.known[rows] - quadratic) / 2

    def loss(self, factors: Tensor, rows: Tensor | slice) -> Tensor:
        """What is left of the images' power, per coefficient: 1 where only noise is left, `(B,)`."""
        return (self.power[rows] - 2 * self.gain(factors, rows)) / self.coefficients


@dataclass(frozen=True, slots=True, kw_only=True)
class BasisLatents:
    """Of N images: `z` and `std` `(N, d)`, `factors` `(N, J+1)` at z, `loss` and `evidence` `(N,)`."""

    z: Tensor
    std: Tensor
    factors: Tensor
    loss: Tensor
    evidence: Tensor


def train_basis(
    fit: Fit,
    held_out: Tensor,
    config: BasisConfig,
    settings: SubspaceSettings,
    *,
    report: Callable[[str], None] = log.info,
) -> tuple[BasisVae, BasisLatents, Seen]:
    """Train on the particles that are neither held out nor noise; the fit's maps and log go on.

    Parameters
    ----------
    fit
        A fit whose subspace has `config.components` dimensions; its maps are replaced by the new ones.
    held_out
        `(N,)` bool: images that only measure.

    Returns
    -------
    The network, where the images lie, and what they say about the last maps.
    """
    vae = BasisVae(config)
    generator = torch.Generator().manual_seed(config.seed)
    learnt = ~fit.posterior.is_noise & ~held_out
    rows = learnt.nonzero()[:, 0]
    steps = min(max(FEWEST_STEPS, PASSES * len(rows) // BATCH_SIZE), MOST_STEPS)
    optimiser = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)

    def round_of(number: int, state: dict[str, Any]) -> dict[str, Any]:
        vae.load_state_dict(state["vae"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        fit.level.maps, fit.history = state["maps"], state["history"]
        seen = journal().once("seen", seen_now)
        with _one_thread():
            for step in range(steps):
                for group in optimiser.param_groups:
                    group["lr"] = LEARNING_RATE * (1 - step / steps)
                chosen = rows[torch.randint(len(rows), (BATCH_SIZE,), generator=generator)]
                loss = -_elbo(vae, seen, chosen, generator).mean()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        latents = encoded(vae, seen)
        fit.history.append(_summary(fit, latents, held_out, number))
        measured(metric_rows(fit.history), fit.iterations + ROUNDS)
        report(
            f"network, round {number + 1} of {ROUNDS}: loss {fit.history[-1]['loss']:.4f}, KL divergence "
            f"{fit.history[-1]['kld']:.2f}, log evidence {fit.history[-1]['evidence']:.2f} an image"
        )
        _solve_maps(fit, vae, latents, learnt, settings, generator)
        return standing()

    def seen_now() -> Seen:
        return seen_of(fit.level, fit.known.poses, fit.posterior, settings)

    def standing() -> dict[str, Any]:
        networks = {"vae": vae.state_dict(), "optimiser": optimiser.state_dict()}
        state: dict[str, Any] = mapped(networks, Tensor.clone)  # what goes on learning changes in place
        return state | {"generator": generator.get_state(), "maps": fit.level.maps, "history": fit.history}

    state = journal().loop("network", standing(), [partial(round_of, number) for number in range(ROUNDS)])
    vae.load_state_dict(state["vae"])
    fit.level.maps, fit.history = state["maps"], state["history"]
    seen = journal().once("seen", seen_now)
    return vae, encoded(vae, seen), seen


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps of microseconds: threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seen_of(
    level: LevelState, poses: PoseOffsets | None, where: Posterior, settings: SubspaceSettings
) -> Seen:
    """What images that lie there say about the maps of a level: one pass."""
    coefficients = level.images.coefficients
    return look(
        level,
        poses,
        settings,
        lambda part, products, answer: seen_in(products, where.part(part), coefficients),
    )


def seen_in(products: InnerProducts, where: Posterior, coefficients: int) -> Seen:
    """The same of images with these inner products, of so many coefficients."""
    squared = where.scale**2 + where.scale_variance
    return Seen(
        features=posterior_features(where.z, where.covariance),
        gram=(products.gram * squared[:, None, None]).float(),
        inner=(products.inner * where.scale[:, None]).float(),
        power=products.power.float(),
        known=products.gain.float(),
        coefficients=coefficients,
    )


def _elbo(vae: BasisVae, seen: Seen, rows: Tensor, generator: torch.Generator) -> Tensor:
    mean, log_variance = vae.encode(seen.features[rows])
    z = mean + torch.randn(mean.shape, generator=generator) * (log_variance / 2).exp()
    return seen.gain(vae.factors(z), rows) - divergence(mean, log_variance)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log variance)) from N(0, 1), summed over the coordinates: `(B,)`."""
    return (mean**2 + log_variance.exp() - log_variance - 1).sum(1) / 2


@torch.no_grad()
def encoded(vae: BasisVae, seen: Seen) -> BasisLatents:
    """Where all images lie, and what is left of them there."""
    rows = Rows(len(seen.power))
    for part in _parts(rows.count):
        rows.add(_encoded(vae, seen, part))
    latents: BasisLatents = rows.of(slice(0, rows.count))
    return latents


def _parts(count: int) -> Iterator[slice]:
    """So many images in parts whose networks' activations take little memory."""
    return (slice(at, min(at + ROWS_AT_ONCE, count)) for at in range(0, count, ROWS_AT_ONCE))


def _encoded(vae: BasisVae, seen: Seen, part: slice) -> BasisLatents:
    mean, log_variance = vae.encode(seen.features[part])
    factors = vae.factors(mean)
    gain = seen.gain(factors, part)
    return BasisLatents(
        z=mean,
        std=(log_variance / 2).exp(),
        factors=factors,
        loss=(seen.power[part] - 2 * gain) / seen.coefficients,
        evidence=gain - divergence(mean, log_variance),
    )


@torch.no_grad()
def _solve_maps(
    fit: Fit,
    vae: BasisVae,
    latents: BasisLatents,
    learnt: Tensor,
    settings: SubspaceSettings,
    generator: torch.Generator,
) -> None:
    """M-step: the maps that explain the images best with the factors that the network gives."""
    where, state, images = fit.posterior, fit.level, fit.level.images
    maps = latents.factors.shape[1]
    second = torch.zeros(len(latents.z), maps * (maps + 1) // 2)
    for _ in range(SAMPLES):
        drawn = torch.randn(latents.z.shape, generator=generator)
        for part in _parts(len(drawn)):
            sampled = vae.factors(latents.z[part] + drawn[part] * latents.std[part])
            second[part] += pack(sampled[:, :, None] * sampled[:, None]) / SAMPLES
    expected = latents.factors
    if fit.taught is not None:
        images, where, learnt = images.of(fit.taught.numpy()), where.part(fit.taught), learnt[fit.taught]
        expected, second = expected[fit.taught], second[fit.taught]

    def factors(part: slice) -> tuple[Tensor, Tensor]:
        here, used = where.part(part), learnt[part]
        squared = (here.scale**2 + here.scale_variance) * used
        return expected[part] * (here.scale * used)[:, None], second[part] * squared[:, None]

    def solved() -> Tensor:
        back, normal = accumulate(images, state.lattice, maps, factors, settings)
        prior = component_shares(len(state.maps) - 1, settings)[:, None] * state.mean_power
        return solve(
            state.lattice,
            back,
            normal,
            prior,
            start=state.maps,
            iterations=settings.cg_iterations,
            kernel=settings.kernel,
        )

    state.maps = journal().once("maps", solved)


def _summary(fit: Fit, latents: BasisLatents, held_out: Tensor, number: int) -> dict[str, float]:
    entry = {
        "level_px": float(fit.level.lattice.box_size_px),
        "iteration": float(number),
        "loss": float(latents.loss[~held_out].mean()),
        "evidence": float(latents.evidence.mean()),
        "kld": float(divergence(latents.z, 2 * latents.std.log()).mean()),
        "scale_spread": fit.known.scale_spread,
        "noise_images": float(fit.posterior.is_noise.sum()),
    }
    if bool(held_out.any()):
        entry["held_out_reconstruction"] = float(latents.loss[held_out].mean())
    return entry
