"""The nonlinear model that needs no network: maps of functions of the place in the subspace.

Motions bend the cloud of particles in the subspace, and species part it. A Gaussian kernel, some standard
deviations of a particle's own uncertainty wide, has principal functions that follow it; one solve gives a map
for each. What an image says about these maps is then asked at each of some hundred landmarks, particles
themselves: the weights of the landmarks are its posterior under the distribution that the particles really
have (empirical Bayes, Robbins 1956; Laird 1978), and its mean is nearer the truth than one under N(0, 1). An
image's own place in the subspace is asked as well: where images say much, landmarks are too far apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.models.kernel import KernelFunctions, KernelModel
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.basis import Seen, seen_in
from cryodrgn_pipeline.subspace.em import SubspaceSettings, look
from cryodrgn_pipeline.subspace.fit import Fit
from cryodrgn_pipeline.subspace.journal import journal
from cryodrgn_pipeline.subspace.maps import maps_of, regressed_maps
from cryodrgn_pipeline.subspace.memory import affordable
from cryodrgn_pipeline.subspace.placing import kept_subspace
from cryodrgn_pipeline.subspace.poses import PoseAnswer
from cryodrgn_pipeline.subspace.sums import InnerProducts, pack, pairs

log = logging.getLogger(__name__)

MAPS = 12  # functions that maps are made of
DRAWN = 16  # functions of the final coordinates that stand for their factors
WIDTH = 4.0  # of the kernel, in standard deviations of a particle's own posterior; at least their spread
PRIOR = 3.0  # power of the first function's map, per shell, as a share of the mean map's
LANDMARKS = 600
SAMPLE = 20_000  # particles that functions are made principal over
ROWS_AT_ONCE = 4096
SMALLEST_STD = 1e-3  # of the spread of a coordinate: landmarks cannot say less


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLatents:
    """Of N images: `z` `(N, d)` with `covariance` `(N, d, d)`, `factors` `(N, R)` expected there, `loss` and
    `evidence` `(N,)`; float64.
    """

    z: Tensor
    covariance: Tensor
    factors: Tensor
    loss: Tensor
    evidence: Tensor


def kernel_model(
    stack: Stack,
    rows: NDArray[np.int64],
    fit: Fit,
    latent_dim: int,
    settings: SubspaceSettings,
    *,
    report: Callable[[str], None] = log.info,
) -> tuple[KernelModel, KernelLatents]:
    """Maps at the stack's box and where the images lie; the fit's maps are replaced by those of the level.

    Parameters
    ----------
    fit
        A fit with at least one component. Images that it takes for noise are placed, but nothing is learnt
        from them.
    """
    where, placing = fit.posterior, fit.level.maps
    good = (~where.is_noise).nonzero()[:, 0]
    rng = torch.Generator().manual_seed(settings.seed)
    good = good[torch.randperm(len(good), generator=rng)]
    chosen, sample = good[:LANDMARKS], good[:SAMPLE]
    d, exact = stack.box_size_px, settings.cg_iterations + 1
    variance = where.covariance.diagonal(dim1=1, dim2=2)
    functions = _functions(where.z, variance, chosen, sample, MAPS)
    weights, shares = functions.at(where.z), torch.cat([torch.ones(1).double(), PRIOR * functions.share])
    fit.level.maps = journal().once(
        "maps of functions", lambda: maps_of(fit.level, fit, weights, shares, exact, settings)
    )
    subspace = kept_subspace(stack, rows, fit, placing, fit.level.maps)
    axes = _axes(placing, where.z[sample], latent_dim)

    def places() -> KernelLatents:
        def says(part: slice, products: InnerProducts, _: PoseAnswer | None) -> KernelLatents:
            seen = seen_in(products, where.part(part), fit.level.images.coefficients)
            return placed(seen, where.z[part], functions, axes, own=chosen - part.start)

        return look(fit.level, fit.known.poses, settings, says)

    latents = journal().once("places", places)
    report(
        f"{len(functions)} functions of the place in the subspace: loss {float(latents.loss.mean()):.4f}, "
        f"log evidence {float(latents.evidence.mean()):.2f} an image"
    )
    maps = fit.level.maps.clone()
    if fit.level.lattice.box_size_px != d:
        most, iterations = affordable(d, len(functions), exact)
        log.info("maps at %d px: the mean and %d of %d functions", d, most, len(functions))
        first = slice(1 + most)
        maps = regressed_maps(stack, rows, fit, weights[:, first], shares[first], iterations, settings)
    drawn = _functions(latents.z, latents.covariance.diagonal(dim1=1, dim2=2), chosen, sample, DRAWN)
    known = latents.factors[sample, : len(maps)]
    at = drawn.at(latents.z[sample])
    # lstsq does not repeat its last bits from run to run
    turn = torch.linalg.pinv(at.T @ at, hermitian=True) @ (at.T @ known)
    model = KernelModel(
        maps=maps,
        functions=drawn,
        turn=turn,
        placing=functions,
        axes=axes,
        latent_dim=latent_dim,
        pixel_size_a=stack.pixel_size_a,
        subspace=subspace,
    )
    return model, latents


def _functions(z: Tensor, variance: Tensor, chosen: Tensor, sample: Tensor, most: int) -> KernelFunctions:
    """Functions of places `(N, J)` that are known with these variances, from chosen rows over a sample."""
    width = torch.maximum(WIDTH * variance[sample].mean(0).sqrt(), z[sample].std(0))
    return KernelFunctions.of(z[sample], z[chosen], width, most)


def placed(
    seen: Seen, place: Tensor, functions: KernelFunctions, axes: Tensor, *, own: Tensor | None = None
) -> KernelLatents:
    """Where images lie: the mean over the landmarks and their own place, weighed by what they say there.

    Parameters
    ----------
    seen
        Inner products of N images with the maps of `functions`, at each image's contrast.
    place
        `(N, J)` of the images in the subspace.
    axes
        `(J, d)`, from places to coordinates.
    own
        `(M,)` which image each landmark is, if it is one of these: its own place counts once. None: the
        images are new.
    """
    landmarks, factors = functions.landmarks, functions.at(functions.landmarks)
    double = torch.tensor([1.0 if j == k else 2.0 for j, k in pairs(factors.shape[1])], dtype=torch.float64)
    itself = torch.full((len(place),), -1)
    if own is not None:
        here = (own >= 0) & (own < len(place))
        itself[own[here]] = here.nonzero()[:, 0]

    def packed(values: Tensor) -> Tensor:
        return pack(values[:, :, None] * values[:, None]) * double

    parts = []
    for rows in torch.split(torch.arange(len(place)), ROWS_AT_ONCE):
        inner, gram = seen.inner[rows].double(), pack(seen.gram[rows]).double()
        here, at = functions.at(place[rows]), itself[rows]
        gain = inner @ factors.T - gram @ packed(factors).T / 2
        gain[(at >= 0).nonzero()[:, 0], at[at >= 0]] = -torch.inf
        gain_here = (inner * here).sum(1) - (gram * packed(here)).sum(1) / 2
        weight = torch.softmax(torch.cat([gain, gain_here[:, None]], dim=1), dim=1)
        weight, weight_here = weight[:, :-1], weight[:, -1:]
        z, z_here = landmarks @ axes, place[rows] @ axes
        mean = weight @ z + weight_here * z_here
        squares = weight @ _outer(z).flatten(1) + weight_here * _outer(z_here).flatten(1)
        covariance = squares.reshape(len(rows), z.shape[1], -1) - _outer(mean)
        expected = weight @ factors + weight_here * here
        evidence = (
            torch.logaddexp(gain.logsumexp(1), gain_here) - np.log(len(landmarks)) + seen.known[rows] / 2
        )
        loss = seen.loss(expected.float(), rows).double()
        parts.append((mean, covariance, expected, loss, evidence))
    mean, covariance, expected, loss, evidence = (torch.cat(part) for part in zip(*parts, strict=True))
    covariance = covariance + torch.diag((SMALLEST_STD * (landmarks @ axes).std(0)) ** 2)
    return KernelLatents(z=mean, covariance=covariance, factors=expected, loss=loss, evidence=evidence)


def _outer(values: Tensor) -> Tensor:
    return values[:, :, None] * values[:, None]


def _axes(maps: Tensor, z: Tensor, latent_dim: int) -> Tensor:
    """Turns coordinates in the subspace into those of the latent table: `(J, min(J, latent_dim))`.

    Distances there are distances between volumes: each axis is as long as its component is strong, and what
    the axes beyond `latent_dim` say is given to principal ones.
    """
    powers = maps[1:].flatten(1).norm(dim=1).double()
    turn = torch.diag(powers / powers.max())
    if len(powers) <= latent_dim:
        return turn
    moved = z @ turn
    axes: Tensor = torch.linalg.svd(moved - moved.mean(0), full_matrices=False)[2]
    return turn @ axes[:latent_dim].T
