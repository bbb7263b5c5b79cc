"""How many latent points share a pass over the images, and with how many kernel widths, within the memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cryodrgn_pipeline.errors import ConfigError
from cryodrgn_pipeline.fourier.sizes import PADDING, ball_points, half_grid_points
from cryodrgn_pipeline.io.memory import available_bytes
from cryodrgn_pipeline.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

SHARE = 0.6  # of the memory that is available, unless a budget is given
GIB = 2**30
PADDED_ARRAYS, BOX_ARRAYS = 14, 10  # float32, on the padded half spectrum and on the box: work on one target


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`per_pass` targets share a pass, each with `widths` kernels; their `sums` take so many bytes, `most` is
    all that is held at a time.
    """

    per_pass: int
    widths: int
    sums: int
    most: int

    def passes(self, targets: int) -> int:
        """Over the images, for so many targets."""
        return -(-targets // self.per_pass)


def plan_passes(
    box_size_px: int,
    targets: int,
    widths: int,
    *,
    grids: int,
    kept: int,
    memory_gb: float | None,
    ranks: Ranks = ALONE,
) -> Plan:
    """As many kernel widths as wished for where they fit, then as many targets a pass as fit; the log tells.

    Parameters
    ----------
    grids
        Maps by which a model predicts images; 0 without a model.
    kept
        Bytes of the model, held all the time.
    memory_gb
        The budget in GiB; None takes 60 % of the memory that is available.
    ranks
        Those that hold the same each, so that processes on one node divide the budget; the plan is one.

    Raises
    ------
    ConfigError
        If one target with one width does not fit.
    """
    budget = SHARE * available_bytes() if memory_gb is None else memory_gb * GIB
    budget = -ranks.largest(-budget / ranks.local_size)[0]
    beside = kept + max(grids * 8 * ball_points(box_size_px), work_bytes(box_size_px))

    def needed(count: int, wide: int) -> int:
        return beside + sums_bytes(box_size_px, count, wide, with_model=grids > 0)

    wide = next((wide for wide in range(widths, 0, -1) if needed(1, wide) <= budget), None)
    if wide is None:
        where = "given" if memory_gb is not None else "60 % of what is available"
        raise ConfigError(
            f"volumes of {box_size_px} px from particles take {needed(1, 1) / GIB:.1f} GiB, but "
            f"{budget / GIB:.1f} GiB may be used ({where}): give --memory-gb where there is more, or name a "
            "stack of a smaller box with --stack"
        )
    most = max(count for count in range(1, targets + 1) if count == 1 or needed(count, wide) <= budget)
    sums = sums_bytes(box_size_px, most, wide, with_model=grids > 0)
    plan = Plan(per_pass=most, widths=wide, sums=sums, most=needed(most, wide))
    log.info(
        "%d kernel widths; up to %.2f of %.2f GiB will be held, %.2f of them sums; targets a pass over the "
        "images: %d; passes: %d",
        *(wide, plan.most / GIB, budget / GIB, sums / GIB, most, plan.passes(targets)),
    )
    return plan


def numbers_of(*, with_model: bool) -> int:
    """M, how many numbers are summed up at a point."""
    return 5 if with_model else 3


def sums_bytes(box_size_px: int, targets: int, widths: int, *, with_model: bool) -> int:
    """Memory of the sums of T targets."""
    cells = 2 * targets * (widths - 1) + 2
    return cells * ball_points(box_size_px) * numbers_of(with_model=with_model) * 4


def work_bytes(box_size_px: int) -> int:
    """Memory of the work on one target, beside its sums."""
    padded = half_grid_points(PADDING * box_size_px)
    return 4 * (PADDED_ARRAYS * padded + BOX_ARRAYS * box_size_px**3)
