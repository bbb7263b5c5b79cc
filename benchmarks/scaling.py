"""Wall time and peak memory of every step against the number of particles, as one table with fitted growth.

    python benchmarks/scaling.py --folder /scratch/scaling

makes sets of 10,000, 100,000 and 1,000,000 particles of 64 px (scaling_set.py), takes each from its star file
to a report and exported particle files, every step as the command a user would give, and writes SCALING.md.
What was measured before in the folder is not measured again: the command goes on where it was stopped. The
largest set takes 25 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

BENCHMARKS = Path(__file__).resolve().parent
SIZES = (10_000, 100_000, 1_000_000)
LEARN_FROM = 10_000
LATENT_DIM = 8
SAMPLE_EVERY_S = 0.1
SHORT_S = 60
MOST_BYTES = 8 * 2**30
NOISE = 0.05  # relative, root mean square: repeated runs differ by more
N_LOG_N = 1.08  # what N log N fits as between 10,000 and 1,000,000, as a power of N


@dataclass(frozen=True, slots=True)
class Step:
    """A command of the chain: its name, its words, and what it writes (to tell its size)."""

    name: str
    words: tuple[str, ...]
    output: Path


@dataclass(frozen=True, slots=True)
class Measured:
    """What a step took. CPU seconds are those of all its threads; the peak is that of anonymous memory, of
    the process and its children together: files in the page cache do not count.
    """

    step: str
    particles: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    output_bytes: int
    threads: int


def chain(folder: Path, particles: int, box_size_px: int, learn_from: int) -> list[Step]:
    """The steps from nothing to exported files, in order."""
    verb = (sys.executable, "-m", "cryodrgn_pipeline")
    data, loader = str(BENCHMARKS / "scaling_set.py"), str(BENCHMARKS / "data_path.py")
    box = str(box_size_px)
    names = ("set", "import", "stack", "run", "all.star", "all.cs")
    at = {name: folder / name for name in names}
    path = {name: str(value) for name, value in at.items()}
    size = ("--particles", str(particles), "--box-size", box)
    star, page = str(at["set"] / "particles.star"), at["run"] / "report.html"
    train = ("--method", "subspace", "--latent-dim", str(LATENT_DIM), "--learn-from", str(learn_from))
    commands: list[tuple[str, tuple[str, ...], Path]] = [
        ("generate", (sys.executable, data, *size, "-o", path["set"]), at["set"]),
        ("import", (*verb, "import", star, "-o", path["import"]), at["import"]),
        (
            "preprocess",
            (
                *verb,
                "preprocess",
                path["import"],
                "--box-size",
                box,
                "--dtype",
                "float16",
                "-o",
                path["stack"],
            ),
            at["stack"],
        ),
        ("read an epoch", (sys.executable, loader, "--epoch", path["stack"]), at["stack"]),
        ("train", (*verb, "train", path["stack"], "-o", path["run"], *train), at["run"]),
        ("analyze", (*verb, "analyze", path["run"]), at["run"] / "analysis"),
        ("report", (*verb, "report", path["run"], "--import-dir", path["import"]), page),
        ("export star", (*verb, "export", path["import"], "-o", path["all.star"]), at["all.star"]),
        ("export cs", (*verb, "export", path["import"], "-o", path["all.cs"]), at["all.cs"]),
    ]
    return [Step(*command) for command in commands]


def measure(step: Step, particles: int, log: Path) -> Measured:
    """Run a step and watch it; its log stays in a file. Ends the program when the step fails."""
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(step.words, stdout=out, stderr=subprocess.STDOUT)
        peak, stopped = [0], threading.Event()

        def watch() -> None:
            while not stopped.wait(SAMPLE_EVERY_S):
                peak[0] = max(peak[0], anonymous_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        stopped.set()
        watcher.join()
    wall = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"{step.name} failed:\n{' '.join(step.words)}\n{log.read_text(encoding='utf-8')[-3000:]}")
    return Measured(
        step=step.name,
        particles=particles,
        wall_s=round(wall, 2),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 2),
        peak_bytes=peak[0],
        output_bytes=size_of(step.output),
        threads=len(os.sched_getaffinity(0)),
    )


def anonymous_bytes(process: int) -> int:
    """Memory of a process and its children that no file backs."""
    total, left = 0, [process]
    while left:
        task = Path(f"/proc/{left.pop()}")
        try:
            for line in (task / "status").read_text(encoding="utf-8").splitlines():
                if line.startswith("RssAnon"):
                    total += int(line.split()[1]) * 1024
            for thread in (task / "task").iterdir():
                left += map(int, (thread / "children").read_text(encoding="utf-8").split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while it was looked at
    return total


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


def compile_kernels(folder: Path, box_size_px: int) -> None:
    """Train on a few particles, unmeasured: the first training of an installation compiles its kernels."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for step in chain(folder, 300, box_size_px, 300):
        measure(step, 300, folder / "log.txt")
        if step.name == "train":
            break


