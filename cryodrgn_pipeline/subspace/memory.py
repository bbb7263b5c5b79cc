"""Memory of learning a subspace, by formula: how many maps a box gets, and what a job asks for."""

from __future__ import annotations

from cryodrgn_pipeline.fourier.sizes import half_grid_points

BUDGET_BYTES = 8 * 2**30


def affordable(box_size_px: int, maps: int, iterations: int) -> tuple[int, int]:
    """How many of so many maps beside the mean can be solved for in 8 GiB, and with how many iterations.

    The last maps are left out down to four, then the exact solve.
    """
    while maps > 4 and required_bytes(box_size_px, 1 + maps, iterations) > BUDGET_BYTES:
        maps -= 1
    fits = required_bytes(box_size_px, 1 + maps, iterations) <= BUDGET_BYTES
    return maps, iterations if fits else 0


def required_bytes(box_size_px: int, maps: int, iterations: int) -> int:
    """Memory of the normal equations of K maps and of their solve.

    Sums, weights of all pairs of maps, and transforms in work; without iterations the weights of pairs lie on
    the unpadded grid, twice.
    """
    padded, unpadded = (half_grid_points(n * box_size_px) for n in (2, 1))
    pairs = maps * (maps + 1) // 2
    if iterations:
        return 4 * padded * (pairs + 8 * maps + 32)
    return 4 * (padded * (2 * maps + 8) + unpadded * (2 * pairs + 4 * maps))
