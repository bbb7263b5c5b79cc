"""The boxes that a subspace is learnt at, from coarse to fine."""

from __future__ import annotations

COARSEST_PX = 16
FINEST_PX = 64  # coordinates are learnt up to here; finer maps are made with what they then are


def levels_of(box_size_px: int) -> list[int]:
    """Boxes from coarse to fine: 16, 32, 64 as far as they are below D, then D or 64."""
    finest = min(box_size_px, FINEST_PX)
    return [d for d in (COARSEST_PX, 2 * COARSEST_PX) if d < finest] + [finest]
