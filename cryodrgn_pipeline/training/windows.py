"""Random order that a disk can follow: chunks of neighbours are dealt into windows, images mixed inside.

An epoch takes the chunks of the stack in random order, a window of them at a time. A window is read as a
whole, in runs, while the one before it is used; what is drawn from it at random is drawn from memory. So a
parallel file system sees a few large reads one after the other, and memory holds two windows whatever N is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.io.mrc import MrcImages

CHUNK_BYTES = 4 * 2**20  # neighbours that stay together
WINDOW_BYTES = 256 * 2**20  # images that are mixed with each other, from 64 places of the stack

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How many images of a stack a chunk has, and a window: the order of an epoch depends on both."""

    chunk: int
    window: int

    @classmethod
    def of(cls, images: MrcImages) -> Windows:
        """Those for images of this size and type."""
        chunk = max(1, CHUNK_BYTES // images.header.image_bytes)
        return cls(chunk=chunk, window=chunk * max(1, WINDOW_BYTES // CHUNK_BYTES))

    def order(self, rows: Rows, seed: int, epoch: int) -> Rows:
        """The rows (ascending) in the random order of an epoch, fixed by seed and epoch."""
        random = np.random.default_rng([seed, epoch])
        turned = np.roll(rows, -int(random.integers(len(rows))))  # other chunks each epoch
        whole = len(rows) // self.chunk * self.chunk
        chunks = random.permutation(turned[:whole].reshape(-1, self.chunk))
        order = np.concatenate([chunks.ravel(), turned[whole:]])
        for start in range(0, len(order), self.window):
            random.shuffle(order[start : start + self.window])
        return order


def read_in_order(
    images: MrcImages, parts: Sequence[Rows], windows: Sequence[int]
) -> Iterator[NDArray[np.floating[Any]]]:
    """The images of each part in turn, `(n, D, D)` in the type of the file; a thread reads a window ahead.

    Parameters
    ----------
    parts
        Rows of the stack, in the order in which they are wanted.
    windows
        The window that each part belongs to, ascending: parts of one window are read together.
    """
    numbered = zip(windows, parts, strict=True)
    groups = [[part for _, part in group] for _, group in groupby(numbered, key=lambda pair: pair[0])]
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        ahead = [reader.submit(_read, images, group) for group in groups[:1]]
        for number, group in enumerate(groups):
            held, places = ahead.pop().result()
            ahead += [reader.submit(_read, images, after) for after in groups[number + 1 : number + 2]]
            start = 0
            for part in group:
                yield held[places[start : start + len(part)]]
                start += len(part)


def _read(images: MrcImages, group: list[Rows]) -> tuple[NDArray[np.floating[Any]], Rows]:
    """All images of a window, once each, and where those of its parts lie among them."""
    rows, places = np.unique(np.concatenate(group), return_inverse=True)
    return images.read_stored(rows), places
