"""Run cryoDRGN 4.3.1 and cryodrgn-pipeline on the same files and print, side by side, where they agree.

    python benchmarks/compare_cryodrgn.py                    # poses, CTF, images, maps; time per image
    python benchmarks/compare_cryodrgn.py --train-rounds 2   # and the speed of training, in turns
    python benchmarks/compare_cryodrgn.py --score-epochs 20  # and latents after equal epochs

cryoDRGN is installed into a virtual environment of its own (`--venv`, made when missing). Its command line is
run as a user would; its installed functions are called in its own environment by peer_functions.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from cryodrgn_pipeline import __version__
from cryodrgn_pipeline.fourier.ctf import ctf
from cryodrgn_pipeline.fourier.transforms import hartley, symmetrise
from cryodrgn_pipeline.io.mrc import read_volume
from cryodrgn_pipeline.io.tables import read_particles
from cryodrgn_pipeline.stack import Stack

HERE = Path(__file__).resolve().parent
PEER = "cryodrgn==4.3.1"
PEER_TORCH = "torch==2.13.0"
SAMPLE = 32


@dataclass(frozen=True)
class Check:
    """One number, the bound it must keep, and whether smaller or larger is right."""

    what: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def good(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def row(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return (
            f"| {self.what} | {self.value:.3g} | {sign} {self.bound:g} | {'pass' if self.good else 'FAIL'} |"
        )


class Bench:
    """Where things lie, and how commands are run and timed."""

    def __init__(self, venv: Path, work: Path, threads: int) -> None:
        self.bin, self.work = venv / "bin", work
        self.seconds: dict[str, tuple[float, float]] = {}
        self.environment = os.environ | {
            name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        }

    def run(self, name: str, command: list[str | Path]) -> str:
        """Run one command, remember its wall and CPU seconds, return what it printed."""
        print(f"[{name}] {' '.join(map(str, command))}", file=sys.stderr, flush=True)
        before, started = os.times(), time.monotonic()
        done = subprocess.run(
            [str(word) for word in command], env=self.environment, capture_output=True, text=True, check=False
        )
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        self.seconds[name] = (time.monotonic() - started, cpu)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
        return done.stdout + done.stderr

    def peer(self, *words: str | Path) -> list[str | Path]:
        return [self.bin / "cryodrgn", *words]

    def ours(self, *words: str | Path) -> list[str | Path]:
        return [sys.executable, "-m", "cryodrgn_pipeline", *words]


def install_peer(venv: Path) -> None:
    """Make cryoDRGN's environment unless it is there."""
    if (venv / "bin" / "cryodrgn").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, PEER_TORCH, "--index-url", "https://download.pytorch.org/whl/cpu"], check=False)
    subprocess.run([*pip, PEER_TORCH, PEER], check=True)


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
    """Correlation of the backprojected maps inside the particle's mask, where noise does not decide it.

    Outside the particle there is noise alone, which cryoDRGN's uncorrected trilinear insertion damps towards
    the corners; the whole-box number is shown for completeness.
    """
    ours, _ = read_volume(bench.work / "consensus" / "map.mrc")
    mask, _ = read_volume(bench.work / "consensus" / "mask.mrc")
    theirs, _ = read_volume(bench.work / "peer_map" / "backproject.mrc")
    inside, equal = correlation(ours * mask, theirs * mask), equalised(ours, theirs)
    checks = [
        Check("backprojected maps, correlation in the mask", inside, 0.99, at_most=False),
        Check("the same with equal shell amplitudes", correlation(equal * mask, theirs * mask), 0.99, False),
        Check("the same in the whole ball, noise and all", correlation(ours, theirs), 0.9, at_most=False),
    ]
    if truth is not None:
        true, _ = read_volume(truth)
        scores = [correlation(each * mask, true * mask) for each in (ours, theirs)]
        checks.append(Check("map against the truth in the mask, ours", scores[0], scores[1] - 0.005, False))
    return checks


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


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation within the ball of radius D/2."""
    k = np.arange(first.shape[0]) - first.shape[0] // 2
    ball = k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2 < (first.shape[0] / 2) ** 2
    return float(np.corrcoef(first[ball], second[ball])[0, 1])


def equalised(volume: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The map with the radial amplitudes of another one: filters differ by choice, structure must not."""
    d = volume.shape[0]
    k = np.fft.fftfreq(d, 1 / d)
    shell = np.round(np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2)).astype(int)
    spectra = [np.fft.fftn(each) for each in (volume, like)]
    power = [np.bincount(shell.ravel(), np.abs(each).ravel() ** 2) for each in spectra]
    gain = np.sqrt(np.divide(power[1], power[0], out=np.zeros_like(power[0]), where=power[0] > 0))
    return np.fft.ifftn(spectra[0] * gain[shell]).real


