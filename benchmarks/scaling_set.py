"""A particle set of any size at the real size of its files, whose content is cheap to make.

    python benchmarks/scaling_set.py --particles 1000000 -o /scratch/set

2,000 particles are simulated (hinge and occupied subunit, poses, CTFs); the set repeats them, each time with
other images out of 4,001 noise images, so that no two images are equal and latents spread as they do in a
real set. Its star file and float16 stacks have the size that N different particles would have.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cryodrgn_pipeline.io.atomic import replacing_directory
from cryodrgn_pipeline.io.mrc import MrcStackWriter
from cryodrgn_pipeline.simulate import phantom_of, signal_spectra
from cryodrgn_pipeline.simulation.particles import Settings, SimulatedParticles, draw_particles
from cryodrgn_pipeline.simulation.write import write_star

DISTINCT = 2000
NOISE_IMAGES = 4001  # has no divisor in common with DISTINCT: each pair of signal and noise comes once
STACKS = 10
SNR = 0.2
PIXEL_SIZE_A = {32: 6.0, 64: 3.0}
CHUNK = 250
STAR = "particles.star"


def write_set(folder: Path, particles: int, box_size_px: int = 64) -> None:
    """Write `particles.star` and ten stacks under `stacks/` into the folder, whole or not at all."""
    settings = Settings(
        box_size=box_size_px,
        particles=min(DISTINCT, particles),
        pixel_size_a=PIXEL_SIZE_A.get(box_size_px, 192 / box_size_px),
        snr=SNR,
    )
    distinct = draw_particles(settings)
    per_stack = -(-particles // STACKS)
    with replacing_directory(folder, ours=(STAR, "stacks")) as temporary:
        (temporary / "stacks").mkdir()
        _write_stacks(temporary, _signal(distinct, settings), particles, per_stack, settings.pixel_size_a)
        write_star(temporary / "distinct.star", distinct)
        _write_star(temporary / "distinct.star", temporary / STAR, particles, per_stack)
        (temporary / "distinct.star").unlink()


def stack_name(number: int) -> str:
    """Path of a stack beside the star file."""
    return f"stacks/{number:03d}.mrcs"


def _signal(distinct: SimulatedParticles, settings: Settings) -> NDArray[np.float32]:
    phantom, d = phantom_of(settings), settings.box_size
    parts = []
    for rows in np.array_split(np.arange(settings.particles), -(-settings.particles // CHUNK)):
        parts.append(torch.fft.irfft2(signal_spectra(distinct, rows, phantom, settings), s=(d, d)).numpy())
    images = np.concatenate(parts)
    return np.asarray(images * np.sqrt(settings.snr / images.var(axis=(1, 2)).mean()), dtype=np.float32)


def _write_stacks(
    folder: Path, signal: NDArray[np.float32], particles: int, per_stack: int, pixel_size_a: float
) -> None:
    d = signal.shape[-1]
    noise = np.random.default_rng(0).standard_normal((NOISE_IMAGES, d, d), dtype=np.float32)
    for number, first in enumerate(range(0, particles, per_stack)):
        last = min(first + per_stack, particles)
        path = folder / stack_name(number)
        with MrcStackWriter(
            path, n_images=last - first, box_size_px=d, voxel_size_a=pixel_size_a, dtype="float16"
        ) as stack:
            for start in range(first, last, CHUNK):
                images = np.arange(start, min(start + CHUNK, last))
                stack.append(signal[images % len(signal)] + noise[images % NOISE_IMAGES])


def _write_star(distinct: Path, path: Path, particles: int, per_stack: int) -> None:
    head, rows, image, film = [], [], 0, 0
    for line in distinct.read_text(encoding="utf-8").splitlines():
        words = line.split("\t")
        if len(words) > 10:
            rows.append(words)
            continue
        head.append(line)
        if line.startswith("_rlnImageName "):
            image = int(line.split("#")[1]) - 1
        if line.startswith("_rlnMicrographName "):
            film = int(line.split("#")[1]) - 1
    with path.open("w", encoding="utf-8") as out:
        out.write("\n".join(head).rstrip("\n") + "\n")
        for particle in range(particles):
            round_number, row = divmod(particle, len(rows))
            stack, index = divmod(particle, per_stack)
            words = list(rows[row])
            words[image] = f"{index + 1:06d}@{stack_name(stack)}"
            words[film] = f"micrographs/{round_number:04d}_{Path(words[film]).name}"
            out.write("\t".join(words) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--particles", type=int, required=True)
    parser.add_argument("--box-size", type=int, default=64, help="px")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    write_set(options.output, options.particles, options.box_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
