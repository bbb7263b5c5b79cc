"""A training on several nodes: one job, one task of srun on each node, one process for each GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from projects import RUN, SMALL, Project
from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm


def test_a_process_on_each_of_two_nodes_trains_one_model(
    cluster: SlurmCluster, tiny_set: Path, tmp_path: Path
) -> None:
    several = SMALL["resources"]["train"] | {"gpus": 1, "nodes": 2}
    project = Project(
        tmp_path / "project",
        tiny_set / "set" / "particles.star",
        {"resources": {"train": several}},
        {"# slurm-status-command: squeue": "slurm-status-command: squeue"},
    )
    done = project.on_cluster(f"{RUN}/run.json")
    log = project.folder / "logs" / "mine" / "all" / "vae" / "train.log"
    assert done.returncode == 0, done.stdout + (log.read_text(encoding="utf-8") if log.exists() else "")
    (job,) = (job for job in cluster.jobs() if job["Comment"].startswith("rule_train_model"))
    assert job["NumNodes"] == "2"
    assert job["TresPerNode"] == "gres:gpu:1"
    manifest = json.loads((project.run_folder / "run.json").read_text(encoding="utf-8"))
    assert manifest["processes"] == 2
    assert manifest["epochs"] == 2
    assert "in 2 processes" in log.read_text(encoding="utf-8")