def epoch_times(
    bench: Bench, name: str, command: list[str | Path], images: int, mark: str
) -> tuple[float, float]:
    """Wall and CPU milliseconds per image and epoch, from the second epoch on."""
    print(f"[{name}] {' '.join(map(str, command))}", file=sys.stderr, flush=True)
    marks: list[tuple[float, float]] = []
    with subprocess.Popen(
        [str(word) for word in command],
        env=bench.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        watched, lines = psutil.Process(process.pid), []
        for line in process.stdout or ():
            lines.append(line)
            if re.search(mark, line):
                spent = watched.cpu_times()
                marks.append((time.monotonic(), spent.user + spent.system))
    if process.returncode or len(marks) < 2:
        raise SystemExit(f"{name} failed ({len(marks)} epochs seen):\n{''.join(lines)}")
    (wall, cpu), (wall_end, cpu_end) = marks[0], marks[-1]
    epochs = len(marks) - 1
    return 1e3 * (wall_end - wall) / images / epochs, 1e3 * (cpu_end - cpu) / images / epochs


PEER_EPOCH, OUR_EPOCH = r"=> Epoch: \d+ Average", r"epoch \d+ of \d+: reconstruction"


def peer_training(bench: Bench, star: Path, out: Path, epochs: int, width: int) -> list[str | Path]:
    return bench.peer(
        "train_vae",
        star,
        "--datadir",
        star.parent,
        "--poses",
        bench.work / "pose.pkl",
        "--ctf",
        bench.work / "ctf.pkl",
        "--zdim",
        "8",
        "--enc-dim",
        str(width),
        "--dec-dim",
        str(width),
        "-n",
        str(epochs),
        "--no-analysis",
        "--seed",
        "0",
        "-o",
        out,
    )


def our_training(
    bench: Bench, out: Path, epochs: int, width: int, fraction: float, threads: int
) -> list[str | Path]:
    return bench.ours(
        "train",
        bench.work / "stack",
        "--latent-dim",
        "8",
        "--encoder-width",
        str(width),
        "--decoder-width",
        str(width),
        "--epochs",
        str(epochs),
        "--coordinate-fraction",
        str(fraction),
        "--held-out-fraction",
        "0",
        "--threads",
        str(threads),
        "--device",
        "cpu",
        "--in-memory",
        "-o",
        out,
    )


def compare_training(bench: Bench, star: Path, images: int, options: argparse.Namespace) -> list[str]:
    """Milliseconds per image and epoch, alternating the programs so that both meet the same machine."""
    names = {"cryoDRGN 4.3.1": None, "ours": 1.0} | {
        f"ours, {f:g} of the points": f for f in options.fractions
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(options.train_rounds):
        for name, fraction in names.items():
            out = bench.work / "speed" / f"{name.replace(' ', '_').replace(',', '')}_{number}"
            command, mark = (
                (peer_training(bench, star, out, options.epochs, options.width), PEER_EPOCH)
                if fraction is None
                else (
                    our_training(bench, out, options.epochs, options.width, fraction, options.threads),
                    OUR_EPOCH,
                )
            )
            measured[name].append(epoch_times(bench, name, command, images, mark))
    best = {name: np.min(values, axis=0) for name, values in measured.items()}
    base = best["cryoDRGN 4.3.1"]
    lines = ["| training | ms wall | ms CPU | times faster (wall) | (CPU) |", "|---|---|---|---|---|"]
    for name, (wall, cpu) in best.items():
        lines.append(f"| {name} | {wall:.1f} | {cpu:.1f} | {base[0] / wall:.2f} | {base[1] / cpu:.2f} |")
    return lines


def compare_scores(bench: Bench, star: Path, options: argparse.Namespace) -> list[str]:
    """20-NN R² of the true coordinates after equal epochs."""
    from cryodrgn_pipeline.evaluate import latent_r2, read_truth

    truth = read_truth(star.parent)
    out = bench.work / "score"
    rows: dict[str, tuple[np.ndarray, float]] = {}
    peer_out = out / "peer"
    bench.run("score: peer", peer_training(bench, star, peer_out, options.score_epochs, options.width))
    final = sorted(peer_out.glob("z.*.pkl"), key=lambda path: int(path.suffixes[-2][1:]))[-1]
    dump = "import sys, numpy, pickle; numpy.save(sys.argv[2], pickle.load(open(sys.argv[1], 'rb')))"
    bench.run("peer z", [bench.bin / "python", "-c", dump, final, out / "peer_z.npy"])
    rows["cryoDRGN 4.3.1"] = (np.load(out / "peer_z.npy"), bench.seconds["score: peer"][1])
    from cryodrgn_pipeline.io.runs import read_latents

    order = None
    for fraction in (1.0, *options.fractions):
        name = "ours" if fraction == 1 else f"ours, {fraction:g} of the points"
        run = out / f"ours_{fraction:g}"
        bench.run(
            f"score: {name}",
            our_training(bench, run, options.score_epochs, options.width, fraction, options.threads),
        )
        latents = read_latents(run)
        order = truth.rows_of(latents.particle_id)
        z = np.empty_like(latents.z)
        z[order] = latents.z
        rows[name] = (z, bench.seconds[f"score: {name}"][1])
    known = {name: truth.particle_states[:, place] for place, name in enumerate(truth.coordinates)}
    lines = [
        f"| after {options.score_epochs} epochs | {' | '.join('R² ' + name for name in known)} | CPU s |"
    ]
    lines.append("|---" * (len(known) + 2) + "|")
    for name, (z, cpu) in rows.items():
        scores = latent_r2(z, known)
        lines.append(f"| {name} | {' | '.join(f'{scores[key]:.3f}' for key in known)} | {cpu:.0f} |")
    return lines


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


def machine(bench: Bench, threads: int) -> str:
    """Versions and processor, for the record."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    peer = bench.run(
        "peer version",
        [
            bench.bin / "python",
            "-c",
            "import importlib.metadata as m; print(m.version('cryodrgn'), 'torch', m.version('torch'))",
        ],
    )
    return (
        f"cryodrgn-pipeline {__version__} (torch {torch.__version__}), cryodrgn {peer.strip()}, Python "
        f"{platform.python_version()}, {threads} threads of {os.cpu_count()} on {cpu}; load before the run "
        f"{os.getloadavg()[0]:.1f}"
    )


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
    parser.add_argument("--width", type=int, default=256, help="hidden width of encoder and decoder")
    parser.add_argument(
        "--epochs", type=int, default=2, help="epochs per speed run; the first is not counted"
    )
    parser.add_argument("--speed-rounds", type=int, default=2, help="backprojections timed of each program")
    parser.add_argument("--train-rounds", type=int, default=0, help="speed runs of each program")
    parser.add_argument("--score-epochs", type=int, default=0, help="epochs before latents are compared")
    parser.add_argument(
        "--fractions", type=float, nargs="*", default=[0.25], help="coordinate fractions to try"
    )
    parser.add_argument("--no-agreement", action="store_true", help="skip the comparison of numbers")
    options = parser.parse_args()

    install_peer(options.venv)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.venv, options.work, options.threads)
    header = machine(bench, options.threads)
    truth = None
    if options.star is None:
        made = options.work / "simulated"
        size = ["--box-size", str(options.box_size), "--pixel-size", str(options.pixel_size)]
        bench.run(
            "simulate",
            bench.ours(
                "simulate",
                "--particles",
                str(options.particles),
                *size,
                "--snr",
                str(options.snr),
                "-o",
                made,
            ),
        )
        options.star, truth = made / "particles.star", made / "consensus.mrc"
    prepare(bench, options.star, options.box_size, truth)
    images = len(read_particles(options.work / "import" / "particles.parquet"))

    print(f"\n{header}\n\n`{' '.join(['python', *sys.argv])}`\n")
    checks: list[Check] = []
    if not options.no_agreement:
        checks = compare_functions(bench, options.star, options.box_size) + compare_maps(bench, truth)
        print("| what | measured | bound | |\n|---|---|---|---|")
        print("\n".join(check.row() for check in checks))
    print("\n| step | wall s | CPU s | CPU ms an image |\n|---|---|---|---|")
    for name, (wall, cpu) in bench.seconds.items():
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {1e3 * cpu / images:.1f} |")
    if options.speed_rounds:
        speed = compare_backprojection_speed(bench, options.star, options.speed_rounds)
        checks.append(speed)
        print("\n" + speed.row())
    if options.train_rounds:
        print("\n" + "\n".join(compare_training(bench, options.star, images, options)))
    if options.score_epochs:
        print("\n" + "\n".join(compare_scores(bench, options.star, options)))
    report = {"header": header, "checks": [vars(check) | {"good": bool(check.good)} for check in checks]}
    (options.work / "compare.json").write_text(json.dumps(report, indent=2, default=float))
    return 0 if all(check.good for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