def measured_file(step: Step, folder: Path) -> Path:
    """Where what a step took is kept."""
    return folder / "measured" / f"{step.name.replace(' ', '_')}.json"


def measured_or_read(step: Step, particles: int, folder: Path, repeats: int) -> Measured:
    """What a step took: from the folder's file if it was measured before, else measured now.

    A step of less than a minute is run `repeats` times and the run of least CPU time counts: what else the
    machine does at the time would else look like growth.
    """
    kept = measured_file(step, folder)
    if kept.is_file():
        return Measured(**json.loads(kept.read_text(encoding="utf-8")))
    kept.parent.mkdir(parents=True, exist_ok=True)
    makes = not step.output.exists()
    runs = [measure(step, particles, kept.with_suffix(".log"))]
    while runs[0].wall_s < SHORT_S and len(runs) < repeats:
        if makes:  # what is there and whole would not be made again
            shutil.rmtree(step.output) if step.output.is_dir() else step.output.unlink()
        runs.append(measure(step, particles, kept.with_suffix(".log")))
    result = min(runs, key=lambda one: one.cpu_s)
    temporary = kept.with_suffix(".part")
    temporary.write_text(json.dumps(asdict(result)), encoding="utf-8")
    temporary.replace(kept)
    print(
        f"{particles} {step.name}: {result.wall_s:.1f} s, CPU {result.cpu_s:.1f} s, "
        f"{result.peak_bytes / 2**30:.2f} GiB",
        flush=True,
    )
    return result


def growth(particles: list[int], values: list[float]) -> tuple[float, float, float]:
    """The power p with which a + b Nᵖ, a and b not negative, fits values best by relative error.

    The constant is what a step takes for itself, start-up above all; without it short runs would hide growth.
    The second and third number are the lowest and highest p that fit within NOISE: three sizes do not fix it
    any better.
    """
    from scipy.optimize import nnls

    n, v = np.array(particles, dtype=float), np.array(values, dtype=float)
    if not (v > 0).all():
        raise ValueError(f"growth of {values}: positive numbers expected")
    powers, misfits = np.arange(0, 2.501, 0.01), []
    for power in powers:
        columns = np.stack([1 / v, (n / n.max()) ** power / v], axis=1)
        misfits.append(nnls(columns, np.ones(len(v)))[1] / math.sqrt(len(v)))
    best = int(np.argmin(np.round(misfits, 9)))
    within = powers[np.array(misfits) <= max(NOISE, misfits[best])]
    return float(powers[best]), float(within[0]), float(within[-1])


def table(results: list[Measured]) -> str:
    """Steps down, sizes across: wall and CPU time, peak memory, what was written, and fitted powers of N."""
    sizes = sorted({one.particles for one in results})
    names = list(dict.fromkeys(one.step for one in results))
    by = {(one.step, one.particles): one for one in results}
    lines = [
        "| step | " + " | ".join(f"{n:,}" for n in sizes) + " | time grows as | memory grows as |",
        "|---" * (len(sizes) + 3) + "|",
    ]
    for name in names:
        rows = [by[name, n] for n in sizes if (name, n) in by]
        cells = [_cell(by.get((name, n))) for n in sizes]
        powers = ["", ""]
        if len(rows) >= 3:
            counts = [one.particles for one in rows]
            measures: list[Callable[[Measured], float]] = [lambda m: m.cpu_s, lambda m: m.peak_bytes]
            powers = [_power(growth(counts, [of(one) for one in rows])) for of in measures]
        lines.append(f"| {name} | {' | '.join(cells)} | {' | '.join(powers)} |")
    return "\n".join(lines)


