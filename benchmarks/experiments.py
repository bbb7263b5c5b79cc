"""Measure the answers of docs/experiments.md: one arm is a set, options of `train`, and a score.

    python benchmarks/experiments.py --work WORK                # all arms; those that are there are kept
    python benchmarks/experiments.py --work WORK --arms usual wiener
    python benchmarks/experiments.py --work WORK --encode     # new images in trained models

Prints one table row an arm. Sets are made once (`WORK/SET`); volumes are drawn at the latents of evenly
spaced particles and scored per image as in bench.py; seconds are CPU time, which other work on the machine
does not lengthen. `halves differ` is |F(k) − F*(−k)| of a network's coefficients over |F|, root mean squares,
below and above half of Nyquist.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import torch
from bench import HARD, SMALL
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.demo import DEMO_SIMULATION
from cryodrgn_pipeline.evaluate import evaluate, latent_scores, read_truth, sample_points
from cryodrgn_pipeline.fourier.density import half_ball
from cryodrgn_pipeline.io.checkpoints import TrainedModel, load_model
from cryodrgn_pipeline.io.runs import read_json, read_latents, write_z
from cryodrgn_pipeline.models.from_subspace import ResidualVae
from cryodrgn_pipeline.stack import Stack

SMALLER = "--particles 1500 --box-size 24 --pixel-size 8.0 --seed 1 --snr 0.4"
SETS = {  # options of `simulate`, options of `preprocess`
    "hinge32": (f"{SMALL} --snr 0.25", ""),
    "large32": (f"{SMALL} --snr 0.15 --motion-range 180 --occupancy 1", ""),
    "hard32": (f"{SMALL} --snr 0.25 {HARD}", ""),
    "hinge24": (SMALLER, ""),
    "masked24": (SMALLER, "--mask-radius-a 75"),
    "coloured24": (f"{SMALLER} --noise-colour 3", ""),
    "demo": (" ".join(f"{option} {value}" for option, value in DEMO_SIMULATION.items()), ""),
}
NETWORK = "--encoder-width 256 --decoder-width 256 --coordinate-fraction 0.25 --encoder-mask-radius 0.5"
RESIDUAL = f"--encoder subspace --decoder mlp {NETWORK} --epochs 10 --learning-rate 3e-4"
IMAGE_BASIS = f"--encoder image --decoder basis {NETWORK} --epochs 40 --learning-rate 1e-3"
MLP = "--encoder image --decoder mlp --encoder-width 128 --decoder-width 128 --coordinate-fraction 0.25"
USUAL = f"{MLP} --encoder-mask-radius 0.7 --epochs 9 --learning-rate 1e-3"
# batch, factor on the learning rate, epochs: batch 16 makes as many updates in 1 epoch as 64 in 4
BATCHES = ((16, 1, 1), (16, 1, 4), (64, 1, 1), (64, 1, 4), (64, 2, 4), (64, 4, 4))
BATCHES += ((256, 1, 4), (256, 4, 4), (256, 16, 4))
ARMS: dict[str, tuple[str, str, int]] = {  # set, options of `train`, volumes that are scored
    **{
        f"{name} {arm}": (name, options, 100)
        for name in ("hinge32", "large32", "hard32")
        for arm, options in (
            ("subspace", "--method subspace"),
            ("default", ""),
            ("basis", "--decoder basis"),
            ("residual", RESIDUAL),
            ("image basis", IMAGE_BASIS),
        )
    },
    "usual": ("hinge24", USUAL, 20),
    "wiener": ("hinge24", f"{USUAL} --encoder-filter wiener", 20),
    "hartley": ("hinge24", f"{USUAL} --domain hartley", 20),
    "marching": ("hinge24", f"{USUAL} --frequency-marching 4", 20),
    "masked": ("masked24", USUAL, 20),
    "white": ("coloured24", USUAL, 20),
    "whitened": ("coloured24", f"{USUAL} --loss whitened", 20),
    "batch 64": ("hinge24", f"{USUAL} --batch-size 64", 20),
    "batch 64, rate x 2": ("hinge24", f"{USUAL} --batch-size 64 --learning-rate 2e-3", 20),
    "batch 256": ("hinge24", f"{USUAL} --batch-size 256", 20),
    "batch 256, rate x 4": ("hinge24", f"{USUAL} --batch-size 256 --learning-rate 4e-3", 20),
    "batch 64, rate x 2, 36 epochs": (
        "hinge24",
        f"{USUAL} --batch-size 64 --learning-rate 2e-3 --epochs 36",
        20,
    ),
    "width 256": ("hinge24", f"{USUAL} --encoder-width 256 --decoder-width 256", 20),
    "width 1024": ("hinge24", f"{USUAL} --encoder-width 1024 --decoder-width 1024", 20),
    "hinge24 default": ("hinge24", "", 20),
    **{
        f"demo batch {batch}, rate x {rate}, {epochs} epochs": (
            "demo",
            f"{USUAL} --batch-size {batch} --learning-rate {rate * 1e-3:g} --epochs {epochs}",
            20,
        )
        for batch, rate, epochs in BATCHES
    },
}


def ours(*words: str | Path) -> float:
    """Run one verb in this process; its CPU seconds, without those of starting Python."""
    before = time.process_time()
    done = CliRunner().invoke(app, ["-q", *map(str, words)])
    if done.exit_code:
        raise SystemExit(f"{words}: {done.output} {done.exception}")
    return time.process_time() - before


def prepared(work: Path, name: str) -> Path:
    """The set and its stack, made unless they are there; returns the set's folder."""
    folder, (simulated, preparing) = work / name, SETS[name]
    if not (folder / "simulated" / "simulate.json").is_file():
        ours("simulate", *simulated.split(), "-o", folder / "simulated")
    if not (folder / "stack" / "stack.json").is_file():
        ours("import", folder / "simulated" / "particles.star", "-o", folder / "import")
        box = simulated.split("--box-size ")[1].split()[0]
        words = ["--box-size", box, *preparing.split()]
        ours("preprocess", folder / "import", *words, "-o", folder / "stack")
    return folder


