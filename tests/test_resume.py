"""An interruption of the subspace changes nothing: what it goes on to is equal to the last bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from typer.testing import CliRunner

from cryodrgn_pipeline import fourier_images
from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import InputFormatError, Interrupted
from cryodrgn_pipeline.subspace import fit, journal, levels
from cryodrgn_pipeline.subspace.journal import Journal
from cryodrgn_pipeline.subspace.run import SubspaceRequest, train_subspace

BOX = 24


class Killed(BaseException):
    """The process is gone: nothing more is written."""


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 particles of 24 px with a motion that the subspace finds."""
    folder = tmp_path_factory.mktemp("moving")
    for command in (
        f"simulate -o {folder}/set --box-size {BOX} --pixel-size 8 --particles 500 --snr 0.5 --seed 2",
        f"import {folder}/set/particles.star -o {folder}/import",
        f"preprocess {folder}/import --box-size {BOX} -o {folder}/stack",
    ):
        done = CliRunner().invoke(app, command.split(), catch_exceptions=False)
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(autouse=True)
def many_chunks_and_all_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four chunks a pass; some images find the subspace, the others follow; maps are made at a third box."""
    monkeypatch.setattr(fourier_images, "CHUNK_BYTES", 125 * 4 * BOX**2)
    monkeypatch.setattr(fit, "COARSE_IMAGES", 400)
    monkeypatch.setattr(levels, "FINEST_PX", 20)


@pytest.fixture
def request_for(moving: Path, tmp_path: Path):
    def make(name: str, **options) -> SubspaceRequest:
        base = SubspaceRequest(
            stack=moving / "stack",
            run=tmp_path / name,
            subset=None,
            latent_dim=3,
            decoder="kernel",
            threads=1,
        )
        return replace(base, **options)

    return make


def results(run: Path) -> tuple[dict, dict, list]:
    weights = load_file(run / "model.safetensors")
    table = pq.read_table(run / "latent.parquet").to_pydict()
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    return weights, table, rows


def assert_equal(one: Path, two: Path) -> None:
    (first, table, rows), (second, other_table, other_rows) = results(one), results(two)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert table == other_table
    assert rows == other_rows


def train_with_interruptions(request: SubspaceRequest, monkeypatch, every: int, how: str) -> int:
    """Train, stopped after each so many chunks or steps; how often it was."""
    look_up, count, interruptions = Journal._look_up, 0, 0

    def look_up_or_stop(self: Journal) -> None:
        nonlocal count
        count += 1
        if count % every == 0:
            if how == "killed":
                raise Killed
            self.stop.signal_number = signal.SIGTERM
        look_up(self)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_look_up", look_up_or_stop)
        while True:
            try:
                train_subspace(request)
            except (Interrupted, Killed):
                interruptions += 1
                assert interruptions < 500
                assert not (request.run / "run.json").exists()
                assert not (request.run / "latent.parquet").exists()
            else:
                return interruptions


@pytest.mark.parametrize(
    ("decoder", "how", "minutes", "every"),
    [
        ("kernel", "signal", 1e9, 23),
        ("kernel", "killed", 0.0, 31),
        ("linear", "killed", 0.0, 37),
        ("basis", "signal", 1e9, 41),
    ],
)
def test_an_interrupted_subspace_goes_on_to_the_same_result(
    request_for, monkeypatch, decoder, how, minutes, every
):
    monkeypatch.setattr("cryodrgn_pipeline.subspace.basis.FEWEST_STEPS", 20)
    monkeypatch.setattr("cryodrgn_pipeline.subspace.basis.PASSES", 1)
    whole, broken = (request_for(name, decoder=decoder) for name in ("whole", "broken"))
    train_subspace(whole)
    broken = replace(broken, checkpoint_every_minutes=minutes)
    assert train_with_interruptions(broken, monkeypatch, every, how) > 5
    assert_equal(whole.run, broken.run)
    assert json.loads((whole.run / "run.json").read_text())["components"] > 0
    assert not (broken.run / "checkpoints").exists()


def test_a_full_disk_names_the_checkpoint_and_what_was_written_before_is_gone_on_from(
    request_for, monkeypatch, tmp_path
):
    whole, broken = request_for("whole", decoder="linear"), request_for("broken", decoder="linear")
    train_subspace(whole)
    broken = replace(broken, checkpoint_every_minutes=0.0)
    save, written = journal.save_file, []

    def full(tensors, file, **options):
        if len(written) == 60:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        written.append(file)
        save(tensors, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "save_file", full)
        with pytest.raises(
            OSError, match=r"checkpoints/journal/.*GB could not be written .*No space.*make room"
        ):
            train_subspace(broken)
    kept = sorted((broken.run / "checkpoints" / "journal").iterdir())
    assert kept
    assert all(load_file(file) for file in kept)  # whole, and no temporary file among them
    assert json.loads((broken.run / "progress.json").read_text())["state"] == "failed"
    assert not (broken.run / "run.json").exists()
    train_subspace(broken)
    assert_equal(whole.run, broken.run)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tiny tmpfs needs root")
def test_a_disk_that_is_really_full_ends_a_subspace_and_goes_on_after_room_is_made(moving, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("this system does not let a test mount a tmpfs")
    try:
        words = f"train {moving}/stack -o {disk}/run --method subspace --latent-dim 3 --threads 1 --resume"
        command = [sys.executable, "-m", "cryodrgn_pipeline", *words.split()]
        command += ["--checkpoint-every-minutes", "1e-9"]
        first = subprocess.run(command, capture_output=True, text=True, check=False)
        assert first.returncode == 1, first.stderr
        assert "checkpoints/journal/" in first.stderr
        assert "No space left on device" in first.stderr
        assert "Traceback" not in first.stderr
        assert not (disk / "run" / "run.json").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 0, second.stderr
        assert "from before the interruption" in second.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


def test_checkpoints_of_other_images_or_settings_are_moved_aside(request_for, monkeypatch):
    request = request_for("run", decoder="linear")
    stop_at(20, monkeypatch, request)
    before = {file.name: file.read_bytes() for file in (request.run / "checkpoints" / "journal").iterdir()}
    train_subspace(replace(request, seed=1))
    (aside,) = request.run.glob("checkpoints.*")
    assert {file.name: file.read_bytes() for file in (aside / "journal").iterdir()} == before
    assert json.loads((request.run / "run.json").read_text())["settings"]["seed"] == 1


def test_without_resume_it_starts_over(request_for, monkeypatch, caplog):
    request = request_for("run", decoder="linear")
    stop_at(20, monkeypatch, request)
    with caplog.at_level("INFO"):
        train_subspace(replace(request, resume=False))
    assert "from before the interruption" not in caplog.text
    assert "--resume was not given" in caplog.text


def stop_at(count: int, monkeypatch: pytest.MonkeyPatch, request: SubspaceRequest) -> None:
    """Train until so many chunks or steps are done."""
    look_up, calls = Journal._look_up, []

    def stopping(self: Journal) -> None:
        calls.append(1)
        if len(calls) == count:
            self.stop.signal_number = signal.SIGTERM
        look_up(self)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_look_up", stopping)
        with pytest.raises(Interrupted):
            train_subspace(request)


def test_a_journal_of_another_version_is_not_read(request_for, monkeypatch, caplog):
    request = request_for("run", decoder="linear")
    stop_at(20, monkeypatch, request)
    monkeypatch.setattr(journal, "__version__", "0.0.1")
    with caplog.at_level("INFO"):
        train_subspace(request)
    assert "written by another version" in caplog.text
    assert "from before the interruption" not in caplog.text


def test_a_damaged_checkpoint_is_named(request_for, monkeypatch):
    request = request_for("run", decoder="linear")
    stop_at(20, monkeypatch, request)
    for file in (request.run / "checkpoints" / "journal").iterdir():
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputFormatError, match=r"journal/.*safetensors: damaged .*Remove it"):
        train_subspace(request)


def test_a_run_that_takes_less_than_the_minutes_writes_nothing(request_for, monkeypatch):
    written = []
    monkeypatch.setattr(journal, "save_file", lambda *_, **__: written.append(1))
    train_subspace(request_for("run", decoder="linear"))
    assert not written
