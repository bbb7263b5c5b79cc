"""What a trained model keeps of its subspace, so that new images can be placed in it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Subspace:
    """The maps of the finest level at which images were placed, in the grey scale of the images.

    `maps` `(J+1, d, d, d)`: the mean and J components, for coordinates of variance 1; `mask` `(d, d, d)`,
    where they live; `drawn` `(J+1, d, d, d)`, the maps that the factors of a network multiply (None: there is
    no network). `grey`: by how much the images of the training exceed the maps, with poses as given.
    `scale_spread`: standard deviation of the particles' contrasts. `shift_spread`: that of their shifts on
    each axis, in boxes, where poses were corrected; None: poses were taken as they are.
    """

    maps: Tensor
    mask: Tensor
    drawn: Tensor | None
    grey: float
    scale_spread: float
    shift_spread: float | None

    @property
    def level_px(self) -> int:
        """Box of the maps: images are seen up to its Nyquist frequency."""
        return int(self.maps.shape[-1])
