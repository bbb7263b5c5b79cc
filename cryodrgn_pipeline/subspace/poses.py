"""What the images say about their own poses: small rotations and shifts that the mean map asks for.

An image with a wrong pose looks like one of a map that moved as a whole, and components would learn just
that. To first order the move is linear in six maps, the mean's derivatives; with a Gaussian prior on how far
poses are off, it is integrated out of what an image says about the components, and its mean corrects the
pose for the next pass (a Gauss-Newton step, Nocedal & Wright 2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from cryodrgn_pipeline.fourier_images import FourierImages
from cryodrgn_pipeline.subspace.sums import InnerProducts

TURN_SPREAD_DEG = 1.0  # not learnt: motions inside the particle would pass for rotations and widen it
FIRST_SHIFT_SPREAD = 0.02  # of the box
AXES = 3
TURNS = ("pose_turn_x_deg", "pose_turn_y_deg", "pose_turn_z_deg")
SHIFTS = ("pose_shift_x_a", "pose_shift_y_a", "pose_shift_z_a")


def moves(mean: Tensor) -> Tensor:
    """Change of a map `(D, D, D)` [z, y, x] that turns by a radian about x, y, z or goes a box along them.

    Returns
    -------
    `(6, D, D, D)`, first the three rotations, then the three shifts.
    """
    d = mean.shape[-1]
    frequency = torch.fft.fftfreq(d, 1 / d)
    frequency[d // 2] = 0  # Nyquist has no sign
    half = frequency[: d // 2 + 1].clone()
    spectrum = torch.fft.rfftn(mean)
    x = torch.arange(d) - d // 2
    k = (half[None, None, :], frequency[None, :, None], frequency[:, None, None])
    gradient = [torch.fft.irfftn(2j * math.pi * axis * spectrum, s=(d,) * 3) for axis in k]  # per box
    place = [axis / d for axis in (x[None, None, :], x[None, :, None], x[:, None, None])]
    turned = []
    for axis in range(AXES):
        a, b = (axis + 1) % AXES, (axis + 2) % AXES
        turned.append(place[b] * gradient[a] - place[a] * gradient[b])
    return torch.stack(turned + [-one for one in gradient])


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseOffsets:
    """How far N particles lie off their poses: `offset` `(N, 6)`, a rotation vector in radians and a shift in
    boxes, both in the frame of the map; `shift_spread`, in boxes, the prior standard deviation of shifts on
    each axis.
    """

    offset: Tensor
    shift_spread: float

    @classmethod
    def start(cls, count: int) -> PoseOffsets:
        """Nothing known yet: no offset, a generous prior."""
        offset = torch.zeros(count, 2 * AXES, dtype=torch.float64)
        return cls(offset=offset, shift_spread=FIRST_SHIFT_SPREAD)

    @property
    def precision(self) -> Tensor:
        """One over the prior variance of each of the six, `(6,)` float64."""
        spreads = [math.radians(TURN_SPREAD_DEG)] * AXES + [self.shift_spread] * AXES
        return torch.tensor(spreads, dtype=torch.float64) ** -2

    def columns(self, box_size_a: float) -> dict[str, NDArray[np.float32]]:
        """As columns of a latent table."""
        numbers = self.offset.clone()
        numbers[:, :AXES].rad2deg_()
        numbers[:, AXES:] *= box_size_a
        return dict(zip(TURNS + SHIFTS, numbers.float().numpy().T, strict=True))

    def of(self, rows: NDArray[np.int64]) -> PoseOffsets:
        """Those of some particles, in this order."""
        return replace(self, offset=self.offset[rows])

    def among(self, count: int, rows: NDArray[np.int64]) -> PoseOffsets:
        """Those of `count` particles, of which only some rows are known."""
        offset = torch.zeros(count, 2 * AXES, dtype=torch.float64)
        offset[rows] = self.offset
        return replace(self, offset=offset)

    def applied(self, images: FourierImages, part: slice) -> FourierImages:
        """The images as they would be with their poses corrected."""
        offset = self.offset[part]
        turn = torch.from_numpy(Rotation.from_rotvec(offset[:, :AXES].numpy()).as_matrix()).float()
        rotation = images.rotation @ turn.to(images.rotation.device)
        shift = (rotation[:, :2] @ offset[:, AXES:, None].to(rotation))[..., 0] * images.scale[:, None]
        phase = 2 * math.pi * (shift[:, :1] * images.plane.kx + shift[:, 1:] * images.plane.ky)
        turned = images.coefficients * torch.polar(torch.ones_like(phase), phase)
        return replace(images, rotation=rotation, coefficients=turned)

    def step(self, answer: PoseAnswer, z: Tensor, part: slice) -> PoseStep:
        """The offsets of some images that go with their coordinates `(B, J)`."""
        one = torch.nn.functional.pad(z, (1, 0), value=1.0)
        change = answer.point - (answer.response @ one[..., None])[..., 0]
        return PoseStep(offset=self.offset[part] + change, variance=answer.variance)

    def after(self, step: PoseStep) -> PoseOffsets:
        """With the offsets of this step; the spread stays."""
        return replace(self, offset=step.offset)

    def centred(self, step: PoseStep, counted: Tensor) -> PoseOffsets:
        """Without what all counted images share, which maps take up, and with the spread of their shifts."""
        offset = self.offset - self.offset[counted].mean(0)
        second = (offset**2 + step.variance)[counted, AXES:].mean()
        return replace(self, offset=offset, shift_spread=float(second) ** 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseAnswer:
    """The offsets' posterior given the factors a of each image: mean `point - response @ a`, `variance`."""

    point: Tensor
    response: Tensor
    variance: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PoseStep:
    """The next offsets of N images `(N, 6)`, and the variance of each `(N, 6)`."""

    offset: Tensor
    variance: Tensor


