"""Whether an epoch is bound by the disk or by arithmetic: what the data path of network training costs.

    python benchmarks/data_path.py STACK [--cold | --profile]

Reads the images of an epoch in its random order three times: as bare bytes, as batches (read, transformed,
with CTFs, on the device) that nobody uses, and in a training that does. The loop should wait for a small part
of its time, or the bytes alone should take as long. --cold: from the disk, not from the system's cache.
--profile: what the time of a batch goes to, in one thread.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cryodrgn_pipeline.devices import choose_device
from cryodrgn_pipeline.models.vae import Vae, VaeConfig
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.training.data import TrainingData
from cryodrgn_pipeline.training.loop import Trainer
from cryodrgn_pipeline.training.settings import TrainingSettings
from cryodrgn_pipeline.training.windows import read_in_order


def network(box_size_px: int) -> VaeConfig:
    """A small network that reads images as they are: most images a second, so the most to ask of the disk."""
    return VaeConfig(
        box_size_px=box_size_px,
        encoder="image",
        decoder="mlp",
        encoder_width=256,
        decoder_width=256,
        encoder_input="image",
    )


def training_data(path: Path, device: torch.device) -> TrainingData:
    """All rows of a stack, read as they are needed."""
    stack = Stack.open(path)
    rows = np.arange(len(stack))
    return TrainingData(stack, rows, network(stack.box_size_px), in_memory=False, device=device)


def windows(data: TrainingData, order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The rows of the order's windows, each sorted."""
    size = data.windows.window
    return (np.sort(order[start : start + size]) for start in range(0, len(order), size))


def read_bytes(data: TrainingData, order: NDArray[np.int64]) -> float:
    """Seconds to read the images' bytes, window by window."""
    started = time.perf_counter()
    for rows in windows(data, order):
        data.stack.images.read_stored(rows)
    return time.perf_counter() - started


def read_batches(data: TrainingData, order: NDArray[np.int64], batch_size: int) -> float:
    """Seconds to make all batches of the order."""
    started = time.perf_counter()
    for batch in data.batches(order, batch_size):
        finish(batch.coefficients)
    return time.perf_counter() - started


def train(data: TrainingData, order: NDArray[np.int64], batch_size: int) -> tuple[float, float]:
    """Seconds of a training on the order, and those of them in which it waited for batches."""
    trainer = Trainer(
        Vae(network(data.stack.box_size_px)),
        data,
        TrainingSettings(batch_size=batch_size),
        train_rows=order,
        held_out_rows=order[:0],
        device=data.device,
    )
    started, waited = time.perf_counter(), 0.0
    batches = data.batches(order, batch_size)
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        waited += time.perf_counter() - asked
        if batch is None:
            return time.perf_counter() - started, waited
        finish(trainer._step(batch)[0])


def finish(values: torch.Tensor) -> None:
    """Wait until the device has made these."""
    if values.device.type == "cuda":
        torch.cuda.synchronize(values.device)


def forget(stack: Stack) -> None:
    """Put a stack out of the system's cache."""
    with stack.images.path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(data: TrainingData, batch_size: int, trained: int, cold: bool) -> str:
    """Rates of the three, over one epoch and over the first `trained` images of it."""
    order = data.epoch_order(np.arange(len(data)), 0, 0)
    image_bytes = data.stack.images.header.image_bytes
    lines = ["| | images/s | MB/s | waiting |", "|---|---|---|---|"]

    def row(name: str, count: int, seconds: float, waiting: str = "") -> None:
        rate = count / seconds
        lines.append(f"| {name} | {rate:,.0f} | {rate * image_bytes / 1e6:,.0f} | {waiting} |")

    if cold:
        forget(data.stack)
    row("bytes alone", len(order), read_bytes(data, order))
    if cold:
        forget(data.stack)
    row("batches, no network", len(order), read_batches(data, order, batch_size))
    some = order[:trained]
    seconds, waited = train(data, some, batch_size)
    row("training, 256 x 3", len(some), seconds, f"{100 * waited / seconds:.1f} %")
    return "\n".join(lines)


def profile(data: TrainingData, order: NDArray[np.int64], batch_size: int) -> str:
    """What a batch takes in one thread: reading, Python, and arithmetic by kind.

    Python's part, with what torch needs to start an operation, is at most what a batch of one image takes.
    The profiler divides the rest.
    """

    def seconds(order: NDArray[np.int64], size: int) -> tuple[float, float]:
        """Of a batch of so many: to read it, and to make it of what was read."""
        parts = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        numbers = [number * size // data.windows.window for number in range(len(parts))]
        asked = time.perf_counter()
        images = list(read_in_order(data.stack.images, parts, numbers))
        read = time.perf_counter()
        for part, pixels in zip(parts, images, strict=True):
            data.batch(part, images=pixels)
        return (read - asked) / len(parts), (time.perf_counter() - read) / len(parts)

    # the first round may bring the file into the system's cache
    reading, making = np.min([seconds(order, batch_size) for _ in range(3)], axis=0)
    fixed = min(making, min(seconds(order[:batch_size], 1)[1] for _ in range(3)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        seconds(order, batch_size)
    took = {event.key: event.self_cpu_time_total for event in watched.key_averages()}
    share = sum(us for name, us in took.items() if "fft" in name) / sum(took.values())
    rows = {
        "reading": reading,
        "transforms": share * (making - fixed),
        "CTFs, grey scale, gathering": (1 - share) * (making - fixed),
        "Python, and starting operations": fixed,
    }
    lines = [f"| of a batch of {batch_size} | ms | share |", "|---|---|---|"]
    whole = reading + making
    lines += [f"| {name} | {1e3 * s:.2f} | {100 * s / whole:.0f} % |" for name, s in rows.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stack", type=Path)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--trained", type=int, default=2048, help="images that the network sees")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    parser.add_argument("--cold", action="store_true", help="read from the disk")
    parser.add_argument("--epoch", action="store_true", help="only read an epoch of batches")
    parser.add_argument("--profile", action="store_true", help="what the time of a batch goes to")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    data = training_data(options.stack, choose_device(options.device))
    if options.epoch:
        order = data.epoch_order(np.arange(len(data)), 0, 0)
        seconds = read_batches(data, order, options.batch_size)
        print(f"{len(order) / seconds:.0f} images/s")
        return 0
    if options.profile:
        torch.set_num_threads(1)
        some = data.epoch_order(np.arange(len(data)), 0, 0)[: 64 * options.batch_size]
        print(profile(data, some, options.batch_size))
        return 0
    print(table(data, options.batch_size, options.trained, options.cold))
    return 0


if __name__ == "__main__":
    sys.exit(main())
