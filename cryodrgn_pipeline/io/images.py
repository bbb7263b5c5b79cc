"""The images of a particle set, wherever they lie: checked before any work, read chunk by chunk."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.mrc import MrcImages, read_header
from cryodrgn_pipeline.particles import ParticleSet

OPEN_FILES = 64
CHUNK_BYTES = 64 * 2**20
WORK_BATCH = 32  # images one thread works on at a time: small enough for its cache

Extra = TypeVar("Extra")


class ParticleImages:
    """Reads images by particle row, whatever the order and number of the stacks."""

    def __init__(self, particles: ParticleSet, recorded: Mapping[str, tuple[int, int]] | None = None) -> None:
        """Find and check every stack that the particles use.

        Parameters
        ----------
        particles
            The set; its box sizes and image numbers must fit the files.
        recorded
            Size in bytes and modification time in ns of stacks when they were imported, by path.

        Raises
        ------
        InputFormatError
            If a stack is missing, truncated or changed, or does not fit the particle table.
        """
        self._refs = particles.images
        self._open: OrderedDict[str, MrcImages] = OrderedDict()
        self._lock = threading.Lock()
        largest = np.full(len(self._refs.stack_paths), -1)
        np.maximum.at(largest, self._refs.stack, self._refs.index)
        boxes = np.zeros(len(largest), dtype=np.int64)
        for stack in np.unique(self._refs.stack):
            path = self._refs.stack_paths[stack]
            _check_unchanged(Path(path), (recorded or {}).get(path))
            header = read_header(path)
            if largest[stack] >= header.n_images:
                raise InputFormatError(
                    f"{path}: the particle table refers to image {largest[stack] + 1}, but the file has "
                    f"{header.n_images}; it is another file than the particles lie in, or it was cut"
                )
            if header.ny != header.nx:
                raise InputFormatError(
                    f"{path}: images of {header.ny} x {header.nx} px; particle images are square"
                )
            boxes[stack] = header.nx
        self.box_size_px: NDArray[np.int64] = boxes[self._refs.stack]
        wrong = np.flatnonzero(self.box_size_px != particles.optics.box_size_px)
        if len(wrong):
            row = wrong[0]
            raise InputFormatError(
                f"{self.path_of(row)}: its images are {self.box_size_px[row]} px wide, but the particle "
                f"table says {particles.optics.box_size_px[row]} ({len(wrong)} of {len(particles)} "
                "rows are wrong); import the particles again with the stacks they belong to"
            )

    def path_of(self, row: int) -> str:
        """The stack of one particle, as the table has it."""
        return self._refs.stack_paths[int(self._refs.stack[row])]

    def name_of(self, row: int) -> str:
        """One particle's image as RELION writes it, `number@stack` with the first image as 1."""
        return f"{self._refs.index[row] + 1}@{self.path_of(row)}"

    def chunk_size(self) -> int:
        """As many images as make a read of about 64 MiB, at least 16."""
        return max(16, int(CHUNK_BYTES // (int(self.box_size_px.max()) ** 2 * 4)))

    def parts(self, rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
        """Positions in `rows`, at most `size` to a part: one box in a part, ordered as the disk has them."""
        stack, index, box = self._refs.stack[rows], self._refs.index[rows], self.box_size_px[rows]
        order = np.lexsort((index, stack, box))
        runs = np.split(order, np.flatnonzero(np.diff(box[order])) + 1)
        return [run[start : start + size] for run in runs for start in range(0, len(run), size)]

    def read(self, rows: NDArray[np.int64], memory: NDArray[np.float32]) -> NDArray[np.float32]:
        """The images of one part's rows: `(n, D₀, D₀)` in `memory` (flat), overwritten by the next read."""
        d = int(self.box_size_px[rows[0]])
        images = memory[: len(rows) * d * d].reshape(len(rows), d, d)
        stack = self._refs.stack[rows]
        cuts = [0, *(np.flatnonzero(np.diff(stack)) + 1), len(rows)]
        for start, stop in pairwise(cuts):
            file = self._opened(self.path_of(rows[start]))
            file.read_into(self._refs.index[rows[start:stop]], images[start:stop])
        return images

    def _opened(self, path: str) -> MrcImages:
        with self._lock:
            if path not in self._open:
                if len(self._open) >= OPEN_FILES:
                    self._open.popitem(last=False)  # closes itself when no thread reads it any more
                self._open[path] = MrcImages(path)
            self._open.move_to_end(path)
            return self._open[path]

    def close(self) -> None:
        """Close all files."""
        while self._open:
            self._open.popitem()[1].close()


def stream(
    images: ParticleImages,
    *,
    box_size_px: int,
    chunk_size: int | None,
    threads: int | None,
    work: Callable[[NDArray[np.int64], NDArray[np.float32]], tuple[NDArray[np.float32], Extra]],
    collect: Callable[[NDArray[np.int64], NDArray[np.float32], list[Extra]], None],
    write: Callable[[NDArray[np.float32]], None],
) -> None:
    """Read, work on and write all particles' images in chunks; disk and arithmetic overlap.

    Every thread reads a few images and works on them by itself, while they are in its cache. No thread waits
    for another within an image, which on a machine that others use as well costs more than the arithmetic.

    Parameters
    ----------
    images
        Where the images come from.
    box_size_px
        The box D of the results.
    chunk_size, threads
        Images between two writes (default about 64 MiB; memory holds the results of two chunks) and working
        threads (default all cores the process may use).
    work
        Called in the threads with k rows and their `(k, D₀, D₀)` images, which it must not keep; gives
        `(k, D, D)` results and something for `collect`.
    collect
        Called in row order with the rows of a chunk, its results and all that `work` gave for it.
    write
        Called with the results of each chunk, in row order, in a thread of its own.
    """
    n = len(images.box_size_px)
    size = min(chunk_size or images.chunk_size(), n)
    chunks = [np.arange(start, min(start + size, n)) for start in range(0, n, size)]
    results = [np.empty((size, box_size_px, box_size_px), dtype=np.float32) for _ in range(2)]
    workers = threads or len(os.sched_getaffinity(0))
    largest = int(images.box_size_px.max())
    mine = threading.local()

    def work_on(rows: NDArray[np.int64], places: NDArray[np.int64], result: NDArray[np.float32]) -> Extra:
        if not hasattr(mine, "memory"):
            _compute_alone()
            mine.memory = np.empty(WORK_BATCH * largest**2, dtype=np.float32)
        done, extra = work(rows[places], images.read(rows[places], mine.memory))
        result[places] = done
        return extra

    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(workers) as pool:
        writes: list[Future[None]] = []

        def start(number: int) -> list[Future[Extra]]:
            if number >= 2:
                writes[number - 2].result()  # its memory is used again
            rows = chunks[number]
            parts = images.parts(rows, WORK_BATCH)
            return [pool.submit(work_on, rows, places, results[number % 2]) for places in parts]

        coming = start(0)
        for number, rows in enumerate(chunks):
            running, coming = coming, start(number + 1) if number + 1 < len(chunks) else []
            result = results[number % 2][: len(rows)]
            try:
                collect(rows, result, [one.result() for one in running])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            writes.append(writer.submit(write, result))
        for one in writes:
            one.result()


def _compute_alone() -> None:
    import torch

    torch.set_num_threads(1)


def _check_unchanged(path: Path, recorded: tuple[int, int] | None) -> None:
    if recorded is None:
        return
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise InputFormatError(
            f"{path}: no such image file; it was there when the particles were imported. Import them again "
            "(--datadir names the folder the paths are relative to)"
        ) from error
    size, mtime_ns = recorded
    if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        raise InputFormatError(
            f"{path}: changed since the import: it had {size} bytes and was written {_when(mtime_ns)}, "
            f"now it has {status.st_size} bytes and was written {_when(status.st_mtime_ns)}; import the "
            "particles again"
        )


def _when(mtime_ns: int) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(mtime_ns / 1e9).astimezone().isoformat(sep=" ", timespec="milliseconds")