def marginalised(
    products: InnerProducts, poses: PoseOffsets, part: slice
) -> tuple[InnerProducts, PoseAnswer]:
    """The inner products of the maps alone, pose offsets integrated out.

    Parameters
    ----------
    products
        Of K maps and then the six `moves`.
    part
        Which images these are.
    """
    k = products.gram.shape[-1] - 2 * AXES
    precision, prior_mean = poses.precision, -poses.offset[part]
    cross = products.gram[:, k:, :k]
    information = products.gram[:, k:, k:] + torch.diag(precision)
    covariance = torch.linalg.inv(information)
    target = products.inner[:, k:] + precision * prior_mean
    point = (covariance @ target[..., None])[..., 0]
    response = covariance @ cross
    spent = (precision * prior_mean**2).sum(1) + torch.logdet(information) - precision.log().sum()
    seen = InnerProducts(
        gram=products.gram[:, :k, :k] - cross.transpose(1, 2) @ response,
        inner=products.inner[:, :k] - (cross.transpose(1, 2) @ point[..., None])[..., 0],
        power=products.power,
        gain=(target * point).sum(1) - spent,
    )
    return seen, PoseAnswer(point=point, response=response, variance=covariance.diagonal(dim1=1, dim2=2))


def read_pose_offsets(run: Path, box_size_a: float) -> PoseOffsets | None:
    """What corrects the poses of a run's particles, in the order of its latent.parquet; None: nothing."""
    import pyarrow.parquet as pq

    path = run / "latent.parquet"
    if TURNS[0] not in pq.read_schema(path).names:
        return None
    table = pq.read_table(path, columns=[*TURNS, *SHIFTS])
    offset = torch.from_numpy(np.stack([column.to_numpy() for column in table], axis=1)).double()
    offset[:, :AXES].deg2rad_()
    offset[:, AXES:] /= box_size_a
    return PoseOffsets(offset=offset, shift_spread=float(offset[:, AXES:].std()))
