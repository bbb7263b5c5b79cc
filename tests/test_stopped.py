"""A verb that is stopped, or finds the disk full: its exit code, what it says, and what it leaves."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cryodrgn_pipeline.cli as command_line
from cryodrgn_pipeline import consensus, stack_run, volumes
from cryodrgn_pipeline.errors import CryodrgnPipelineError
from cryodrgn_pipeline.io import output_lock
from cryodrgn_pipeline.io.output_lock import held, sole_writer
from cryodrgn_pipeline.subspace.journal import Journal
from cryodrgn_pipeline.training import state


@pytest.fixture
def run_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command line as its user does, in this process; gives exit code and stderr."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cryodrgn-pipeline", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            command_line.main()
        return int(end.value.code or 0), capsys.readouterr().err

    return run


def on_call(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, act: Callable[[], None], *, at: int = 2
) -> None:
    """Do something at a call of a function, and only then."""
    real, calls = getattr(owner, name), []

    def acting(*args, **options):
        calls.append(name)
        if len(calls) == at:
            act()
        return real(*args, **options)

    monkeypatch.setattr(owner, name, acting)


def stopping(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def trained(tiny_set: Path) -> Path:
    run = tiny_set / "run_of_stopped"
    words = f"train {tiny_set}/stack -o {run} --method subspace --latent-dim 1 --threads 1"
    subprocess.run(
        [sys.executable, "-m", "cryodrgn_pipeline", *words.split()], check=True, capture_output=True
    )
    return run


def test_a_stopped_preprocess_leaves_nothing(tiny_set, tmp_path, run_verb, monkeypatch):
    words = ["preprocess", tiny_set / "import", "--box-size", 12, "-o", tmp_path / "stack"]
    on_call(monkeypatch, stack_run.MrcStackWriter, "append", stopping(signal.SIGTERM), at=1)
    on_call(
        monkeypatch, stack_run.MrcStackWriter, "__exit__", stopping(signal.SIGTERM), at=1
    )  # Slurm's second
    code, said = run_verb(*words)
    assert code == 143, said
    assert "stopped by signal 15: what was not whole is removed" in said
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_consensus_is_not_taken_as_whole(tiny_set, tmp_path, run_verb, monkeypatch):
    words = ["consensus", tiny_set / "stack", "--check", "off", "-o", tmp_path / "consensus"]
    assert run_verb(*words)[0] == 0
    with monkeypatch.context() as patch:
        on_call(patch, consensus, "write_volume", stopping(signal.SIGTERM))
        code, said = run_verb(*words)
    assert code == 143, said
    assert not (tmp_path / "consensus" / "consensus.json").exists()
    assert not list((tmp_path / "consensus").glob(".*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_volumes_leave_the_older_ones(trained, tmp_path, run_verb, monkeypatch, number, code):
    words = ["volumes", trained, "--kmeans", 3, "-o", tmp_path / "volumes"]
    assert run_verb(*words)[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "volumes").iterdir()}
    with monkeypatch.context() as patch:
        on_call(patch, volumes, "write_volume", stopping(number))
        assert run_verb(*words)[0] == code
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "volumes").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["volumes"]


@contextmanager
def held_until_slurms_second_signal(*where: Path) -> Iterator[None]:
    with held(*where):
        try:
            yield
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_subspace_keeps_a_checkpoint_and_says_so(
    tiny_set, tmp_path, run_verb, monkeypatch, number, code
):
    run = tmp_path / "run"
    words = [
        "train",
        tiny_set / "stack",
        "-o",
        run,
        "--method",
        "subspace",
        "--latent-dim",
        1,
        "--threads",
        1,
    ]
    with monkeypatch.context() as patch:
        on_call(patch, Journal, "_look_up", stopping(number))
        patch.setattr(state, "held", held_until_slurms_second_signal)
        found, said = run_verb(*words)
    assert found == code, said
    assert "a checkpoint is kept; go on with the same command and --resume" in said
    progress = json.loads((run / "progress.json").read_text())
    assert progress["state"] == "interrupted"
    assert progress["last_checkpoint"] is not None
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "progress.json"]
    assert list((run / "checkpoints" / "journal").iterdir())
    assert run_verb(*words, "--resume")[0] == 0
    assert json.loads((run / "progress.json").read_text())["state"] == "finished"


ENDS_AND_IS_STOPPED = """
import atexit, os, signal, sys
from cryodrgn_pipeline.cli import main
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
sys.argv[1:] = ["--version"]
main()
"""


def test_a_signal_that_comes_when_the_command_has_ended_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-c", ENDS_AND_IS_STOPPED], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_a_second_writer_is_told_who_the_first_is(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    who = f"process {os.getpid()} on {socket.gethostname()}, Slurm job 4711"
    lock = tmp_path / ".lock"
    lock.write_text("what one that was killed left " * 20)
    with (
        held(lock, tmp_path),
        pytest.raises(CryodrgnPipelineError, match=f"{who} holds"),
        held(lock, tmp_path),
    ):
        pass


def test_a_lock_that_its_holder_removes_as_it_is_opened_does_not_count(tmp_path, monkeypatch):
    lock = tmp_path / ".lock"
    on_call(monkeypatch, fcntl, "flock", lock.unlink, at=1)
    with (
        held(lock, tmp_path),
        pytest.raises(CryodrgnPipelineError, match="holds"),
        held(lock, tmp_path),
    ):
        pass


HOLDS_AND_DIES = """
import os, signal, sys
from pathlib import Path
from cryodrgn_pipeline.io import output_lock
{before}
with output_lock.held(Path(sys.argv[1]), Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""
NO_LOCKS = """
import errno, fcntl
def none(*_):
    raise OSError(errno.ENOLCK, "no locks")
fcntl.flock = none
"""


@pytest.mark.parametrize("locks", [True, False])
def test_the_lock_of_a_killed_process_does_not_hold_up_the_next(tmp_path, monkeypatch, locks):
    lock = tmp_path / ".lock"
    script = HOLDS_AND_DIES.format(before="" if locks else NO_LOCKS)
    died = subprocess.run([sys.executable, "-c", script, lock], check=False)
    assert died.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir())
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    with held(lock, tmp_path):
        pass
    with held(lock, tmp_path):
        pass


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "no locks")