@torch.no_grad()
def halves_differ(run: Path, z: np.ndarray) -> list[float] | None:
    """How far a network that draws (re, im) at k and at −k is from a real density: inner and outer shells."""
    model = load_model(run)
    if not isinstance(model, TrainedModel) or isinstance(model.vae, ResidualVae):
        return None
    points = half_ball(model.box_size_px)
    k = points.flip(1).float() / model.box_size_px
    latent = torch.from_numpy(z[:5]).float()
    here, there = (model.vae.decoder(side.expand(len(latent), -1, -1), latent) for side in (k, -k))
    inner = k.norm(dim=1) <= 0.25
    found = []
    for shells in (inner, ~inner):
        apart, mean = here - there.conj(), (here + there.conj()) / 2
        found.append(
            float(
                apart[:, shells].abs().square().mean().sqrt() / mean[:, shells].abs().square().mean().sqrt()
            )
        )
    return found


def measured(work: Path, arm: str, threads: int, seed: int) -> dict[str, Any]:
    """What one arm gives, kept in its run folder."""
    name, options, count = ARMS[arm]
    run = work / "runs" / f"{arm.replace(' ', '_').replace(',', '')}_s{seed}"
    if (run / "experiment.json").is_file():
        return {"halves_differ": None} | read_json(run / "experiment.json")
    folder = prepared(work, name)
    fixed = ["--seed", str(seed), "--threads", str(threads), "--device", "cpu"]
    seconds = ours("train", folder / "stack", *options.split(), *fixed, "-o", run)
    ids, z = sample_points(run, folder / "simulated", count=count)
    write_z(run / "points.csv", z)
    (run / "points.txt").write_text("\n".join(map(str, ids)) + "\n")
    drawing = ours(
        "volumes", run, "--z", run / "points.csv", "--threads", str(threads), "-o", run / "volumes"
    )
    scores = evaluate(run / "volumes", folder / "simulated", run=run, particles=run / "points.txt")
    found = {
        "arm": arm,
        "set": name,
        "options": options,
        "seed": seed,
        "volumes": count,
        "auc": scores["fsc_auc"]["moving"],
        "each": scores["fsc_auc_each"]["moving"],
        "r2": scores["latent"]["r2"],
        "halves_differ": halves_differ(run, z),
        "train_cpu_s": seconds,
        "draw_cpu_s": drawing,
    }
    (run / "experiment.json").write_text(json.dumps(found, indent=1))
    return found


