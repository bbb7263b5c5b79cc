"""Where density may be: a generous soft mask from the mean map, with no truth needed."""

from __future__ import annotations

import torch
from torch import Tensor

from cryodrgn_pipeline.fourier.masks import radius_px

THRESHOLD = 0.05  # of the blurred map's maximum
DILATION = 0.07  # of the box
EDGE_PX = 0.7


def support_mask(mean: Tensor) -> Tensor:
    """A soft mask `(D, D, D)` around the density of a map, generous: a tight one costs more than none.

    Blur by a pixel in 32, keep what is above 5 % of the maximum, grow by 0.07 of the box, soften. The sign of
    the density is found by its skewness.
    """
    from scipy import ndimage

    d = mean.shape[-1]
    sign = 1.0 if float((mean.double() ** 3).sum()) >= 0 else -1.0
    blurred = ndimage.gaussian_filter(sign * mean.numpy(), max(0.6, d / 32))
    core = torch.from_numpy(blurred > THRESHOLD * blurred.max())
    reach = max(1.0, DILATION * d)
    distance = torch.from_numpy(ndimage.distance_transform_edt(~core.numpy()))
    grown = (distance <= reach + 0.005).float()
    soft = torch.from_numpy(ndimage.gaussian_filter(grown.numpy(), EDGE_PX))
    return soft * (radius_px(d) < d / 2 - 0.5)
