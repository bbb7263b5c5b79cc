"""How fast `preprocess` is, against reading the same images and transforming them once.

    python benchmarks/preprocess_speed.py --folder /scratch/speed --particles 4000

Makes a float32 set, then measures (a) reading every image in file order and one real 2-D FFT of each, with
the same FFT library and threads, and (b) `preprocess` to each box, alternating and taking the median of some
rounds: with the files in the page cache, or with --cold from the disk. CPU time is what counts on a machine
that others use too. With --memory it compares the peak resident memory at N and 4 N particles.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


@dataclass(frozen=True)
class Seconds:
    """What something took on the clock, and on all processors together."""

    wall: float
    cpu: float


def measured(call: Callable[[], None]) -> Seconds:
    """Run `call` and time it."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def forget(folder: Path) -> None:
    """Put a set's stacks out of the page cache."""
    for path in folder.glob("*.mrcs"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def middle(rounds: list[Seconds]) -> Seconds:
    """The median wall and processor time: the least would favour short runs on a machine others use too."""
    return Seconds(median(one.wall for one in rounds), median(one.cpu for one in rounds))


def make_set(folder: Path, n: int, box: int, stacks: int) -> Path:
    """An import folder of `n` noise images in `stacks` files, rows in random order."""
    from images_on_disk import import_folder, particle_set

    from cryodrgn_pipeline.io.mrc import MrcStackWriter

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths, stack, index = [], [], []
    for number in range(stacks):
        path = folder / f"{number}.mrcs"
        count = n // stacks
        with MrcStackWriter(path, n_images=count, box_size_px=box, voxel_size_a=1.0) as writer:
            for start in range(0, count, 100):
                size = min(100, count - start)
                writer.append(random.standard_normal((size, box, box), dtype=np.float32))
        paths.append(path)
        stack += [number] * count
        index += list(range(count))
    particles = particle_set(paths, stack, index, box_size_px=box, pixel_size_a=1.0)
    return import_folder(folder / "imported", particles)


def read_and_transform(imported: Path, threads: int) -> None:
    """Read all images once, in file order, and take one rfft2 of each."""
    import torch

    from cryodrgn_pipeline.io.mrc import MrcImages
    from cryodrgn_pipeline.io.tables import read_particles

    stacks = [MrcImages(path) for path in read_particles(imported).images.stack_paths]
    parts = [(stack, start) for stack in stacks for start in range(0, len(stack), 16)]
    buffers = threading.local()

    def work(part: tuple[MrcImages, int]) -> None:
        stack, start = part
        if not hasattr(buffers, "images"):
            torch.set_num_threads(1)
            buffers.images = np.empty((16, stack.header.ny, stack.header.nx), dtype=np.float32)
        images = buffers.images[: len(stack) - start]
        stack.read_into(np.arange(start, start + len(images)), images)
        torch.fft.rfft2(torch.from_numpy(images))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, parts))


def run_preprocess(imported: Path, output: Path, box: int, dtype: str, threads: int) -> None:
    """One whole `preprocess` call, files on disk included."""
    from cryodrgn_pipeline.preprocess import PreprocessSettings, preprocess

    preprocess(imported, output, PreprocessSettings(box_size_px=box, dtype=dtype), threads=threads)


def peak_memory_mb(imported: Path, output: Path, box: int) -> float:
    """Peak resident memory of `preprocess` in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, __file__, "--worker", str(imported), str(output), str(box)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("speed"))
    parser.add_argument("--particles", type=int, default=4000)
    parser.add_argument("--box-size", type=int, default=256)
    parser.add_argument("--to", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--worker", nargs=3)
    options = parser.parse_args()
    if options.worker:
        imported, output, box = options.worker
        run_preprocess(Path(imported), Path(output), int(box), "float32", options.threads)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    folder, n = options.folder, options.particles
    imported = make_set(folder / "n", n, options.box_size, 8)
    cases = [(to, dtype) for to in options.to for dtype in ("float32", "float16")]
    floors: list[Seconds] = []
    taken: dict[tuple[int, str], list[Seconds]] = {case: [] for case in cases}
    os.sync()
    for _ in range(options.rounds):
        if options.cold:
            forget(folder / "n")
        floors.append(measured(lambda: read_and_transform(imported, options.threads)))
        for case in cases:
            call = partial(run_preprocess, imported, folder / "stack", *case, options.threads)
            shutil.rmtree(folder / "stack", ignore_errors=True)  # else it would be found and kept
            if options.cold:
                forget(folder / "n")
            taken[case].append(measured(call))
    floor = middle(floors)
    print(
        f"{n} images of {options.box_size} px {'from the disk' if options.cold else 'in the page cache'}, "
        f"{options.threads} threads, median of {options.rounds} rounds"
    )
    print(f"load average {os.getloadavg()[0]:.1f}")
    print("| | wall s | CPU s | wall ratio | CPU ratio |\n|---|---|---|---|---|")
    print(f"| read + rfft2 of every image | {floor.wall:.2f} | {floor.cpu:.2f} | 1 | 1 |")
    for (to, dtype), rounds in taken.items():
        one = middle(rounds)
        ratios = f"{one.wall / floor.wall:.2f} | {one.cpu / floor.cpu:.2f}"
        print(f"| preprocess to {to} px, {dtype} | {one.wall:.2f} | {one.cpu:.2f} | {ratios} |")
    if options.memory:
        larger = make_set(folder / "4n", 4 * n, options.box_size, 8)
        for count, source in ((n, imported), (4 * n, larger)):
            peak = peak_memory_mb(source, folder / "stack", options.to[0])
            print(f"peak memory with {count} images: {peak:.0f} MB")
    shutil.rmtree(folder / "stack", ignore_errors=True)


if __name__ == "__main__":
    main()
