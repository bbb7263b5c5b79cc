"""Several processes that compute one result: what two of them find is what one finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch
from ranks_program import DECODERS, KINDS, reconstructed, subspace, train
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import ConfigError, LostRankError
from cryodrgn_pipeline.io.checkpoints import load_state
from cryodrgn_pipeline.launch import run_in_processes

PROGRAM = Path(__file__).with_name("ranks_program.py")


@pytest.fixture(scope="module")
def linear_run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subspace of the particles, learnt by one process."""
    run = tmp_path_factory.mktemp("linear") / "run"
    subspace(tiny_set / "stack", run)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks write."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stack of a set whose images support components."""
    at = tmp_path_factory.mktemp("larger")
    for words in (
        f"simulate -o {at}/set --box-size 20 --pixel-size 9.6 --particles 600 --snr 0.45",
        f"import {at}/set/particles.star -o {at}/import",
        f"preprocess {at}/import --box-size 20 -o {at}/stack",
    ):
        assert CliRunner().invoke(app, words.split(), catch_exceptions=False).exit_code == 0
    return at / "stack"


@pytest.fixture(scope="module")
def two_ranks(tiny_set: Path, linear_run: Path, larger: Path, folder: Path) -> list[dict]:
    """What each of two ranks found, by gloo on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, *map(str, (PROGRAM, tiny_set / "stack", linear_run, larger, folder))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [load_state(folder / f"rank{rank}.pt") for rank in range(2)]


def test_shares_are_gathered_sums_and_maxima_are_those_of_all_and_the_first_is_told(
    two_ranks: list[dict],
) -> None:
    first, second = (found["primitives"] for found in two_ranks)
    assert [first["share"].tolist(), second["share"].tolist()] == [[0, 3], [3, 7]]
    for found in (first, second):
        assert found["gathered"].tolist() == [[i, -i] for i in range(7)]
        assert found["sum"] == 21
        assert found["told"] == 5
        assert found["largest"].tolist() == [1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_the_model_that_one_process_learns(
    two_ranks: list[dict], tiny_set: Path, kind: str
) -> None:
    alone = train(kind, tiny_set / "stack")
    first, second = (found[kind] for found in two_ranks)
    for name, value in alone["gradients"].items():
        torch.testing.assert_close(first["gradients"][name], value, atol=1e-5, rtol=1e-4)
    for name, value in alone["model"].items():
        torch.testing.assert_close(first["model"][name], value, atol=1e-5, rtol=1e-4)
        assert torch.equal(first["model"][name], second["model"][name])
    for one, two in zip(alone["progress"]["metrics"], first["progress"]["metrics"], strict=True):
        for name in ("loss", "reconstruction", "kld", "held_out_reconstruction", "held_out_kld"):
            assert two[name] == pytest.approx(one[name], rel=1e-5)
        assert two["step"] == one["step"]
    for name, value in alone["latents"].items():
        torch.testing.assert_close(first["latents"][name], value, atol=1e-4, rtol=1e-4)


def test_two_ranks_make_the_consensus_and_the_volumes_that_one_process_makes(
    two_ranks: list[dict], tiny_set: Path, linear_run: Path, folder: Path, tmp_path: Path
) -> None:
    reconstructed(tiny_set / "stack", linear_run, tmp_path)
    maps = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.mrc"))
    assert len(maps) == 4 + 2 + 4
    for path in maps:
        expected = mrcfile.read(tmp_path / path)
        assert np.abs(mrcfile.read(folder / path) - expected).max() < 1e-4 * np.abs(expected).max()
    one, two = (pd.read_parquet(at / "volumes" / "volumes.parquet") for at in (tmp_path, folder))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.parametrize("decoder", DECODERS)
def test_two_ranks_find_the_subspace_that_one_process_finds(
    two_ranks: list[dict], larger: Path, folder: Path, tmp_path: Path, decoder: str
) -> None:
    subspace(larger, tmp_path, decoder)
    alone, together = (json.loads((run / "run.json").read_text()) for run in (tmp_path, folder / decoder))
    assert alone["components"] > 0
    assert together["components"] == alone["components"]
    assert (alone["processes"], together["processes"]) == (1, 2)
    one, two = (pd.read_parquet(run / "latent.parquet") for run in (tmp_path, folder / decoder))
    assert one.particle_id.equals(two.particle_id)
    one, two = (table.drop(columns="particle_id").to_numpy(dtype=float) for table in (one, two))
    spread = one.std(axis=0) + 1e-6
    assert (np.abs(two - one) / spread).max() < 1e-2
    assert not (folder / decoder / "checkpoints").exists()


def test_ranks_stop_together_inside_a_pass_and_go_on_to_the_same_subspace(
    two_ranks: list[dict], folder: Path
) -> None:
    whole, stopped = (pd.read_parquet(folder / run / "latent.parquet") for run in ("linear", "interrupted"))
    pd.testing.assert_frame_equal(stopped, whole)


def command(stack: Path, run: Path, epochs: int, processes: int) -> list[str]:
    """A training that saves with every batch."""
    return (
        f"train {stack} -o {run} --encoder image --decoder mlp --epochs {epochs} --processes {processes} "
        "--encoder-width 16 --decoder-width 16 --latent-dim 2 --checkpoint-every-minutes 1e-9 --threads 2 "
        "--device cpu --resume"
    ).split()


def start_training(stack: Path, run: Path) -> subprocess.Popen:
    """It, in two processes, without an end."""
    words = [sys.executable, "-m", "cryodrgn_pipeline", *command(stack, run, 100_000, 2)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def wait_for_a_new_state(run: Path, process: subprocess.Popen) -> None:
    path = run / "checkpoints" / "state.pt"
    before, deadline = path.stat().st_mtime_ns if path.exists() else 0, time.monotonic() + 240
    while not path.exists() or path.stat().st_mtime_ns == before:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        os.sched_yield()


def test_processes_are_interrupted_together_a_lost_one_ends_all_and_any_number_goes_on(
    tiny_set: Path, tmp_path: Path
) -> None:
    stack, run = tiny_set / "stack", tmp_path / "run"
    stopped = start_training(stack, run)
    wait_for_a_new_state(run, stopped)
    stopped.send_signal(signal.SIGTERM)
    _, log = stopped.communicate()
    assert stopped.returncode == 128 + signal.SIGTERM, log
    assert "in 2 processes" in log
    assert "Warning" not in log
    assert "a checkpoint; go on with the same command and --resume" in log
    steps = load_state(run / "checkpoints" / "state.pt")["progress"]["step"]

    robbed = start_training(stack, run)
    wait_for_a_new_state(run, robbed)
    second = Path(f"/proc/{robbed.pid}/task/{robbed.pid}/children").read_text().split()[-1]
    os.kill(int(second), signal.SIGKILL)
    _, log = robbed.communicate()
    assert robbed.returncode == 1, log
    assert "of 2 on this node was killed by signal 9" in log
    assert "Traceback" not in log
    assert not (run / "run.json").exists()
    state = load_state(run / "checkpoints" / "state.pt")
    assert state["progress"]["step"] > steps

    alone = CliRunner().invoke(app, command(stack, run, state["epoch"] + 1, 1), catch_exceptions=False)
    assert alone.exit_code == 0
    assert "resuming after" in alone.stderr
    assert json.loads((run / "run.json").read_text())["epochs"] == state["epoch"] + 1


def test_several_nodes_need_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    with pytest.raises(ConfigError, match=r"--nodes 3: .*srun --nodes 3 --ntasks 3 cryodrgn-pipeline train"):
        run_in_processes(2, 3)


LOST = LostRankError.exit_code


@pytest.mark.parametrize(
    ("ended", "code", "said"),
    [  # exit codes of the ranks, in the order in which they ended
        ({0: LOST, 1: -9}, 1, "process 2 of 2 on this node was killed by signal 9"),
        ({1: 3, 0: LOST}, 3, ""),
        ({1: 3, 0: -15}, 3, ""),
        ({1: LOST, 0: LOST}, 1, "the processes on another node were lost"),
    ],
)
def test_the_first_process_that_failed_itself_gives_exit_code_and_reason(
    ended: dict[int, int],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures = {}
    for when, (rank, exit_code) in enumerate(ended.items()):
        failures[rank] = ProcessFailure(rank, 1, exit_code, str(tmp_path / "no_error_file"))
        failures[rank].timestamp = when

    def launch(*_: object) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise ChildFailedError("train", failures)

        return fail

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", launch)
    assert run_in_processes(2, 1) == code
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)
