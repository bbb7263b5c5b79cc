"""The images of a stack at a coarse-to-fine level: streamed from disk, or kept where they fit in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.fourier.transforms import HalfPlane, half_plane
from cryodrgn_pipeline.fourier_images import SMALLEST_NOISE, FourierImages, stream
from cryodrgn_pipeline.ranks import ALONE, Ranks
from cryodrgn_pipeline.subspace.memory import KEPT_BYTES, coefficient_bytes

if TYPE_CHECKING:
    from cryodrgn_pipeline.stack import Stack
    from cryodrgn_pipeline.subspace.poses import PoseOffsets

KEPT_SHARE = 0.25  # of a GPU's memory


def level_plane(box_size_px: int, level_px: int) -> HalfPlane:
    """The half plane of a D px box within the Nyquist frequency of `level_px`, with DC as its first point."""
    plane = half_plane(box_size_px, level_px / 2 - 0.01)
    order = torch.argsort(plane.ky * box_size_px + plane.kx)  # neighbours in turn: they share memory
    zero = torch.zeros(1, dtype=plane.kx.dtype)
    ky, kx = (torch.cat([zero, k[order]]) for k in (plane.ky, plane.kx))
    return HalfPlane(box_size_px=box_size_px, ky=ky, kx=kx)


def kept_bytes(device: torch.device) -> float:
    """How much memory of a device may hold images between passes."""
    if device.type == "cuda":
        return KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory
    return KEPT_BYTES


class LevelImages:
    """Rows of a stack, seen up to the Nyquist frequency of a smaller box.

    `plane`, `weight` `(groups, P)`: one over the noise power |F|² of each optics group; DC, which is its own
    mirror image, counts half. They and the images lie on `device`. `poses`, where known, correct the images.
    """

    def __init__(
        self,
        stack: Stack,
        rows: NDArray[np.int64],
        level_px: int,
        *,
        white: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.stack, self.rows, self.level_px, self.white = stack, rows, level_px, white
        plane = level_plane(stack.box_size_px, level_px)
        weight, self.groups = noise_precision(stack.noise, plane, white=white)
        self.plane, self.weight = plane.to(device), weight.to(device)
        self.poses: PoseOffsets | None = None
        self._kept: list[tuple[slice, FourierImages]] = []
        self._most_kept = int(kept_bytes(torch.device(device)) // coefficient_bytes(len(plane)))

    def __len__(self) -> int:
        return len(self.rows)

    def posed(self, poses: PoseOffsets | None) -> LevelImages:
        """The same images with their poses corrected by these offsets, not by others."""
        other = copy.copy(self)
        other.poses = poses
        return other

    def streamed(self) -> LevelImages:
        """The same images, not kept in memory for another pass."""
        other = copy.copy(self)
        other._kept, other._most_kept = [], 0
        return other

    def of(self, chosen: NDArray[np.int64]) -> LevelImages:
        """Some of these images, by their place in `rows`."""
        other = self.posed(None if self.poses is None else self.poses.of(chosen))
        other.rows, other._kept = self.rows[chosen], []
        return other

    @property
    def coefficients(self) -> int:
        """How many real numbers of an image are seen."""
        return 2 * len(self.plane) - 1

    def chunks(self, done: int = 0, ranks: Ranks = ALONE) -> Iterator[tuple[slice, FourierImages]]:
        """This rank's images in chunks, their poses corrected: their place in `rows`, and their data.

        Parameters
        ----------
        done
            How many to leave out: those of so many chunks.
        ranks
            Those that share the images, the same at each call.
        """
        for part, images in self._as_given(done, ranks.share(len(self))):
            yield part, images if self.poses is None else self.poses.applied(images, part)

    def _as_given(self, done: int, share: slice) -> Iterator[tuple[slice, FourierImages]]:
        first = share.start + done
        if self._kept:
            yield from (chunk for chunk in self._kept if chunk[0].start >= first)
            return
        count = share.stop - share.start
        kept, keep = [], count <= self._most_kept and done == 0
        blocks: dict[str, Tensor] = {}  # between temporary ones, chunks of their own would lie in pieces
        rows = self.rows[: share.stop]
        for part, images in stream(self.stack, rows, self.plane, self.groups, first=first):
            if keep:
                moved: dict[str, Any] = {}
                for name in ("coefficients", "ctf"):
                    values: Tensor = getattr(images, name)
                    if name not in blocks:
                        blocks[name] = values.new_empty(count, values.shape[1])
                    block = blocks[name][part.start - share.start : part.stop - share.start]
                    moved[name] = block.copy_(values)
                images = replace(images, **moved)
                kept.append((part, images))
            yield part, images
        if keep:
            self._kept.extend(kept)  # the list is shared with `posed` copies


def noise_precision(
    noise: dict[int, NDArray[np.float64]], plane: HalfPlane, *, white: bool
) -> tuple[Tensor, dict[int, int]]:
    """One over the noise power of each optics group at the half plane, `(groups, P)`, and the groups' rows.

    Parameters
    ----------
    noise
        Optics group → `(D/2+1,)` noise power per shell.
    white
        Take the median over the shells for all of them.
    """
    rows = {group: row for row, group in enumerate(sorted(noise))}
    table = torch.empty(len(rows), len(plane))
    for group, row in rows.items():
        power = noise[group]
        power = np.full_like(power, np.median(power)) if white else power
        power = np.maximum(power, SMALLEST_NOISE * np.median(power))
        table[row] = torch.from_numpy(1 / np.interp(plane.radius.numpy(), np.arange(len(power)), power))
    table[:, 0] /= 2
    return table, rows
