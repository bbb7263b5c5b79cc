"""Score cryodrgn-pipeline and cryoDRGN 4.3.1 on sets with known answers, and write the tables of RESULTS.md.

    python benchmarks/bench.py --sets hinge32 4jsv32 --methods subspace --seeds 0 1 2
    python benchmarks/bench.py --sets hinge32 --peer-epochs 100      # trains cryoDRGN as well, resumes it

Everything lies in WORK/SET: the set (`simulated`), ours (`METHOD_sSEED`), cryoDRGN's only run (`peer`, with
its weights of every epoch) and its scores (`peer_epoch_N`). The set is fixed; seeds are of our training. Both
programs draw volumes at the latents of the same 100 particles and are scored by `evaluate`. Scores and losses
of cryoDRGN's runs, which take hours, are kept in `peer_runs/SET.json` and stand for them where WORK has none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from bench_report import BEGIN, END, PEER, Row, figure, report, rewrite
from peer import HERE, Bench
from structures import fetch

from cryodrgn_pipeline.evaluate import Truth, evaluate, read_truth, sample_points
from cryodrgn_pipeline.headroom import headroom, reference_scores
from cryodrgn_pipeline.io.runs import write_columns, write_z
from cryodrgn_pipeline.stack import Stack

OTHER = "--particles 4000 --box-size 32 --pixel-size 6.0"
SMALL = f"{OTHER} --seed 1"
HARD = "--junk 0.15 --contrast-spread 0.25 --noise-colour 3 --pose-error 3 --shift-error 6"
MTOR = "--hinge-chain A:1385-1760 --absent-chain C --motion-range 60 --occupancy 0.65"
SETS: dict[str, tuple[str, str | None]] = {  # options of `simulate`, structure
    "hinge32": (f"{SMALL} --snr 0.25", None),
    "4jsv32": (f"{SMALL} --snr 0.3 {MTOR}", "4JSV_AC"),
    "large32": (f"{SMALL} --snr 0.15 --motion-range 180 --occupancy 1", None),
    "hard32": (f"{SMALL} --snr 0.25 {HARD}", None),
    "single32": (f"{OTHER} --seed 5 --structure-seed 2 --snr 0.15 --motion-range 90 --occupancy 1", None),
    "twist32": (
        f"{OTHER} --seed 8 --structure-seed 4 --snr 0.2 --motion twist --motion-range 120 --occupancy 1",
        None,
    ),
    "slide32": (
        f"{OTHER} --seed 9 --structure-seed 5 --snr 0.2 --motion slide --motion-range 60 --occupancy 0.5",
        None,
    ),
    "large32b": (f"{OTHER} --seed 11 --structure-seed 6 --snr 0.15 --motion-range 180 --occupancy 1", None),
    "pref32": (f"{OTHER} --seed 12 --structure-seed 7 --snr 0.2 --orientations preferred", None),
    "hinge32b": (f"{OTHER} --seed 7 --structure-seed 3 --snr 0.25", None),
    "clean32": (f"{OTHER} --seed 21 --structure-seed 11 --snr 2", None),
    "species32": (
        "--particles 6000 --box-size 32 --pixel-size 6.0 --seed 16 --structure-seed 10 --snr 0.15 "
        "--species 5",
        None,
    ),
    "hinge64": (
        "--particles 5000 --box-size 64 --pixel-size 3.0 --seed 13 --structure-seed 8 --snr 0.15 "
        "--occupancy 1",
        None,
    ),
    "rigid32": (f"{SMALL} --snr 0.25 --motion none --occupancy 1", None),
    "species64": (
        "--particles 12000 --box-size 64 --pixel-size 3.0 --seed 1 --snr 0.15 --species 8",
        None,
    ),
}
MLP = "--method vae --encoder image --decoder mlp --encoder-width 256 --decoder-width 256 --epochs 40"
METHODS: dict[str, tuple[str, str]] = {  # options of `train` and of `volumes`
    "subspace": ("--method subspace", ""),
    "subspace_particles": ("--method subspace", "--source particles"),
    "default": ("", ""),
    "basis": ("--decoder basis", ""),
    "mlp": (f"{MLP} --coordinate-fraction 0.25 --learning-rate 1e-3 --encoder-mask-radius 0.5", ""),
}
PEER_SIZE = "--zdim 8 --enc-dim 256 --dec-dim 256 --seed 0 --no-analysis"
SCORED_EPOCHS = (1, 2, 5, 10, 20, 35, 50, 75, 100)
EPOCH_LINE = re.compile(r"Epoch: (\d+) Average .*total loss = ([\d.]+); Finished in (\d+):(\d+):([\d.]+)")
FLAT = 0.005  # fall of the loss over ten epochs, as a fraction, below which it counts as flat
KEPT = HERE / "peer_runs"
DUMP = "import sys, numpy, pickle; numpy.save(sys.argv[2], pickle.load(open(sys.argv[1], 'rb')))"


def epochs_of(log: str) -> dict[int, tuple[float, float]]:
    """Loss and seconds of each epoch in a log of cryoDRGN; of one that ran twice the last."""
    found = {}
    for epoch, loss, hours, minutes, seconds in EPOCH_LINE.findall(log):
        found[int(epoch)] = (float(loss), 3600 * int(hours) + 60 * int(minutes) + float(seconds))
    return found


def is_flat(epochs: dict[int, tuple[float, float]], last: int) -> bool:
    """Whether the loss fell by less than 0.5 % over the ten epochs up to `last`."""
    if last not in epochs or last - 10 not in epochs:
        return False
    before, after = epochs[last - 10][0], epochs[last][0]
    return (before - after) / abs(before) < FLAT


def prepare(bench: Bench, name: str) -> Path:
    """The set, simulated unless it is there, and its stack; returns the set's folder."""
    folder = bench.work / name
    words, structure = SETS[name]
    if not (folder / "simulated" / "simulate.json").is_file():
        options = words.split()
        if structure is not None:
            options += ["--structure", str(fetch(structure, bench.work / "structures"))]
        bench.run(f"{name} simulate", bench.ours("simulate", *options, "-o", folder / "simulated"))
    box = str(json.loads((folder / "simulated" / "simulate.json").read_text())["settings"]["box_size"])
    star = folder / "simulated" / "particles.star"
    bench.run(f"{name} import", bench.ours("import", star, "-o", folder / "import"))
    stack = folder / "bench_stack"
    shutil.rmtree(stack, ignore_errors=True)  # a stack that is there would be kept, and nothing timed
    command = bench.ours("preprocess", folder / "import", "--box-size", box, "-o", stack)
    bench.run(f"{name} preprocess", command)
    return folder


