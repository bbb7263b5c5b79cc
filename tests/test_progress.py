"""What a run says of itself while it goes on."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from datetime import datetime
from pathlib import Path

import pytest

from cryodrgn_pipeline.errors import Interrupted
from cryodrgn_pipeline.io import progress_file
from cryodrgn_pipeline.io.runs import read_metrics
from cryodrgn_pipeline.progress import checkpointed, measured, progress, recorded
from cryodrgn_pipeline.subspace import em
from cryodrgn_pipeline.subspace.run import SubspaceRequest, train_subspace

KEYS = {
    "format", "state", "phase", "done", "total", "unit", "rate_per_s", "seconds_left", "epoch", "epochs",
    "loss", "last_checkpoint", "updated", "started", "host", "pid", "slurm_job_id",
}  # fmt: skip


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write progress.json at every change."""
    monkeypatch.setattr(progress_file, "INTERVAL_S", 0.0)


def said(run: Path) -> dict:
    return json.loads((run / "progress.json").read_text())


def test_a_run_says_what_it_is_at_and_who_computes(tmp_path, at_once, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with recorded(tmp_path):
        with progress("training", 30, done=10) as advance:
            measured([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}], epochs=6)
            checkpointed()
            advance(5)
        now = said(tmp_path)
        assert now.keys() == KEYS
        assert (now["format"], now["state"], now["phase"], now["unit"]) == (
            1,
            "running",
            "training",
            "images",
        )
        assert (now["done"], now["total"]) == (15, 30)
        # 5 images in this session, 15 left
        assert now["seconds_left"] == pytest.approx(15 / now["rate_per_s"], rel=0.1, abs=0.1)
        assert (now["epoch"], now["epochs"], now["loss"]) == (2, 6, 0.25)
        assert (now["host"], now["pid"], now["slurm_job_id"]) == (socket.gethostname(), os.getpid(), "4711")
        assert all(
            datetime.fromisoformat(now[key]).tzinfo for key in ("started", "updated", "last_checkpoint")
        )
        assert [row["loss"] for row in read_metrics(tmp_path)] == [0.5, 0.25]
    assert said(tmp_path)["state"] == "finished"


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (Interrupted(signal.SIGTERM), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (OSError("disk"), "failed"),
    ],
)
def test_a_run_says_how_it_ended(tmp_path, error, state):
    with pytest.raises(type(error)), recorded(tmp_path):
        raise error
    assert said(tmp_path)["state"] == state


def test_a_run_inside_a_run_has_a_record_of_its_own(tmp_path, at_once):
    with recorded(tmp_path / "whole"):
        with recorded(tmp_path / "half"), progress("half", 1) as advance:
            advance(1)
        with progress("whole", 1) as advance:
            advance(1)
    assert [said(tmp_path / name)["phase"] for name in ("half", "whole")] == ["half", "whole"]


def test_it_is_written_every_few_seconds_not_at_every_image(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(progress_file, "write_json", lambda path, content: written.append(dict(content)))
    clock = iter(range(0, 10_000))
    monkeypatch.setattr(progress_file.time, "monotonic", lambda: next(clock) / 100)
    with recorded(tmp_path), progress("training", 1000) as advance:
        for _ in range(1000):
            advance(1)
    assert 3 < len(written) < 10
    assert written[-1]["done"] == 1000


def test_where_it_cannot_be_written_the_run_goes_on(tmp_path, at_once, monkeypatch, caplog):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(progress_file, "write_json", full)
    with caplog.at_level(logging.WARNING), recorded(tmp_path), progress("training", 2) as advance:
        advance(1)
        advance(1)
    assert [record.message for record in caplog.records] == [
        f"progress cannot be recorded: [Errno 28] No space left on device: '{tmp_path}/progress.json'"
    ]


def test_a_subspace_shows_its_passes_and_its_iterations_while_it_learns(
    tiny_set, tmp_path, at_once, monkeypatch
):
    run, seen, solve = tmp_path / "run", [], em.solve

    def solve_and_look(*args, **options):
        rows = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        seen.append(said(run) | {"rows": len(rows)})
        return solve(*args, **options)

    monkeypatch.setattr(em, "solve", solve_and_look)
    request = SubspaceRequest(stack=tiny_set / "stack", run=run, subset=None, latent_dim=2, decoder="linear")
    train_subspace(request)
    assert {now["phase"] for now in seen} == {"16 px: sums over images"}
    assert all(now["done"] == now["total"] for now in seen)
    assert [now["rows"] for now in seen][-1] == 9
    assert (seen[-1]["epoch"], seen[-1]["epochs"]) == (9, 10)
    end = said(run)
    assert (end["state"], end["epoch"], end["phase"]) == ("finished", 10, "16 px: sums over images")
