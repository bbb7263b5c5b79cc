"""A training on several nodes: one job, one task of srun on each node, one process for each GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from interrupted import Make
from projects import SMALL, TRAINED
from slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.heavy]


def test_a_process_on_each_of_two_nodes_trains_one_model(
    make: Make, tmp_path: Path, cluster: SlurmCluster
) -> None:
    several = SMALL["resources"] | {"train": SMALL["resources"]["train"] | {"gpus": 1, "nodes": 2}}
    project = make(tmp_path / "project", train={"epochs": 2}, resources=several)
    head = project.on_cluster(TRAINED)
    assert head.code == 0, head.output + project.log
    (job,) = cluster.jobs("train_model")
    assert job["NumNodes"] == "2"
    assert job["TresPerNode"] == "gres:gpu:1"
    manifest = json.loads((project.run_folder / "run.json").read_text(encoding="utf-8"))
    assert manifest["processes"] == 2
    assert manifest["epochs"] == 2
    assert "in 2 processes" in project.log
