"""The images of a particle set, wherever they lie: checked before any work, read chunk by chunk."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.mrc import MrcHeader, MrcImages, read_header, stack_paths
from cryodrgn_pipeline.particles import ParticleSet

OPEN_FILES = 64
CHUNK_BYTES = 64 * 2**20
WORK_BATCH = 32  # images one thread works on at a time: small enough for its cache

Extra = TypeVar("Extra")


@dataclass(frozen=True, slots=True)
class Batch:
    """Images of one box size: `images` is `(n, D₀, D₀)`, `positions` their places in the rows asked for."""

    positions: NDArray[np.int64]
    images: NDArray[np.float32]


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
        self._headers: dict[int, list[MrcHeader]] = {}
        self._open: OrderedDict[Path, MrcImages] = OrderedDict()
        used = np.unique(self._refs.stack)
        largest = np.full(len(self._refs.stack_paths), -1)
        np.maximum.at(largest, self._refs.stack, self._refs.index)
        self._files = {int(stack): stack_paths(self._refs.stack_paths[stack]) for stack in used}
        for stack in used:
            path = self._refs.stack_paths[stack]
            for file in self._files[int(stack)]:
                _check_unchanged(file, (recorded or {}).get(str(file)))
            headers = [read_header(file) for file in self._files[int(stack)]]
            self._headers[int(stack)] = headers
            count = sum(header.n_images for header in headers)
            if largest[stack] >= count:
                raise InputFormatError(
                    f"{path}: the particle table refers to image {largest[stack] + 1}, but the file has "
                    f"{count}; it is another file than the particles were extracted to, or it was cut"
                )
        boxes = {int(stack): self._box(int(stack)) for stack in used}
        self.box_size_px: NDArray[np.int64] = _lookup(self._refs.stack, boxes)
        wrong = np.flatnonzero(self.box_size_px != particles.optics.box_size_px)
        if len(wrong):
            row = wrong[0]
            raise InputFormatError(
                f"{self.path_of(row)}: its images are {self.box_size_px[row]} px wide, but the particle "
                f"table says {particles.optics.box_size_px[row]} ({len(wrong)} of {len(particles)} "
                "rows are wrong); import the particles again with the stacks they belong to"
            )

    def _box(self, stack: int) -> int:
        sizes = {(header.ny, header.nx) for header in self._headers[stack]}
        if len(sizes) > 1 or any(ny != nx for ny, nx in sizes):
            listed = ", ".join(f"{ny} x {nx}" for ny, nx in sorted(sizes))
            raise InputFormatError(
                f"{self._refs.stack_paths[stack]}: images of {listed} px; particle images are square"
            )
        return next(iter(sizes))[0]

    def path_of(self, row: int) -> str:
        """The stack of one particle, as the table has it."""
        return self._refs.stack_paths[int(self._refs.stack[row])]

    def name_of(self, row: int) -> str:
        """One particle's image as RELION writes it, `number@stack` with the first image as 1."""
        return f"{self._refs.index[row] + 1}@{self.path_of(row)}"

    def chunk_size(self) -> int:
        """As many images as make a read of about 64 MiB, at least 16."""
        return max(16, int(CHUNK_BYTES // (int(self.box_size_px.max()) ** 2 * 4)))

    def buffer(self, chunk_size: int) -> NDArray[np.float32]:
        """Memory for `chunk_size` of the largest images, to be reused between reads."""
        return np.empty(chunk_size * int(self.box_size_px.max()) ** 2, dtype=np.float32)

    def read(self, rows: NDArray[np.int64], buffer: NDArray[np.float32]) -> list[Batch]:
        """The images of the given rows, sorted by box size, stack and number so that disks like it.

        The images lie in `buffer` and are overwritten when it is used again.
        """
        stack, index, box = self._refs.stack[rows], self._refs.index[rows], self.box_size_px[rows]
        order = np.lexsort((index, stack, box))
        batches, used = [], 0
        for size in np.unique(box):
            positions = order[box[order] == size]
            room = len(positions) * size * size
            images = buffer[used : used + room].reshape(len(positions), size, size)
            used += room
            for this in np.unique(stack[positions]):
                here = np.flatnonzero(stack[positions] == this)  # contiguous, because sorted
                self._read_stack(int(this), index[positions[here]], images[here[0] : here[-1] + 1])
            batches.append(Batch(positions, images))
        return batches

    def _read_stack(self, stack: int, index: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        ends = np.cumsum([header.n_images for header in self._headers[stack]])
        part = np.searchsorted(ends, index, side="right")  # index is sorted, so is this
        for file in np.unique(part):
            chosen = np.flatnonzero(part == file)
            before = ends[file - 1] if file else 0
            images = self._opened(self._files[stack][file])
            images.read_into(index[chosen] - before, out[chosen[0] : chosen[-1] + 1])

    def _opened(self, path: Path) -> MrcImages:
        if path not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close()
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

    Every thread works on a few images at a time by itself: no thread waits for another within an image, which
    on a machine that others use as well costs more than the arithmetic.

    Parameters
    ----------
    images
        Where the images come from.
    box_size_px
        The box D of the results.
    chunk_size, threads
        Images read at once (default about 64 MiB; memory holds two chunks) and working threads (default all
        cores the process may use).
    work
        Called in the threads with k rows and their `(k, D₀, D₀)` images; gives `(k, D, D)` results and
        something for `collect`.
    collect
        Called in row order with the rows of a chunk, its results and all that `work` gave for it.
    write
        Called with the results of each chunk, in row order, in a thread of its own.
    """
    n = len(images.box_size_px)
    size = min(chunk_size or images.chunk_size(), n)
    chunks = [np.arange(start, min(start + size, n)) for start in range(0, n, size)]
    buffers = [images.buffer(size) for _ in range(2)]
    results = [np.empty((size, box_size_px, box_size_px), dtype=np.float32) for _ in range(2)]
    workers = threads or len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
        ThreadPoolExecutor(workers, initializer=_compute_alone) as pool,
    ):

        def part(rows: NDArray[np.int64], batch: Batch, start: int, result: NDArray[np.float32]) -> Extra:
            places = batch.positions[start : start + WORK_BATCH]
            done, extra = work(rows[places], batch.images[start : start + WORK_BATCH])
            result[places] = done
            return extra

        coming = reader.submit(images.read, chunks[0], buffers[0])
        going: Future[None] | None = None
        for number, rows in enumerate(chunks):
            batches = coming.result()
            if number + 1 < len(chunks):
                coming = reader.submit(images.read, chunks[number + 1], buffers[(number + 1) % 2])
            result = results[number % 2][: len(rows)]
            parts = [
                pool.submit(part, rows, batch, start, result)
                for batch in batches
                for start in range(0, len(batch.images), WORK_BATCH)
            ]
            collect(rows, result, [one.result() for one in parts])
            if going is not None:
                going.result()
            going = writer.submit(write, result)
        if going is not None:
            going.result()


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


def _lookup(keys: NDArray[np.int64], values: Mapping[int, int]) -> NDArray[np.int64]:
    table = np.zeros(max(values, default=-1) + 1, dtype=np.int64)
    for key, value in values.items():
        table[key] = value
    found: NDArray[Any] = table[keys]
    return found
