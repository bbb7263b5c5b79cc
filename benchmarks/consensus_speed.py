"""Time of `consensus` per image, and beside it cryoDRGN's `backproject_voxel` on the same particles.

    python benchmarks/consensus_speed.py work --boxes 64 128 --peer /path/to/venv/with/cryodrgn

Whole commands are timed on a small and on a large set; the difference over the difference in images is the
time per image, free of start-up. Each program does what its user gets: half maps and FSC included.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from cryodrgn_pipeline.io.mrc import read_volume

PIXEL_SIZE_A = {64: 3.0, 128: 1.5}


def run(command: list[str], threads: int) -> tuple[float, float]:
    """Wall and CPU seconds of a command."""
    environment = dict(os.environ)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment.update({name: str(threads) for name in names})
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def prepare(folder: Path, box: int, particles: int, threads: int) -> None:
    """Simulate, import and preprocess one set; kept when it is there."""
    if (folder / "stack" / "stack.json").exists():
        return
    ours = [sys.executable, "-m", "cryodrgn_pipeline"]
    pixel = str(PIXEL_SIZE_A.get(box, 192 / box))
    options = ["--particles", str(particles), "--box-size", str(box), "--pixel-size", pixel, "--snr", "0.3"]
    run([*ours, "simulate", *options, "--motion", "none", "-o", str(folder / "sim")], threads)
    run([*ours, "import", str(folder / "sim/particles.star"), "-o", str(folder / "import")], threads)
    stack = ["preprocess", str(folder / "import"), "--box-size", str(box), "-o", str(folder / "stack")]
    run([*ours, *stack], threads)


def our_times(folder: Path, threads: int) -> tuple[float, float]:
    command = [
        sys.executable,
        "-m",
        "cryodrgn_pipeline",
        "consensus",
        str(folder / "stack"),
        "--check",
        "off",
    ]
    return run([*command, "-o", str(folder / "consensus")], threads)


def peer_times(folder: Path, peer: Path, box: int, threads: int) -> tuple[float, float]:
    star, pixel = str(folder / "sim/particles.star"), str(PIXEL_SIZE_A.get(box, 192 / box))
    program = str(peer / "bin/cryodrgn")
    poses, ctf = str(folder / "poses.pkl"), str(folder / "ctf.pkl")
    if not Path(ctf).exists():
        run([program, "parse_pose_star", star, "-o", poses, "-D", str(box), "--Apix", pixel], threads)
        run([program, "parse_ctf_star", star, "-o", ctf, "-D", str(box), "--Apix", pixel], threads)
    command = [program, "backproject_voxel", star, "--datadir", str(folder / "sim"), "--poses", poses]
    return run([*command, "--ctf", ctf, "-o", str(folder / "peer")], threads)


def correlation(folder: Path) -> float:
    """Correlation of the two programs' maps, as written, within the mask that `consensus` found."""
    ours, theirs, mask = (
        read_volume(folder / name)[0]
        for name in ("consensus/map.mrc", "peer/backproject.mrc", "consensus/mask.mrc")
    )
    return float(np.corrcoef((ours * mask).ravel(), (theirs * mask).ravel())[0, 1])


def per_image(small: tuple[float, float], large: tuple[float, float], count: int) -> tuple[float, float]:
    """Milliseconds per image, wall and CPU, from the times of two sets that differ by `count` images."""
    return 1e3 * (large[0] - small[0]) / count, 1e3 * (large[1] - small[1]) / count


def main() -> None:
    """Print one table row per box."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--boxes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--small", type=int, default=500)
    parser.add_argument("--large", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", type=Path, help="virtual environment with cryodrgn 4.3.1")
    options = parser.parse_args()
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f}; ms per image, wall (CPU)")
    for box in options.boxes:
        folders = {n: options.work / f"{box}_{n}" for n in (options.small, options.large)}
        for particles, folder in folders.items():
            prepare(folder, box, particles, options.threads)
        small, large = (folders[n] for n in (options.small, options.large))
        our_times(small, options.threads)  # compiles the kernels when run for the first time

        count = options.large - options.small
        ours = per_image(our_times(small, options.threads), our_times(large, options.threads), count)
        line = f"{box} px: consensus {ours[0]:.2f} ({ours[1]:.2f})"
        if options.peer is not None:
            times = [peer_times(folder, options.peer, box, options.threads) for folder in (small, large)]
            theirs = per_image(times[0], times[1], count)
            line += f", backproject_voxel {theirs[0]:.2f} ({theirs[1]:.2f})"
            line += f", ratio {theirs[0] / ours[0]:.1f} ({theirs[1] / ours[1]:.1f})"
            line += f", map correlation in the mask {correlation(large):.4f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
