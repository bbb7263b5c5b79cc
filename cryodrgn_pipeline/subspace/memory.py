"""Memory of learning a subspace, by formula: how many maps a box gets, and what a job asks for."""

from __future__ import annotations

from cryodrgn_pipeline.fourier.sizes import half_grid_points, half_plane_points
from cryodrgn_pipeline.subspace.levels import levels_of

BUDGET_BYTES = 8 * 2**30
CURVED = 2
KEPT_BYTES = 2 * 2**30  # of images, where all fit; else they stream from the stack
STREAMED_BYTES = 4 * 32 * 2**20  # chunks of images in work: read, transformed, looked at
POSTERIOR_COPIES = 2  # of K² float64 an image: posteriors, twice while they are written
LEARNING_COPIES = 4  # ... more of the images that teach: second moments, inner products


def learning_bytes(
    particles: int, taught: int, box_size_px: int, tried: int, final: tuple[int, int], *, level_maps: int
) -> int:
    """Memory of learning from N particles, beside that of the program.

    Parameters
    ----------
    taught
        How many of them the subspace is learnt from.
    tried
        Maps that coordinates are learnt with, the mean included.
    final
        Maps at the stack's box, and iterations of their solve.
    level_maps
        Maps that are solved for at the finest level.
    """
    levels = levels_of(box_size_px)
    most = max(tried, level_maps)
    solving = max(required_bytes(levels[-1], most, 5), required_bytes(box_size_px, *final))
    images = max(_image_bytes(particles, level) for level in (*levels, box_size_px))
    known = POSTERIOR_COPIES * particles + LEARNING_COPIES * min(taught, particles)
    return solving + images + 8 * known * most**2


def _image_bytes(particles: int, level_px: int) -> int:
    kept = particles * coefficient_bytes(half_plane_points(level_px))
    return STREAMED_BYTES + (kept if kept <= KEPT_BYTES else 0)


def coefficient_bytes(points: int) -> int:
    """Memory of P coefficients of an image and its CTF."""
    return 12 * points


def affordable(box_size_px: int, maps: int, iterations: int) -> tuple[int, int]:
    """How many of so many maps beside the mean can be solved for in 8 GiB, and with how many iterations.

    The last maps are left out down to four, then the exact solve.
    """
    while maps > 4 and required_bytes(box_size_px, 1 + maps, iterations) > BUDGET_BYTES:
        maps -= 1
    fits = required_bytes(box_size_px, 1 + maps, iterations) <= BUDGET_BYTES
    return maps, iterations if fits else 0


def affordable_curves(box_size_px: int, components: int, iterations: int) -> tuple[int, int]:
    """Of how many components squares and products get maps in 8 GiB, and with how many iterations.

    First the curved maps are left out, then the exact solve; the components all stay.
    """
    for choice in ((min(CURVED, components), iterations), (0, iterations), (0, 0)):
        curved, steps = choice
        if required_bytes(box_size_px, 1 + components + curved * (curved + 1) // 2, steps) <= BUDGET_BYTES:
            break
    return choice


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
