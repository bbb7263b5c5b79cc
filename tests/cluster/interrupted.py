"""A training to interrupt, and what is true of its run folder afterwards and in the end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from projects import Project
from safetensors.torch import load_file
from slurm_cluster import Job, SlurmCluster, until

EPOCHS = 150
RESULTS = ("latent.parquet", "model.safetensors", "run.json")  # metrics.jsonl grows as the training runs
Make = Callable[..., Project]


def the_training(cluster: SlurmCluster, project: Project) -> Job:
    """The training's job, once it runs and has saved.

    Its process stands still from here on, so that it does not end first on a fast machine; Slurm wakes those
    that it tells to end.
    """
    saved = project.run_folder / "checkpoints" / "state.pt"
    until(lambda: saved.exists() and project.epoch >= 12, "a training that has saved", 300)
    os.kill(project.pid, signal.SIGSTOP)
    (job,) = cluster.active("train_model")
    return job


def unfinished(project: Project) -> None:
    """The state after an interruption: a checkpoint, and nothing that could be taken for a result."""
    assert (project.run_folder / "checkpoints" / "state.pt").is_file()
    assert not [name for name in RESULTS if (project.run_folder / name).exists()]


def loss_curve(run: Path) -> list[dict[str, float]]:
    """The numbers of each epoch that do not depend on how fast the machine is."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ("epoch", "step", "reconstruction", "kld", "held_out_reconstruction")
    return [{name: row[name] for name in names} for row in rows if row["kind"] == "epoch"]


def goes_on(project: Project, uninterrupted: Path, *, after: int) -> None:
    """It went on after so many epochs or more, to the result of the uninterrupted run."""
    assert project.resumed_after is not None
    assert project.resumed_after >= after
    same_result(project, uninterrupted)


def same_result(project: Project, uninterrupted: Path) -> None:
    """Loss curve, weights and latents are those of the uninterrupted run, to the last bit."""
    curve = loss_curve(project.run_folder)
    assert [row["epoch"] for row in curve] == list(range(1, EPOCHS + 1))
    assert curve == loss_curve(uninterrupted)
    same_model(project, uninterrupted)


def same_model(project: Project, uninterrupted: Path) -> None:
    """Weights and latents are those of the uninterrupted run, to the last bit."""
    weights, expected = (load_file(run / "model.safetensors") for run in (project.run_folder, uninterrupted))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    ours, theirs = (pd.read_parquet(run / "latent.parquet") for run in (project.run_folder, uninterrupted))
    pd.testing.assert_frame_equal(ours, theirs)
