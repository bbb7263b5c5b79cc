"""The default model, which is learnt by passes over the images and not by epochs, goes on as well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from interrupted import RESULTS, same_model
from projects import TRAINED, Project
from slurm_cluster import SlurmCluster, until
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app

pytestmark = [pytest.mark.slurm, pytest.mark.heavy]
SETTINGS = {
    "preprocess": {"box_size_px": 24},
    "train": {"encoder": "subspace", "decoder": "kernel", "checkpoint_every_minutes": 0.02},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The workflow up to its training, run without a cluster, on 800 particles with a motion."""
    folder = tmp_path_factory.mktemp("moving")
    words = f"simulate -o {folder}/set --box-size 24 --pixel-size 8 --particles 800 --snr 0.5 --seed 2"
    assert CliRunner().invoke(app, words.split(), catch_exceptions=False).exit_code == 0
    site = {"# slurm-status-command: squeue": "slurm-status-command: squeue"}
    project = Project(folder / "project", folder / "set" / "particles.star", SETTINGS, site)
    project.verb("run", "--cores", "1", TRAINED)
    return project


def test_the_default_model_goes_on_from_its_checkpoint_when_its_job_is_cancelled(
    uninterrupted: Project, tmp_path: Path, cluster: SlurmCluster
) -> None:
    project = uninterrupted.untrained_copy(tmp_path / "project")
    with project.started(TRAINED) as head:
        until(lambda: checkpointed(project), "a checkpoint", 300)
        (job,) = cluster.active("train_model")
        cluster.client("scancel", job["JobId"])
        until(
            lambda: cluster.jobs_by_id()[job["JobId"]]["JobState"] == "CANCELLED", "the cancelled job's end"
        )
        assert not [name for name in RESULTS if (project.run_folder / name).exists()]
        assert list((project.run_folder / "checkpoints").rglob("*.safetensors"))
        head.wait()
    assert head.code == 0, head.output
    assert [job["JobState"] for job in cluster.jobs("train_model")] == ["CANCELLED", "COMPLETED"]
    assert "from before the interruption" in project.log
    same_model(project, uninterrupted.run_folder)


def checkpointed(project: Project) -> bool:
    """Whether the training says that it has saved."""
    path = project.run_folder / "progress.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["last_checkpoint"] is not None
