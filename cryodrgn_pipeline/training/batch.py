"""What one update of a training sees, and what the subspace says about particles beforehand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.fourier.slices import slice_coordinates
from cryodrgn_pipeline.fourier.transforms import HalfPlane
from cryodrgn_pipeline.subspace.poses import PoseOffsets


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B images at the P half-plane frequencies; `rows` are their rows in the stack, `position` among all.

    `whole`: the rows of the batch that these are one rank's share of.
    """

    rows: NDArray[np.int64]
    whole: NDArray[np.int64]
    position: Tensor  # (B,)
    coefficients: Tensor  # (B, P) complex64, divided by the normalisation σ
    ctf: Tensor  # (B, P), times the particle's contrast where that is known
    weight: Tensor | None  # (B, P) of squared residuals; None: 1
    seen: Tensor  # what the encoder reads: (B, P_e) complex64, filtered, or (B, F) features
    rotation: Tensor  # (B, 3, 3)
    magnification: Tensor  # (B,) volume pixel size / image pixel size

    def coordinates(self, plane: HalfPlane, points: Tensor | slice, images: slice) -> Tensor:
        """Where chosen half-plane points of chosen images lie in the volume: `(b, Q, 3)` cycles per pixel."""
        chosen = plane.at(points)
        cycles_per_box = slice_coordinates(chosen, self.rotation[images], self.magnification[images])
        return cycles_per_box / plane.box_size_px

    def transfer(self, points: Tensor | slice, images: slice) -> Tensor:
        """What turns volume into image coefficients, `(b, Q)`: the CTF, and finer pixels hold less each."""
        return self.ctf[images, points] * self.magnification[images, None] ** 2

    def weights(self, points: Tensor | slice, images: slice) -> Tensor | None:
        """Weights of the squared residuals, `(b, Q)`; None: 1."""
        return None if self.weight is None else self.weight[images, points]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """What the subspace says about N particles: `features` `(N, F)` for an encoder, `contrast` `(N,)` and
    `poses`, what corrects theirs (None: nothing).
    """

    features: Tensor
    contrast: Tensor
    poses: PoseOffsets | None
