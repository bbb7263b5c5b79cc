"""A run folder with everything a report can show, made of invented numbers in the product's file formats."""

from __future__ import annotations

import json
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd

BOX, PIXEL_SIZE_A = 24, 4.25
NASTY_ID = "000001@<script>alert('x')</script>.mrcs"


def make_latent(run: Path, n: int = 240, ids: str = "star", seed: int = 1, loss: bool = True) -> pd.DataFrame:
    """RUN/latent.parquet: two blobs and a bridge in 3-D, five far-out badly fitted particles at the end."""
    rng = np.random.default_rng(seed)
    t = rng.uniform(-1, 1, n)
    z = np.stack([3 * t, np.cos(2 * t), np.zeros(n)], axis=1) + rng.normal(0, 0.15, (n, 3))
    particle_loss = rng.normal(1.0, 0.05, n)
    z[-5:, 2] += 25.0
    particle_loss[-5:] += 2.0
    names = np.array([f"{i + 1:06d}@stack.mrcs" for i in range(n)], dtype=object)
    names[0] = NASTY_ID
    uids = rng.permutation(np.arange(n, dtype=np.uint64) + np.uint64(2**63 + 11))
    frame = pd.DataFrame({"particle_id": names if ids == "star" else uids})
    for j in range(3):
        frame[f"z_{j}"] = z[:, j].astype(np.float32)
    for j in range(3):
        frame[f"std_{j}"] = np.full(n, 0.2, dtype=np.float32)
    if loss:
        frame["loss"] = particle_loss.astype(np.float32)
    frame["held_out"] = np.arange(n) % 10 == 0
    run.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(run / "latent.parquet", index=False)
    return frame


def make_run(run: Path, n: int = 240, ids: str = "star") -> Path:
    """A folder as `train` leaves it, without weights."""
    make_latent(run, n, ids)
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as lines:
        for epoch in range(1, 9):
            fall = float(np.exp(-epoch / 2))
            record = {
                "kind": "epoch",
                "epoch": epoch,
                "loss": 1.02 + fall,
                "reconstruction": 1.0 + fall,
                "kld": 6.0 - 3 * fall,
                "held_out_reconstruction": 1.03 + fall,
                "held_out_kld": 6.0 - 3 * fall,
                "learning_rate": 1e-4,
                "images_per_s": 812.5,
                "seconds": 3.1,
                "step": epoch * 27,
            }
            lines.write(json.dumps(record) + "\n")
    manifest = {
        "tool": "cryodrgn-pipeline",
        "versions": {"cryodrgn_pipeline": "0.1.0", "torch": "2.8.0", "python": "3.11.4"},
        "git_hash": "0123abc",
        "config": {"latent_dim": 3, "batch_size": 16, "encoder": {"kind": "mlp", "width": 256, "layers": 3}},
        "stack": str(run.parent / "stack_24"),
        "stack_fingerprint": "ab" * 32,
        "seed": 0,
        "device": "cpu",
        "training_seconds": 29.4,
        "n_particles": n,
        "subset": None,
    }
    (run / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    return run


def blob_map(arm_deg: float) -> np.ndarray:
    """A body with an arm at the given angle: `(BOX, BOX, BOX)` as z, y, x."""
    grid = np.arange(BOX) - BOX / 2
    z, y, x = np.meshgrid(grid, grid, grid, indexing="ij")
    angle = np.deg2rad(arm_deg)
    body = np.exp(-(x**2 + y**2 + z**2) / 18.0)
    arm = np.exp(-((x - 6 * np.cos(angle)) ** 2 + (y - 6 * np.sin(angle)) ** 2 + z**2) / 5.0)
    return (body + arm).astype(np.float32)


def write_map(path: Path, density: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(density)
        file.voxel_size = PIXEL_SIZE_A


def make_consensus(folder: Path, verdict: str = "consistent") -> Path:
    """A folder as `consensus` leaves it."""
    write_map(folder / "map.mrc", blob_map(30.0))
    shell = np.arange(BOX // 2 + 1)
    fsc = 1 / (1 + np.exp((shell - 7) / 1.2))
    pd.DataFrame(
        {
            "shell": shell,
            "frequency_per_a": shell / (BOX * PIXEL_SIZE_A),
            "fsc_unmasked": fsc * 0.95,
            "fsc_masked": fsc,
            "fsc_reference": np.full(len(shell), np.nan),
        }
    ).to_parquet(folder / "fsc.parquet", index=False)
    wrong = verdict == "contradicted"
    tests = [
        {
            "name": "rotation_transpose",
            "verdict": verdict,
            "statement": "half maps agree to 11.8 Å as read and to 24.9 Å with transposed rotations",
            "score_current": 0.81,
            "score_alternative": 0.33,
            "remedy": "transpose_rotations: true" if wrong else None,
            "remedy_section": "datasets: NAME: conventions:" if wrong else None,
            "import_option": "--transpose-rotations" if wrong else None,
        },
        {
            "name": "hand",
            "verdict": "not_determinable",
            "statement": "needs your own consensus map (--reference)",
            "score_current": None,
            "score_alternative": None,
            "remedy": None,
        },
    ]
    summary = {
        "resolution_fsc0143_a": 11.8,
        "resolution_fsc05_a": 14.6,
        "n_particles": 240,
        "box_size_px": BOX,
        "pixel_size_a": PIXEL_SIZE_A,
        "convention_check": {"verdict": verdict, "tests": tests},
    }
    (folder / "consensus.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def make_volumes(folder: Path, z: np.ndarray) -> Path:
    """A folder as `volumes` leaves it: one map per row of `z`."""
    names = [f"vol_{i:03d}.mrc" for i in range(len(z))]
    for i, name in enumerate(names):
        write_map(folder / name, blob_map(12.0 * i))
    table = pd.DataFrame({"path": names} | {f"z_{j}": z[:, j] for j in range(z.shape[1])})
    table.to_parquet(folder / "volumes.parquet", index=False)
    return folder


def make_import(folder: Path) -> Path:
    """import.json as `import` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "source": {"path": "particles <b>.star", "kind": "star", "sha256": "cd" * 32, "size": 12345},
        "columns": {"pixel_size_a": "rlnImagePixelSize"},
        "overrides": {},
        "n_particles": 240,
        "unapplied_aberrations": [
            {"name": "beam tilt", "rows": 240, "max": 0.31, "effect": "phase error below 3 Å"}
        ],
    }
    (folder / "import.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def make_stack(folder: Path) -> Path:
    """stack.json as `preprocess` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "box_size_px": BOX,
        "pixel_size_a": PIXEL_SIZE_A,
        "n_particles": 240,
        "dtype": "float32",
        "wall_s": 1.9,
        "notes": ["beam tilt of 240 particles was not applied"],
    }
    (folder / "stack.json").write_text(json.dumps(record), encoding="utf-8")
    return folder