@pytest.mark.parametrize(
    ("holder", "job", "free"),
    [
        ({"host": "elsewhere", "pid": 1, "slurm_job_id": None}, "4711", False),
        ({"host": "elsewhere", "pid": 1, "slurm_job_id": None}, None, False),
        # this job, before it was requeued
        ({"host": "elsewhere", "pid": 1, "slurm_job_id": "4711"}, "4711", True),
        ({"host": "elsewhere", "pid": 1, "slurm_job_id": "4712"}, "4711", False),
        ({"host": socket.gethostname(), "pid": os.getpid(), "slurm_job_id": None}, "4711", False),
    ],
)
def test_where_there_are_no_locks_a_file_says_who_writes(tmp_path, monkeypatch, holder, job, free):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    claim = tmp_path / ".out.lock.held"
    claim.write_text(json.dumps(holder))
    if free:
        with sole_writer(tmp_path / "out"):
            assert json.loads(claim.read_text()) == output_lock._self()
        assert not claim.exists()
    else:
        message = f"{holder['host']}.*if it is dead, remove that file"
        with pytest.raises(CryodrgnPipelineError, match=message), sole_writer(tmp_path / "out"):
            pass
        assert json.loads(claim.read_text()) == holder


def test_a_full_disk_names_the_file_and_the_cure(trained, tmp_path, run_verb, monkeypatch):
    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(volumes, "write_volume", full)
    code, said = run_verb("volumes", trained, "--kmeans", 3, "-o", tmp_path / "volumes")
    assert code == 1
    assert "No space left on device" in said
    assert "vol_000.mrc" in said
    assert "Make room, then run the same command again" in said
    assert list(tmp_path.iterdir()) == []