def _power(fitted: tuple[float, float, float]) -> str:
    best, lowest, highest = fitted
    return f"N^{best:.2f} ({lowest:.2f}–{highest:.2f})"


def _cell(one: Measured | None) -> str:
    if one is None:
        return ""
    return f"{_time(one.wall_s)} ({_time(one.cpu_s)}), {one.peak_bytes / 2**30:.2f} GiB"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def page(results: list[Measured], box_size_px: int, learn_from: int) -> str:
    """SCALING.md."""
    most = max(one.particles for one in results)
    highest = max(results, key=lambda one: one.peak_bytes)
    threads = ", ".join(str(n) for n in sorted({one.threads for one in results}))
    files = ", ".join(
        f"{one.step} {one.output_bytes / 1e9:.2f} GB"
        for one in results
        if one.particles == most and one.step != "read an epoch"
    )
    before = [one for one in results if one.step == highest.step and one.particles < highest.particles]
    slope = ""
    if before:
        nearest = max(before, key=lambda one: one.particles)
        each = (highest.peak_bytes - nearest.peak_bytes) / (highest.particles - nearest.particles)
        slope = (
            f"; from {nearest.particles:,} to {highest.particles:,} particles it grew by {each / 1e3:.1f} KB "
            "a particle (below, what does not depend on N may hide it)"
        )
    limit = "below" if highest.peak_bytes < MOST_BYTES else "ABOVE"
    paragraphs = [
        "# Scaling, measured",
        f"Made by `python benchmarks/scaling.py`. Particles of {box_size_px} px, float16 stacks. Content is "
        "cheap: 2,000 distinct simulated particles repeat, each time with other noise out of 4,001 images, "
        "so that each image differs; the files have the size that as many different particles would have. "
        f"`train` is `--method subspace --latent-dim {LATENT_DIM} --learn-from {learn_from}`: at most "
        f"{learn_from:,} particles teach the subspace and its maps, and all are placed in one pass. Kernels "
        "were compiled before, as they are once in an installation. *read an epoch* is the data path of "
        "network training alone, from the disk to batches, in random order.",
        f"Machine: {_cpu()}, {psutil.virtual_memory().total / 2**30:.0f} GiB of memory, each step on "
        f"{threads} core(s). Others used the machine too: wall times are upper limits, and CPU times are "
        "longer than on an idle one. Wall time (CPU time of all threads), and the peak of anonymous memory "
        "of the process and its children, which leaves out files that the system keeps in its cache.",
        table(results),
        f"Steps of less than {SHORT_S} s: the best of three runs. Growth: the power p with which a + b Nᵖ "
        "fits best (CPU time, peak memory), a being what a step takes whatever N is; in brackets all p that "
        f"fit within {100 * NOISE:.0f} %. N log N would fit as "
        f"{N_LOG_N}. The highest peak is that of {highest.step} with "
        f"{highest.particles:,} particles, {highest.peak_bytes / 2**30:.2f} GiB, {limit} the limit of "
        f"{MOST_BYTES / 2**30:.0f} GiB{slope}.",
        f"What {most:,} particles leave on the disk: {files}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown CPU"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where sets and results go")
    parser.add_argument("--particles", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--box-size", type=int, default=64, help="px")
    parser.add_argument("--learn-from", type=int, default=LEARN_FROM)
    parser.add_argument("--repeats", type=int, default=3, help="runs of a step of less than a minute")
    parser.add_argument("--steps", nargs="+", help="only these steps; no page is written")
    parser.add_argument("--page", action="store_true", help="write the page of what is measured, no more")
    parser.add_argument("-o", "--output", type=Path, default=BENCHMARKS / "SCALING.md")
    options = parser.parse_args()
    if not options.page:
        compile_kernels(options.folder / "compiled", options.box_size)
    results = []
    for particles in options.particles:
        folder = options.folder / str(particles)
        for step in chain(folder, particles, options.box_size, options.learn_from):
            wanted = options.steps is None or step.name in options.steps
            if wanted and (not options.page or measured_file(step, folder).is_file()):
                results.append(measured_or_read(step, particles, folder, options.repeats))
    if options.steps is None:
        options.output.write_text(page(results, options.box_size, options.learn_from), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
