"""Where jobs stand, from the files that they leave."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.config import load_config
from cryodrgn_pipeline.watching.look import Job, jobs_in, jobs_of

PROGRESS = {
    "format": 1, "state": "running", "phase": "training", "done": 4000, "total": 10000, "unit": "images",
    "rate_per_s": 250.0, "seconds_left": 24.0, "epoch": 3, "epochs": 20, "loss": 0.8125,
    "last_checkpoint": None, "started": "2026-01-01T00:00:00+00:00", "host": "node7", "pid": 1,
    "slurm_job_id": "4711",
}  # fmt: skip


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two runs on two subsets, of which import, one stack and nothing else is done."""
    dataset = {
        "particles": "run_data.star",
        "subsets": {"few": {"ids": "few.txt"}},
        "runs": {"vae": {"subsets": ["all", "few"]}, "big": {"box_size_px": 64}},
    }
    config = {"datasets": {"mine": dataset}, "preprocess": {"box_size_px": 32}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    leave(tmp_path / "results/mine/import/import.json")
    leave(tmp_path / "results/mine/stack_32/stack.json")
    return tmp_path


def leave(path: Path, content: object = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def says(project: Path, subset: str, run: str, **changes: object) -> None:
    leave(project / "results/mine" / subset / run / "progress.json", PROGRESS | {"updated": ago(2)} | changes)


def jobs(project: Path) -> dict[tuple[str, str | None, str | None], Job]:
    found = jobs_of(load_config(project / "config.yaml"), project)
    return {(job.step, job.subset, job.run): job for job in found}


def test_every_job_that_is_asked_for_is_there_before_it_begins(project):
    states = {key: job.state for key, job in jobs(project).items()}
    once = {("import", None, None): "finished", ("preprocess, 32 px", None, None): "finished"}
    once |= {
        (f"{step} px", None, None): "waiting" for step in ("consensus, 32", "preprocess, 64", "consensus, 64")
    }
    each = [("all", "vae"), ("few", "vae"), ("all", "big")]
    assert states == once | {
        (step, *run): "waiting" for step in ("train", "analyze", "report") for run in each
    }


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "running"),
        ({"updated": ago(3600)}, "no sign of life"),
        ({"pid": 2**22 + 1}, "running"),  # on another machine that number says nothing
        ({"host": socket.gethostname(), "pid": os.getpid()}, "running"),
        (
            {"host": socket.gethostname(), "pid": 2**22 + 1},
            "no sign of life",
        ),  # beyond the largest there can be
        ({"state": "interrupted", "updated": ago(3600)}, "interrupted"),
        ({"state": "failed"}, "failed"),
        ({"state": "finished"}, "waiting"),  # its results were taken away: it is to be made again
    ],
)
def test_a_training_is_what_its_progress_says_while_it_lives(project, changes, state):
    says(project, "all", "vae", **changes)
    found = jobs(project)
    assert found["train", "all", "vae"].state == state
    assert found["train", "few", "vae"].state == "waiting"


def test_a_finished_training_is_told_by_its_manifest(project):
    leave(project / "results/mine/all/vae/run.json")
    assert jobs(project)["train", "all", "vae"].state == "finished"
    says(project, "all", "vae", state="finished", epoch=20)
    finished = jobs(project)["train", "all", "vae"]
    assert (finished.state, finished.progress["epoch"]) == ("finished", 20)


@pytest.mark.parametrize(
    ("text", "age_s", "state"),
    [
        ("10:00:00 INFO consensus: 300 of 4000 images, 90 images/s, 41 s left\n", 5, "running"),
        ("10:00:00 INFO consensus: 300 of 4000 images, 90 images/s, 41 s left\n", 5000, "no sign of life"),
        ("10:00:00 INFO begins\nerror: stack_32: damaged\n", 5, "failed"),
        ("10:00:00 INFO begins\nstopped by signal 15: it starts over\n\n", 5, "interrupted"),
    ],
)
def test_other_steps_are_what_their_logs_say(project, text, age_s, state):
    log = project / "logs/mine/consensus_32.log"
    leave(log, text)
    then = datetime.now(UTC).timestamp() - age_s
    os.utime(log, (then, then))
    job = jobs(project)["consensus, 32 px", None, None]
    assert (job.state, job.said) == (state, text.strip().splitlines()[-1])
    leave(project / "results/mine/consensus_32/consensus.json")
    job = jobs(project)["consensus, 32 px", None, None]
    assert (job.state, job.said) == ("finished", "")


def test_series_of_volumes_are_shown_as_they_come(project):
    leave(project / "results/mine/all/vae/volumes/pc1/volumes.parquet")
    leave(project / "logs/mine/all/vae/volumes_centers.log", "decoding volumes: 3 of 20 volumes")
    found = jobs(project)
    assert found["volumes, pc1", "all", "vae"].state == "finished"
    assert found["volumes, centers", "all", "vae"].state == "running"


def test_a_folder_of_results_is_enough(project):
    says(project, "few", "vae")
    found = jobs_in(project / "results", project / "logs")
    assert [(job.step, job.state) for job in found if job.run is None] == [
        ("import", "finished"),
        ("preprocess, 32 px", "finished"),
        ("consensus, 32 px", "waiting"),
    ]
    assert {(job.subset, job.run) for job in found if job.run} == {("few", "vae")}


def status(*words: object) -> str:
    done = CliRunner().invoke(app, ["status", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_table_says_how_far_where_and_how_long(project):
    says(project, "all", "vae", last_checkpoint=ago(7200), phase="64 px: sums over images")
    text = status("--configfile", project / "config.yaml", "-d", project)
    (row,) = [line for line in text.splitlines() if "running" in line]
    for part in (
        "all/vae",
        "train",
        "3/20",
        "0.8125",
        "250 images/s",
        "24 s",
        "2 h 0",
        "node7",
        "4711",
        "sums over",
    ):
        assert part in row
    says(project, "all", "vae", updated=ago(7200))
    assert "no sign of life for 2 h 00 min" in status("--configfile", project / "config.yaml", "-d", project)


def test_json_has_every_job_with_what_it_says(project):
    says(project, "all", "vae")
    content = json.loads(status("--results", project / "results", "--json"))
    (training,) = [job for job in content if job["step"] == "train"]
    assert (training["dataset"], training["subset"], training["run"]) == ("mine", "all", "vae")
    assert training["progress"]["loss"] == 0.8125


def test_watching_ends_when_all_is_finished(project, monkeypatch):
    moments = []

    def next_moment(seconds: float) -> None:
        moments.append(seconds)
        for job in ("run.json", "analysis/analysis.json", "report.html"):
            leave(project / "results/mine/all/vae" / job)
        leave(project / "results/mine/consensus_32/consensus.json")

    monkeypatch.setattr("time.sleep", next_moment)
    says(project, "all", "vae")
    text = status("--results", project / "results", "--watch", 7)
    assert moments == [7]
    assert "finished" in text


def test_a_run_as_it_is_trained_is_read_as_finished(tiny_set, tmp_path):
    run = tmp_path / "results/mine/all/subspace"
    leave(tmp_path / "results/mine/import/import.json")
    words = f"train {tiny_set}/stack -o {run} --method subspace --latent-dim 1 --threads 1"
    done = CliRunner().invoke(app, words.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (training,) = [job for job in jobs_in(tmp_path / "results", tmp_path / "logs") if job.step == "train"]
    assert training.state == "finished"
    assert training.progress["epoch"] == training.progress["epochs"]
    assert training.progress["host"] == socket.gethostname()
