"""An interruption of the subspace changes nothing: what it goes on to is equal to the last bit."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cryodrgn_pipeline import fourier_images
from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import Interrupted
from cryodrgn_pipeline.subspace import fit
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
    monkeypatch.setattr(fit, "FINEST_PX", 20)


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