def row(found: dict[str, Any]) -> str:
    """One line of a table."""
    differ = " / ".join(f"{share:.2f}" for share in found["halves_differ"] or [])
    return (
        f"| `{found['set']}` | {found['arm']} | {found['auc']:.3f} | {_r2(found['r2'])} | "
        f"{found['train_cpu_s']:.0f} | {found['volumes']} | {differ} |"
    )


def brighter(work: Path, name: str, factor: float, noise: float) -> Path:
    """The stack of a set whose images are multiplied by a number, with white noise of so much of their own
    standard deviation added before.
    """
    made = work / f"{name}_times_{factor:g}_noise_{noise:g}"
    if not (made / "stack" / "stack.json").is_file():
        shutil.copytree(work / name / "simulated", made / "simulated", dirs_exist_ok=True)
        rng = np.random.default_rng(0)
        for path in sorted((made / "simulated").glob("**/*.mrcs")):
            with mrcfile.open(path, "r+") as file:
                images = file.data + noise * file.data.std() * rng.standard_normal(file.data.shape)
                file.set_data((factor * images).astype(np.float32))
        ours("import", made / "simulated" / "particles.star", "-o", made / "import")
        ours("preprocess", made / "import", "--box-size", "32", "-o", made / "stack")
    return made / "stack"


def encoded(work: Path, threads: int) -> None:
    """Train on every second particle, encode the others; then their images brighter, and noisier."""
    folder = prepared(work, "hinge32")
    stack, truth = folder / "stack", read_truth(folder / "simulated")
    ids = Stack.open(stack).particles.particle_id
    lists = [work / "runs" / name for name in ("even.txt", "odd.txt")]
    lists[0].parent.mkdir(parents=True, exist_ok=True)
    for path, chosen in zip(lists, (ids[::2], ids[1::2]), strict=True):
        path.write_text("\n".join(map(str, chosen)) + "\n")
    stacks = {"others": stack}
    stacks["ten times as bright"] = brighter(work, "hinge32", 10, 0)
    stacks["and with twice the noise power"] = brighter(work, "hinge32", 10, 1)
    print("| model | images | grey scale | R² | largest change of z |\n|---|---|---|---|---|")
    for name, options in (("linear", "--method subspace"), ("default", "")):
        run = work / "runs" / f"even_{name}"
        if not (run / "run.json").is_file():
            fixed = ["--threads", str(threads), "--device", "cpu", "--subset", str(lists[0])]
            ours("train", stack, *options.split(), *fixed, "-o", run)
        print(f"| {name} | learnt from | 1 | {_r2(latent_scores(run, truth)['r2'])} | |", flush=True)
        first = None
        for words, path in stacks.items():
            new = work / "runs" / f"even_{name}_{words.replace(' ', '_')}"
            ours("encode", run, path, "--subset", lists[1], "-o", new)
            z, grey = read_latents(new).z, read_json(new / "run.json")["grey_scale"]
            first = z if first is None else first
            moved = f"{np.abs(z - first).max():.2g}" if z is not first else ""
            print(
                f"| {name} | {words} | {grey:.3f} | {_r2(latent_scores(new, truth)['r2'])} | {moved} |",
                flush=True,
            )


def _r2(r2: dict[str, float]) -> str:
    return " / ".join(f"{r2[name]:.2f}" for name in ("motion", "occupancy") if name in r2)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--encode", action="store_true", help="new images in trained models, nothing else")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the training; sets are fixed")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    if options.encode:
        encoded(options.work.resolve(), options.threads)
        return 0
    print(
        "| set | arm | FSC-AUC, moving | R² | train, CPU s | volumes | halves differ |\n" + "|---" * 7 + "|"
    )
    for arm in options.arms:
        print(row(measured(options.work.resolve(), arm, options.threads, options.seed)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
