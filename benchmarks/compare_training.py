"""Train cryoDRGN 4.3.1 and cryodrgn-pipeline on the same files: speed, and time to the same score.

    python benchmarks/compare_training.py speed --particles 600 --box-size 64 --pixel-size 3 --epochs 3
    python benchmarks/compare_training.py score --particles 4000 --epochs 20

Speed: the same networks on the same threads, the programs in turns. Score: 20-NN R² of the true motion and
occupancy from z, cryoDRGN after `--epochs` with its defaults; ours on all points and on a share of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from peer import HERE, Bench, Check, table

from cryodrgn_pipeline.evaluate import latent_r2, read_truth
from cryodrgn_pipeline.io.runs import read_latents

PEER_EPOCH, OUR_EPOCH = r"=> Epoch: \d+ Average", r"epoch \d+ of \d+: reconstruction"
OUR_SETTINGS = ["--learning-rate", "1e-3", "--encoder-mask-radius", "0.5"]


def prepare(bench: Bench, options: argparse.Namespace) -> Path:
    """A simulated set, cryoDRGN's tables of it and our stack."""
    made = bench.work / "simulated"
    size = ["--particles", options.particles, "--box-size", options.box_size]
    size += ["--pixel-size", options.pixel_size, "--snr", options.snr, "--seed", 1]
    bench.run("simulate", bench.ours("simulate", *map(str, size), "-o", made))
    star = made / "particles.star"
    for what in ("pose", "ctf"):
        bench.run(f"peer {what}", bench.peer(f"parse_{what}_star", star, "-o", bench.work / f"{what}.pkl"))
    bench.run("import", bench.ours("import", star, "-o", bench.work / "import"))
    box = ["--box-size", str(options.box_size)]
    bench.run("preprocess", bench.ours("preprocess", bench.work / "import", *box, "-o", bench.work / "stack"))
    return star


def peer_training(bench: Bench, star: Path, out: Path, epochs: int, options: argparse.Namespace) -> list:
    """cryoDRGN's command; what is not named keeps its default."""
    tables = ["--datadir", star.parent, "--poses", bench.work / "pose.pkl", "--ctf", bench.work / "ctf.pkl"]
    width = ["--enc-dim", str(options.width), "--dec-dim", str(options.width)]
    size = ["--zdim", str(options.latent_dim), *width, "-n", str(epochs), "--seed", "0"]
    return bench.peer("train_vae", star, *tables, *size, "--no-analysis", "-o", out)


def our_training(
    bench: Bench, out: Path, epochs: int, fraction: float, options: argparse.Namespace, *settings: str
) -> list:
    """Our command with the same networks."""
    width = ["--encoder-width", str(options.width), "--decoder-width", str(options.width)]
    size = ["--latent-dim", str(options.latent_dim), *width, "--epochs", str(epochs)]
    machine = ["--threads", str(options.threads), "--device", "cpu", "--in-memory"]
    how = ["--coordinate-fraction", str(fraction), "--held-out-fraction", "0", *settings]
    return bench.ours("train", bench.work / "stack", *size, *machine, *how, "-o", out)


def compare_speed(bench: Bench, star: Path, options: argparse.Namespace) -> tuple[str, list[Check]]:
    """Milliseconds per image and epoch, alternating the programs so that both meet the same machine."""
    fractions = {
        "cryoDRGN 4.3.1": None,
        "ours": 1.0,
        f"ours, {options.fraction:g} of the points": options.fraction,
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in fractions}
    for number in range(options.rounds):
        for name, fraction in fractions.items():
            out = bench.work / "speed" / f"{name.replace(' ', '_').replace(',', '')}_{number}"
            command, mark = (
                (peer_training(bench, star, out, options.epochs, options), PEER_EPOCH)
                if fraction is None
                else (our_training(bench, out, options.epochs, fraction, options), OUR_EPOCH)
            )
            measured[name].append(bench.epoch_times(name, command, options.particles, mark))
    best = {name: np.min(values, axis=0) for name, values in measured.items()}
    base, whole, _ = best.values()
    lines = ["| training | ms wall | ms CPU | times faster (wall) | (CPU) |", "|---|---|---|---|---|"]
    for name, (wall, cpu) in best.items():
        lines.append(f"| {name} | {wall:.1f} | {cpu:.1f} | {base[0] / wall:.2f} | {base[1] / cpu:.2f} |")
    return "\n".join(lines), [Check("same networks, times faster", base[0] / whole[0], 1.2, at_most=False)]