def known_scores(folder: Path, truth: Truth, states: np.ndarray) -> dict[str, Any]:
    """Consensus and oracle of a set for these states, kept in references.json."""
    path, stack = folder / "references.json", folder / "bench_stack"
    key = {"stack": Stack.open(stack).fingerprint, "states": states.tolist()}
    if path.is_file() and (kept := json.loads(path.read_text()))["key"] == key:
        return kept["scores"]
    scores = reference_scores(stack, truth, states)
    path.write_text(json.dumps({"key": key, "scores": scores}))
    return scores


def score(folder: Path, run: Path, volumes: Path) -> dict[str, Any]:
    """What `evaluate` says of a run and its volumes at the 100 particles, with headroom."""
    made = folder / "simulated"
    metrics = evaluate(volumes, made, run=run, particles=run / "points.txt")
    known = known_scores(folder, read_truth(made), np.array(metrics["states"]))
    moving = metrics["fsc_auc"].get("moving")
    ends = [known[which].get("moving") for which in ("consensus", "oracle")]
    return {
        "fsc_auc": metrics["fsc_auc"],
        "each": metrics["fsc_auc_each"].get("moving", metrics["fsc_auc_each"]["union"]),
        "latent": metrics["latent"],
        "references": known,
        "headroom": None if moving is None else headroom(moving, *ends),
    }


def write_points(folder: Path, run: Path) -> None:
    """The ids and latents of the 100 particles, as `evaluate --write-points` chooses them."""
    ids, z = sample_points(run, folder / "simulated")
    write_z(run / "points.csv", z)
    (run / "points.txt").write_text("\n".join(map(str, ids)) + "\n")


