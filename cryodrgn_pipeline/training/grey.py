"""The grey scale of images as a decoder sees it: how strongly they show the map that it draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.models.vae import GreyReference
from cryodrgn_pipeline.subspace.images import LevelImages
from cryodrgn_pipeline.subspace.levels import FINEST_PX
from cryodrgn_pipeline.subspace.solve import Lattice
from cryodrgn_pipeline.subspace.sums import inner_products

if TYPE_CHECKING:
    from cryodrgn_pipeline.io.checkpoints import TrainedModel
    from cryodrgn_pipeline.stack import Stack

SAMPLED_IMAGES = 5000


def grey_reference(
    model: TrainedModel, stack: Stack, rows: NDArray[np.int64], z: NDArray[np.floating[Any]]
) -> GreyReference:
    """The grey scale of the images that a model was trained on, whose latents are `z` `(N, J)`."""
    mean = tuple(float(value) for value in z.mean(axis=0))
    return GreyReference(z=mean, gain=grey_gain(model, stack, rows, torch.tensor(mean)))


def grey_gain(model: TrainedModel, stack: Stack, rows: NDArray[np.int64], z: Tensor) -> float:
    """By how much images exceed the map that the model draws at `z`, by least squares over a sample.

    Images multiplied by a number have a gain that is multiplied by it, whatever their noise is.
    """
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_IMAGES)).astype(int)]
    level_px = min(model.box_size_px, FINEST_PX)
    with torch.no_grad():
        density = model.density(z, level_px)
    lattice, images = Lattice(level_px), LevelImages(stack, rows, level_px)
    columns = lattice.columns(density[None])
    found = [inner_products(columns, lattice.size, chunk, images.weight) for _, chunk in images.chunks()]
    return float(sum(one.inner.sum() for one in found) / sum(one.gram.sum() for one in found))
