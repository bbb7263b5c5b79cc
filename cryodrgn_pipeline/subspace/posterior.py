"""What an image says about its place in the subspace: closed form, from inner products with the maps."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from cryodrgn_pipeline.subspace.sums import InnerProducts

ROUNDS = 4
NOISE_LIKELIER = -4.0  # log odds below which an image is taken for noise alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """Of N images: `z` `(N, J)` and `covariance` `(N, J, J)`, prior N(0, 1); `scale` and `scale_variance`
    `(N,)`, the contrast; `evidence` `(N,)`, log p(image) over log p(image if it were noise alone); `loss`
    `(N,)`, what the model leaves of the image's power, per coefficient (1 where only noise is left).
    """

    z: Tensor
    covariance: Tensor
    scale: Tensor
    scale_variance: Tensor
    evidence: Tensor
    loss: Tensor

    @classmethod
    def start(cls, z: Tensor) -> Posterior:
        """Images at given coordinates `(N, J)`, taken as certain."""
        n, j = z.shape
        one, zero = torch.ones(n, dtype=z.dtype), torch.zeros(n, dtype=z.dtype)
        covariance = torch.zeros(n, j, j, dtype=z.dtype)
        return cls(z=z, covariance=covariance, scale=one, scale_variance=zero, evidence=zero, loss=one)

    def part(self, images: slice | Tensor) -> Posterior:
        """That of some images."""
        return Posterior(**{one.name: getattr(self, one.name)[images] for one in fields(self)})

    @property
    def is_noise(self) -> Tensor:
        """`(N,)` bool: images that are e⁴ times likelier to show noise than the particle.

        Of particles the model describes, at most 0.3 % fall below at any signal-to-noise ratio.
        """
        return self.evidence < NOISE_LIKELIER

    def rescaled(self) -> Posterior:
        """With contrasts of mean 1 over the images that show the particle: the maps take up the rest."""
        mean = self.scale[~self.is_noise].mean()
        return replace(self, scale=self.scale / mean, scale_variance=self.scale_variance / mean**2)

    def first(self, components: int) -> Posterior:
        """What it says about the first components."""
        covariance = self.covariance[:, :components, :components]
        return replace(self, z=self.z[:, :components], covariance=covariance)

    def turned(self, turn: Tensor) -> Posterior:
        """In the coordinates z' = z @ `turn` `(J, J)`."""
        return replace(self, z=self.z @ turn, covariance=turn.T @ self.covariance @ turn)

    def factors(self, *, points_only: bool = False) -> tuple[Tensor, Tensor]:
        """E[a] `(N, J+1)` and E[a aᵀ] `(N, J+1, J+1)` of the factors a = scale · (1, z)."""
        one = torch.cat([torch.ones_like(self.scale[:, None]), self.z], dim=1)
        second = one[:, :, None] * one[:, None]
        if not points_only:
            second[:, 1:, 1:] += self.covariance
        squared_scale = self.scale**2 + self.scale_variance
        return self.scale[:, None] * one, squared_scale[:, None, None] * second


def posterior(products: InnerProducts, coefficients: int, scale_spread: float) -> Posterior:
    """The variational posterior q(z) q(scale) of each image, with z ~ N(0, 1), scale ~ N(1, spread²).

    Parameters
    ----------
    products
        With the mean map first and then J components.
    coefficients
        How many real numbers each image's power sums up.
    scale_spread
        0 fixes every scale at 1; then the posterior of z is exact.
    """
    gram, inner = products.gram, products.inner
    j = gram.shape[-1] - 1
    identity = torch.eye(j, dtype=gram.dtype)
    scale, squared_scale = torch.ones_like(inner[:, 0]), torch.ones_like(inner[:, 0])
    scale_variance = torch.zeros_like(scale)
    z, covariance, quadratic = inner[:, 1:], gram[:, 1:, 1:], inner[:, 0]
    for _ in range(ROUNDS if scale_spread > 0 else 1):
        precision = squared_scale[:, None, None] * gram[:, 1:, 1:] + identity
        covariance = torch.linalg.inv(precision)
        target = scale[:, None] * inner[:, 1:] - squared_scale[:, None] * gram[:, 1:, 0]
        z = (covariance @ target[..., None])[..., 0]
        one = torch.cat([torch.ones_like(inner[:, :1]), z], dim=1)
        quadratic = (one[:, None] @ gram @ one[..., None])[:, 0, 0]
        quadratic = quadratic + (gram[:, 1:, 1:] * covariance).sum((1, 2))
        if scale_spread > 0:
            scale_variance = 1 / (quadratic + scale_spread**-2)
            scale = ((one * inner).sum(1) + scale_spread**-2) * scale_variance
            squared_scale = scale**2 + scale_variance
    one = torch.cat([torch.ones_like(inner[:, :1]), z], dim=1)
    explained = products.gain + 2 * scale * (one * inner).sum(1) - squared_scale * quadratic
    spent = (z**2).sum(1) + covariance.diagonal(dim1=1, dim2=2).sum(1) - torch.logdet(covariance) - j
    if scale_spread > 0:
        ratio = scale_variance / scale_spread**2
        spent = spent + (scale - 1) ** 2 / scale_spread**2 + ratio - torch.log(ratio) - 1
    return Posterior(
        z=z,
        covariance=covariance,
        scale=scale,
        scale_variance=scale_variance,
        evidence=(explained - spent) / 2,
        loss=(products.power - explained) / coefficients,
    )