def compare_scores(bench: Bench, star: Path, options: argparse.Namespace) -> tuple[str, list[Check]]:
    """R² of the true coordinates and the seconds of the training command that led there."""
    truth = read_truth(star.parent)
    known = {name: truth.particle_states[:, place] for place, name in enumerate(truth.coordinates)}
    out = bench.work / "score"
    z: dict[str, np.ndarray] = {}
    peer_name = f"cryoDRGN 4.3.1, {options.epochs} epochs"
    bench.run(peer_name, peer_training(bench, star, out / "peer", options.epochs, options))
    # its latents are pickled: read in its own environment, where its own files are trusted
    final = max((out / "peer").glob("z.*.pkl"), key=lambda path: int(path.suffixes[-2][1:]))
    dump = "import sys, numpy, pickle; numpy.save(sys.argv[2], pickle.load(open(sys.argv[1], 'rb')))"
    bench.run("peer z", [bench.bin / "python", "-c", dump, final, out / "peer_z.npy"])
    z[peer_name] = np.load(out / "peer_z.npy")
    for fraction, epochs in ((1.0, options.our_epochs[0]), (options.fraction, options.our_epochs[1])):
        name = f"ours, {fraction:g} of the points, {epochs} epochs"
        command = our_training(bench, out / f"ours_{fraction:g}", epochs, fraction, options, *OUR_SETTINGS)
        bench.run(name, command)
        latents = read_latents(out / f"ours_{fraction:g}")
        z[name] = np.empty_like(latents.z)
        z[name][truth.rows_of(latents.particle_id)] = latents.z
    scores = {name: latent_r2(values, known) for name, values in z.items()}
    lines = [f"| training | wall s | CPU s | {' | '.join('R² ' + name for name in known)} |"]
    lines.append("|---" * (len(known) + 3) + "|")
    for name, score in scores.items():
        wall, cpu = bench.seconds[name]
        lines.append(
            f"| {name} | {wall:.0f} | {cpu:.0f} | {' | '.join(f'{score[key]:.3f}' for key in known)} |"
        )
    theirs, _, ours = scores
    checks = [
        Check(
            f"R² {key}, a share of the points less cryoDRGN",
            scores[ours][key] - scores[theirs][key],
            0.0,
            False,
        )
        for key in known
    ]
    faster = bench.seconds[theirs][0] / bench.seconds[ours][0]
    return "\n".join(lines), [*checks, Check("times less wall time for it", faster, 2.0, at_most=False)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "score"))
    parser.add_argument("--venv", type=Path, default=HERE / "work" / "cryodrgn_venv", help="cryoDRGN's")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "training", help="scratch folder")
    parser.add_argument("--particles", type=int, default=4000)
    parser.add_argument("--box-size", type=int, default=32)
    parser.add_argument("--pixel-size", type=float, default=6.0)
    parser.add_argument("--snr", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=256, help="hidden width of encoder and decoder")
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=20, help="epochs (cryoDRGN's, for scores)")
    parser.add_argument("--our-epochs", type=int, nargs=2, default=[10, 18], help="for scores: all, a share")
    parser.add_argument("--fraction", type=float, default=0.25, help="share of the points")
    parser.add_argument("--rounds", type=int, default=2, help="speed runs of each program")
    options = parser.parse_args()
    bench = Bench(options.venv, options.work, options.threads)
    header = bench.machine()
    star = prepare(bench, options)
    compare = compare_speed if options.what == "speed" else compare_scores
    measured, checks = compare(bench, star, options)
    print(f"{header}\n\n`{' '.join(['python', *sys.argv])}`\n\n{measured}\n\n{table(checks)}")
    return 0 if all(check.good for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
