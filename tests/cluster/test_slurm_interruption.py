"""A training that is interrupted on the cluster goes on from its checkpoint and ends as if nothing had been.

The numbers are compared on one thread of a CPU, where the same seed gives the same run. Each test looks at
the run folder after the interruption: a checkpoint, and none of the results.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from interrupted import Make, goes_on, same_result, the_training, unfinished
from projects import TRAINED
from slurm_cluster import SlurmCluster, kill_tree, until

pytestmark = [pytest.mark.slurm, pytest.mark.heavy]


@pytest.fixture
def tidy(cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The shared cluster, its queue empty again afterwards."""
    yield cluster
    cluster.tidy()


def test_a_cancelled_training_goes_on_when_it_is_run_again(
    make: Make, tmp_path: Path, tidy: SlurmCluster, uninterrupted: Path
) -> None:
    project = make(tmp_path / "project")
    with project.started("--retries", "0", TRAINED) as head:
        job = the_training(tidy, project)
        seen = project.epoch
        tidy.client("scancel", job["JobId"])
        head.wait()
    assert head.code == 1
    assert "CANCELLED" in head.output
    unfinished(project)
    again = project.on_cluster(TRAINED)
    assert again.code == 0, again.output
    goes_on(project, uninterrupted, after=seen)


def test_a_training_out_of_time_is_queued_again_with_more_and_goes_on(
    make: Make, tmp_path: Path, tidy: SlurmCluster, uninterrupted: Path
) -> None:
    project = make(tmp_path / "project")
    with project.started(TRAINED) as head:
        first = the_training(tidy, project)
        seen = project.epoch
        tidy.client("scontrol", "update", f"JobId={first['JobId']}", "EndTime=now")
        until(lambda: tidy.jobs_by_id()[first["JobId"]]["JobState"] == "TIMEOUT", "the end of its time")
        unfinished(project)
        head.wait()
    assert head.code == 0, head.output
    ended, second = tidy.jobs("train_model")[-2:]
    assert ended["JobState"] == "TIMEOUT"
    assert (first["TimeLimit"], second["TimeLimit"]) == ("00:10:00", "00:20:00")
    assert "mem=2000M" in second["TRES"]
    goes_on(project, uninterrupted, after=seen)


def test_a_training_on_a_node_that_goes_down_goes_on_elsewhere(
    make: Make, tmp_path: Path, tidy: SlurmCluster, uninterrupted: Path
) -> None:
    project = make(tmp_path / "project")
    with project.started(TRAINED) as head:
        job = the_training(tidy, project)
        seen = project.epoch
        tidy.lose_node(job["NodeList"])
        try:
            unfinished(project)
            head.wait()
        finally:
            tidy.bring_back(job["NodeList"])
    assert head.code == 0, head.output
    after = tidy.jobs_by_id()[job["JobId"]]
    assert (after["JobState"], after["Restarts"]) == ("COMPLETED", "1")
    assert after["NodeList"] != job["NodeList"]
    goes_on(project, uninterrupted, after=seen - 10)  # saved every ten epochs


def test_a_killed_head_leaves_its_training_alone_and_the_next_one_starts_no_second_writer(
    make: Make, tmp_path: Path, tidy: SlurmCluster, uninterrupted: Path
) -> None:
    project = make(tmp_path / "project")
    with project.started(TRAINED) as head:
        first = the_training(tidy, project)
        training = project.pid
        kill_tree(head.process.pid)
    assert tidy.jobs_by_id()[first["JobId"]]["JobState"] == "RUNNING"
    locked = project.on_cluster(TRAINED)
    assert locked.code == 1
    assert "--unlock" in locked.output
    project.verb("run", "--cores", "1", "--unlock")
    again = project.on_cluster("--retries", "0", TRAINED)
    assert again.code == 1
    assert f"another process is writing it: process {training} on" in again.output
    unfinished(project)
    os.kill(training, signal.SIGCONT)
    until(lambda: tidy.jobs_by_id()[first["JobId"]]["JobState"] == "COMPLETED", "the first training's end")
    last = project.on_cluster(TRAINED)
    assert last.code == 0, last.output
    same_result(project, uninterrupted)


def test_a_full_disk_stops_a_training_and_more_room_lets_it_go_on(
    make: Make, tmp_path: Path, tidy: SlurmCluster, uninterrupted: Path
) -> None:
    project = make(tmp_path / "project")
    small = project.folder / "results" / "mine" / "all"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small], check=True)
    try:
        with project.started("--retries", "0", TRAINED) as head:
            the_training(tidy, project)
            fill_up(small / "somebody_elses_file")
            os.kill(project.pid, signal.SIGCONT)
            head.wait()
        assert head.code == 1
        assert "No space left" in head.output
        unfinished(project)
        subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
        again = project.on_cluster(TRAINED)
        assert again.code == 0, again.output
        goes_on(project, uninterrupted, after=10)
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


def fill_up(path: Path) -> None:
    """Write until the file system is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_ctrl_c_cancels_the_jobs_and_the_training_saves(
    make: Make, tmp_path: Path, tidy: SlurmCluster, uninterrupted: Path
) -> None:
    project = make(tmp_path / "project")
    with project.started(TRAINED) as head:
        job = the_training(tidy, project)
        seen = project.epoch
        os.killpg(head.process.pid, signal.SIGINT)
        head.wait()
    assert head.code != 0
    until(lambda: not tidy.active("train_model"), "a cancelled training")
    assert tidy.jobs_by_id()[job["JobId"]]["JobState"] == "CANCELLED"
    unfinished(project)
    again = project.on_cluster(TRAINED)
    assert again.code == 0, again.output
    goes_on(project, uninterrupted, after=seen)