def measured(bench: Bench, folder: Path, steps: list[str]) -> dict[str, Any]:
    """Times and memory of steps that were run, and the state of the machine."""
    words = [step.split()[-1] for step in steps]
    described = subprocess.run(
        ["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "set": folder.name,
        "wall_s": {word: bench.seconds[step][0] for word, step in zip(words, steps, strict=True)},
        "cpu_s": {word: bench.seconds[step][1] for word, step in zip(words, steps, strict=True)},
        "peak_mb": max(bench.peak_mb[step] for step in steps),
        "commit": described.stdout.strip() or "unknown",
        "load": os.getloadavg()[0],
    }


def run_ours(bench: Bench, folder: Path, method: str, seed: int) -> Row:
    """Train, draw and score one of our methods."""
    run = folder / f"{method}_s{seed}"
    shutil.rmtree(run, ignore_errors=True)
    training, drawing = (words.split() for words in METHODS[method])
    options = [*training, "--seed", str(seed), "--threads", str(bench.threads)]
    label = f"{folder.name} {method} s{seed}"
    train = bench.ours("train", folder / "bench_stack", *options, "-o", run)
    bench.run(f"{label} train", train)
    write_points(folder, run)
    draw = bench.ours("volumes", run, "--z", run / "points.csv", *drawing, "-o", run / "volumes")
    bench.run(f"{label} volumes", draw)
    steps = [f"{folder.name} import", f"{folder.name} preprocess", f"{label} train", f"{label} volumes"]
    analyse(bench, run, label)
    row = Row(
        method=method,
        seed=seed,
        commands=[" ".join(map(str, command[2:])) for command in (train, draw)],
        **measured(bench, folder, steps),
        **score(folder, run, run / "volumes"),
    )
    keep(row, run)
    return row


def analyse(bench: Bench, run: Path, label: str) -> None:
    """Clusters for the ARI; not part of the clock, since volumes do not need them."""
    bench.run(f"{label} analyze", bench.ours("analyze", run, "--no-umap"))


def keep(row: Row, run: Path) -> None:
    """Write the row beside the run, from where later calls collect it; drop the 100 maps."""
    (run / "bench.json").write_text(json.dumps(asdict(row), indent=1))
    shutil.rmtree(run / "volumes", ignore_errors=True)


def train_peer(bench: Bench, folder: Path, epochs: int) -> None:
    """Train cryoDRGN, with its defaults but the size, up to so many epochs; goes on where it stopped."""
    out, star = folder / "peer", folder / "simulated" / "particles.star"
    for what in ("pose", "ctf"):
        if not (folder / f"{what}.pkl").is_file():
            table = folder / f"{what}.pkl"
            bench.run(f"{folder.name} peer {what}", bench.peer(f"parse_{what}_star", star, "-o", table))
    if (out / f"weights.{epochs}.pkl").is_file():
        return
    tables = ["--datadir", star.parent, "--poses", folder / "pose.pkl", "--ctf", folder / "ctf.pkl"]
    load = ["--load", "latest"] if any(out.glob("weights.*.pkl")) else []
    words = [*tables, *PEER_SIZE.split(), "-n", str(epochs), *load, "-o", out]
    bench.run(f"{folder.name} peer training", bench.peer("train_vae", star, *words))


def score_peer(bench: Bench, folder: Path, epoch: int) -> Row:
    """Its latents and its volumes at the same particles, after some epoch."""
    run, peer = folder / f"peer_epoch_{epoch}", folder / "peer"
    if (run / "bench.json").is_file():
        return Row(**json.loads((run / "bench.json").read_text()))
    run.mkdir(exist_ok=True)
    label = f"{folder.name} peer epoch {epoch}"
    # its latents are pickled: read in its own environment, where its own files are trusted
    dump = [bench.bin / "python", "-c", DUMP, peer / f"z.{epoch}.pkl", run / "z.npy"]
    bench.run(f"{label} latents", dump)
    z, truth = np.load(run / "z.npy"), read_truth(folder / "simulated")
    columns = {"particle_id": truth.table["particle_id"]}  # both tables are in the order of the star file
    write_columns(run / "latent.parquet", columns | {f"z_{j}": z[:, j] for j in range(z.shape[1])})
    write_points(folder, run)
    np.savetxt(run / "points.dat", np.loadtxt(run / "points.csv", delimiter=",", skiprows=1))
    pixel = str(Stack.open(folder / "bench_stack").pixel_size_a)
    draw = bench.peer("eval_vol", peer / f"weights.{epoch}.pkl", "-c", peer / "config.yaml")
    draw += ["--zfile", run / "points.dat", "--Apix", pixel, "-o", run / "volumes"]
    bench.run(f"{label} volumes", draw)
    analyse(bench, run, label)
    epochs = epochs_of((peer / "run.log").read_text())
    spent = [epochs[done][1] for done in range(1, epoch + 1) if done in epochs]
    row = Row(
        method=PEER,
        seed=0,
        commands=[f"cryodrgn train_vae {PEER_SIZE} -n {epoch}", " ".join(map(str, draw[1:]))],
        **measured(bench, folder, [f"{label} volumes"]),
        **score(folder, run, run / "volumes"),
        epoch=epoch,
        converged=is_flat(epochs, epoch),
        extra={"loss": epochs[epoch][0], "train_clock_s": sum(spent), "best_epoch_s": min(spent)},
    )
    # an epoch lasts longer where other jobs ran beside it: its fastest epoch stands for all, in its favour
    row.wall_s["train"] = epoch * min(spent)
    keep(row, run)
    return row


def keep_peer(folder: Path) -> None:
    """Keep the scores of cryoDRGN's run on a set, and its loss and seconds of each epoch."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("peer_epoch_*/bench.json"))]
    if rows:
        epochs = epochs_of((folder / "peer" / "run.log").read_text())
        known = {"simulate": SETS[folder.name][0], "epochs": epochs, "rows": rows}
        KEPT.mkdir(exist_ok=True)
        (KEPT / f"{folder.name}.json").write_text(json.dumps(known) + "\n")


def kept_peer(name: str) -> list[Row]:
    """The rows that `keep_peer` kept of this very set."""
    path = KEPT / f"{name}.json"
    known = json.loads(path.read_text()) if path.is_file() else {"simulate": None}
    return [Row(**row) for row in known["rows"]] if known["simulate"] == SETS[name][0] else []


def peer_epochs(folder: Path) -> list[int]:
    """Epochs to score: those of SCORED_EPOCHS that are there, and the last one."""
    there = sorted(int(path.suffixes[-2][1:]) for path in (folder / "peer").glob("z.*.pkl"))
    done = epochs_of((folder / "peer" / "run.log").read_text()) if there else {}
    there = [
        epoch for epoch in there if epoch in done and (folder / "peer" / f"weights.{epoch}.pkl").is_file()
    ]
    return [epoch for epoch in there if epoch in SCORED_EPOCHS or epoch == there[-1]]


def collected(work: Path) -> list[Row]:
    """All rows that lie under WORK, by set in the order of the table.

    cryoDRGN draws its volumes equally fast after any epoch: the fastest time stands for all, in its favour.
    """
    rows = [Row(**json.loads(path.read_text())) for path in sorted(work.glob("*/*/bench.json"))]
    scored = {row.set for row in rows if row.method == PEER}
    rows += [row for name in {row.set for row in rows} - scored for row in kept_peer(name)]
    for row in rows:
        if row.method == PEER:
            same = [other for other in rows if (other.set, other.method) == (row.set, PEER)]
            row.wall_s["volumes"] = min(other.wall_s["volumes"] for other in same)
    order = list(SETS)
    return sorted(
        (row for row in rows if row.set in SETS),
        key=lambda row: (order.index(row.set), row.method, row.epoch or 0, row.seed),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=HERE / "work", help="scratch folder, one folder a set")
    parser.add_argument("--venv", type=Path, default=HERE / "work" / "cryodrgn_venv", help="cryoDRGN's")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["subspace", "default"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peer-epochs", type=int, default=0, help="train cryoDRGN up to here; 0 scores what is there"
    )
    options = parser.parse_args()
    bench = Bench(options.venv, options.work.resolve(), options.threads)
    header = bench.machine()
    for name in options.sets:
        folder = prepare(bench, name)
        if options.peer_epochs:
            train_peer(bench, folder, options.peer_epochs)
        for epoch in peer_epochs(folder):
            score_peer(bench, folder, epoch)
        keep_peer(folder)
        for method in options.methods:
            for seed in options.seeds:
                run_ours(bench, folder, method, seed)
    rows = collected(options.work)
    command = " ".join(["python", *sys.argv])
    text = report(header, command, rows, {name: words for name, (words, _) in SETS.items()})
    for path, name in ((options.work.resolve(), "WORK"), (options.work, "WORK"), (options.venv, "VENV")):
        text = text.replace(str(path), name)
    figure(rows, HERE / "bench.png")
    rewrite(HERE / "RESULTS.md", f"{BEGIN}\n{text}\n{END}")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
