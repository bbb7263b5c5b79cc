"""Run cryoDRGN 4.3.1 and cryodrgn-pipeline on the same files and print, side by side, where they agree.

    python benchmarks/compare_cryodrgn.py --particles 10000

Poses, CTF, images, maps and the time per image of the backprojection. cryoDRGN is installed into a virtual
environment of its own (`--venv`, made when missing). Its command line is run as a user would; its installed
functions are called in its own environment by peer_functions.py. Training: compare_training.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer import HERE, Bench, Check, table

from cryodrgn_pipeline.fourier.ctf import ctf
from cryodrgn_pipeline.fourier.transforms import hartley, symmetrise
from cryodrgn_pipeline.half_sets import half_sets
from cryodrgn_pipeline.io.mrc import read_volume
from cryodrgn_pipeline.io.tables import read_particles
from cryodrgn_pipeline.reconstruct import accumulate_stack, grid_shells
from cryodrgn_pipeline.stack import Stack

SAMPLE = 32


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Root-mean-square difference over the root mean square of theirs."""
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


def disc(side: int) -> np.ndarray:
    """Frequencies 0 < |k| < D/2 of a (D+1)² centred transform."""
    k = np.arange(side) - side // 2
    radius = np.hypot(k[:, None], k[None])
    return (radius > 0) & (radius < side // 2)


def compare_functions(bench: Bench, star: Path, box: int) -> list[Check]:
    """Poses, shifts, CTF and images, ours from import and preprocess, theirs from their own functions."""
    work = bench.work
    particles = read_particles(work / "import" / "particles.parquet")
    rows = np.linspace(0, len(particles) - 1, SAMPLE).astype(int)
    command: list[str | Path] = [bench.bin / "python", HERE / "peer_functions.py", star]
    command += ["--poses", work / "pose.pkl", "--ctf", work / "ctf.pkl", "--out", work / "peer.npz", "--rows"]
    bench.run("peer functions", [*command, *(str(row) for row in rows)])
    peer = np.load(work / "peer.npz")
    poses = particles.require_poses("comparison")
    shift_px = poses.shift_a / particles.optics.pixel_size_a[:, None]
    table = np.stack(
        [
            particles.optics.pixel_size_a,
            particles.ctf.defocus_u_a,
            particles.ctf.defocus_v_a,
            particles.ctf.defocus_angle_deg,
            particles.optics.voltage_kv,
            particles.optics.cs_mm,
            particles.optics.amplitude_contrast,
            particles.ctf.phase_shift_deg,
        ],
        axis=1,
    )
    scale = np.maximum(np.abs(peer["ctf_table"]), 1e-3)
    inside = disc(box + 1)
    plain, windowed = (Stack.open(work / name).read(rows) for name in ("stack_plain", "stack"))
    raw = raw_images(particles, star.parent, rows)
    ours = symmetrise(hartley(torch.from_numpy(plain).double())).numpy()
    transfer = our_ctf(table[rows], box)
    same_sign = np.sign((transfer * peer["ctf"])[:, inside].sum())
    own_hartley = hartley(torch.from_numpy(raw).double()).numpy()
    return [
        Check("rotations, largest difference", np.abs(poses.rotation - peer["rotation"]).max(), 2e-6),
        Check("shifts, largest difference (px)", np.abs(shift_px - peer["translation_px"]).max(), 1e-4),
        Check(
            "CTF parameters, largest relative difference",
            np.abs(table / scale - peer["ctf_table"] / scale).max(),
            1e-5,
        ),
        Check(
            f"CTF, largest difference (sign {same_sign:+.0f})",
            np.abs(same_sign * transfer - peer["ctf"])[:, inside].max(),
            2e-3,
        ),
        Check(
            "Hartley transform of raw images, relative",
            relative_difference(own_hartley, peer["hartley"]),
            1e-5,
        ),
        Check(
            "centred images (their translated Hartley), relative",
            relative_difference(ours[:, inside], peer["centred"][:, inside]),
            1e-5,
        ),
        Check(
            "windowed images, standard deviation, ours over theirs less 1",
            abs(windowed.std() / window_of(peer["windowed"]) - 1),
            0.02,
        ),
    ]


def window_of(hartley_side: np.ndarray) -> float:
    """Standard deviation in real space of images given by their (D+1)² Hartley transforms."""
    inner = hartley_side[:, :-1, :-1].astype(np.float64).copy()
    d = inner.shape[-1]
    inner[:, d // 2, d // 2] = 0
    return float(np.sqrt(np.mean(inner**2)) / d)


def raw_images(particles: Any, root: Path, rows: np.ndarray) -> np.ndarray:
    """The stored images of some rows, as they are."""
    from cryodrgn_pipeline.io.mrc import MrcImages

    chosen = []
    for row in rows:
        path = Path(particles.images.stack_paths[particles.images.stack[row]])
        with MrcImages(path if path.is_absolute() else root / path) as images:
            chosen.append(images.read(particles.images.index[row : row + 1])[0])
    return np.stack(chosen)


def our_ctf(table: np.ndarray, box: int) -> np.ndarray:
    """Our CTF on the (D+1)² lattice of some rows of a CTF table."""
    k = torch.arange(box + 1, dtype=torch.float64) - box // 2
    columns = torch.from_numpy(table)
    ky, kx = (plane.reshape(1, -1) / (box * columns[:, :1]) for plane in torch.meshgrid(k, k, indexing="ij"))
    names = (
        "defocus_u_a",
        "defocus_v_a",
        "defocus_angle_deg",
        "voltage_kv",
        "cs_mm",
        "amplitude_contrast",
        "phase_shift_deg",
    )
    values = {name: columns[:, place + 1] for place, name in enumerate(names)}
    return ctf(ky, kx, **values).reshape(-1, box + 1, box + 1).numpy()


def compare_maps(bench: Bench, truth: Path | None) -> list[Check]:
    """Correlation of the backprojected maps inside the particle's mask.

    cryoDRGN divides by the weight plus one mean weight in every shell; our consensus by the weight plus what
    the FSC of the halves says. Two maps agree where they must if the same division makes the same map, so our
    sums are divided its way; the map that `consensus` writes stands beside it.
    """
    ours, mask, theirs = (
        read_volume(bench.work / path)[0]
        for path in ("consensus/map.mrc", "consensus/mask.mrc", "peer_map/backproject.mrc")
    )
    same = divided_their_way(Stack.open(bench.work / "stack"))
    checks = [
        Check(
            "backprojected maps, same filter, correlation in the mask",
            correlation(same, theirs, mask),
            0.99,
            False,
        ),
        Check("the same in the whole ball, noise and all", correlation(same, theirs), 0.99, False),
        Check("with the filter of our consensus, in the mask", correlation(ours, theirs, mask), 0.98, False),
    ]
    if truth is not None:
        true, _ = read_volume(truth)
        scores = [correlation(each, true, mask) for each in (ours, theirs)]
        checks.append(
            Check("map against the truth in the mask, ours over theirs", scores[0] / scores[1], 1.0, False)
        )
    return checks


def divided_their_way(stack: Stack) -> np.ndarray:
    """Our sums Σcy over Σc² plus its mean over the ball that cryoDRGN's lattice holds."""
    d = stack.box_size_px
    sums = accumulate_stack(stack, np.arange(len(stack)), half_sets(stack.particles, 0)[0])
    weight = sums.weight([0, 1])
    radius = grid_shells(weight.shape[0])
    mean = weight[radius < d / 2].mean() * (torch.pi / 6)  # its lattice is a cube, empty beyond the ball
    return sums.map([0, 1], mean.double().expand(d // 2 + 1)).numpy()


def compare_backprojection_speed(bench: Bench, star: Path, rounds: int) -> Check:
    """Backprojection alone, each program's own clock, in turns; the best of some rounds."""
    theirs, ours = [], []
    for number in range(rounds):
        said = bench.run(
            f"peer backproject_voxel, round {number}", peer_backprojection(bench, star, "speed_map")
        )
        theirs.append(1e3 * float(re.findall(r"\(([\d.]+)s per image\)", said)[0]))
        out = bench.work / "speed_consensus"
        command = bench.ours("consensus", bench.work / "stack", "--check", "off", "-o", out)
        bench.run(f"consensus, round {number}", command)
        ours.append(json.loads((out / "consensus.json").read_text())["ms_per_image"])
    what = f"backprojection, times faster ({min(theirs):.2f} → {min(ours):.2f} ms an image)"
    return Check(what, min(theirs) / min(ours), 5.0, at_most=False)


def peer_backprojection(bench: Bench, star: Path, name: str) -> list[str | Path]:
    # cryoDRGN's default inverts the data: with its CTF of the other sign that is right for light on dark
    tables = ["--poses", bench.work / "pose.pkl", "--ctf", bench.work / "ctf.pkl"]
    return bench.peer("backproject_voxel", star, "--datadir", star.parent, *tables, "-o", bench.work / name)


def correlation(first: np.ndarray, second: np.ndarray, mask: np.ndarray | float = 1.0) -> float:
    """Pearson correlation of two masked maps within the ball of radius D/2."""
    k = np.arange(first.shape[0]) - first.shape[0] // 2
    ball = k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2 < (first.shape[0] / 2) ** 2
    return float(np.corrcoef((first * mask)[ball], (second * mask)[ball])[0, 1])


def prepare(bench: Bench, star: Path, box: int, reference: Path | None) -> None:
    """Both programs from the same files to poses, CTFs, images and a map."""
    work = bench.work
    bench.run("peer parse_pose_star", bench.peer("parse_pose_star", star, "-o", work / "pose.pkl"))
    bench.run("peer parse_ctf_star", bench.peer("parse_ctf_star", star, "-o", work / "ctf.pkl"))
    bench.run("peer backproject_voxel", peer_backprojection(bench, star, "peer_map"))
    bench.run("import", bench.ours("import", star, "-o", work / "import"))
    size = ["--box-size", str(box)]
    bench.run("preprocess", bench.ours("preprocess", work / "import", *size, "-o", work / "stack"))
    bench.run(
        "preprocess, no window",
        bench.ours("preprocess", work / "import", *size, "--no-window", "-o", work / "stack_plain"),
    )
    with_reference = ["--reference", reference] if reference is not None else []
    bench.run("consensus", bench.ours("consensus", work / "stack", *with_reference, "-o", work / "consensus"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--venv", type=Path, default=HERE / "work" / "cryodrgn_venv", help="cryoDRGN's environment"
    )
    parser.add_argument("--work", type=Path, default=HERE / "work" / "compare", help="scratch folder")
    parser.add_argument("--star", type=Path, help="your own particles; default: a simulated set")
    parser.add_argument("--particles", type=int, default=4000)
    parser.add_argument("--box-size", type=int, default=64)
    parser.add_argument("--pixel-size", type=float, default=3.0)
    parser.add_argument("--snr", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speed-rounds", type=int, default=2, help="backprojections timed of each program")
    options = parser.parse_args()

    bench = Bench(options.venv, options.work, options.threads)
    header = bench.machine()
    truth = None
    if options.star is None:
        made = options.work / "simulated"
        size = ["--particles", options.particles, "--box-size", options.box_size]
        size += ["--pixel-size", options.pixel_size, "--snr", options.snr]
        bench.run("simulate", bench.ours("simulate", *map(str, size), "-o", made))
        options.star, truth = made / "particles.star", made / "consensus.mrc"
    prepare(bench, options.star, options.box_size, truth)
    images = len(read_particles(options.work / "import" / "particles.parquet"))
    steps = ["| step | wall s | CPU s | CPU ms an image |", "|---|---|---|---|"]
    for name, (wall, cpu) in bench.seconds.items():
        steps.append(f"| {name} | {wall:.1f} | {cpu:.1f} | {1e3 * cpu / images:.1f} |")
    checks = compare_functions(bench, options.star, options.box_size) + compare_maps(bench, truth)
    checks.append(compare_backprojection_speed(bench, options.star, options.speed_rounds))
    command = " ".join(["python", *sys.argv])
    print("\n\n".join([header, f"`{command}`", table(checks), "\n".join(steps)]))
    return 0 if all(check.good for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
