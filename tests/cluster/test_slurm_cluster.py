"""The cluster that the tests start: where it refuses, and that nothing of it stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import slurm_cluster
from slurm_cluster import PREFIX, SlurmCluster, why_not

CHECKOUT = Path(__file__).resolve().parents[2]


def test_a_user_without_rights_is_told_that_root_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() == "a Slurm of our own needs root"


def test_a_machine_with_a_slurm_of_its_own_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    theirs = tmp_path / "slurm.conf"
    theirs.write_text("ClusterName=theirs\n", encoding="utf-8")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(slurm_cluster, "LINK", theirs)
    assert "has a Slurm of its own" in str(why_not())


def test_a_machine_without_slurm_and_apt_is_told_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(slurm_cluster, "LINK", tmp_path / "slurm.conf")
    monkeypatch.setattr(slurm_cluster.shutil, "which", lambda *_, **__: None)
    assert why_not() == "not installed, and no apt-get to install it: slurmctld, slurmd, sbatch, munged"


@pytest.mark.parametrize(("ci", "reason"), [("true", "no cluster here"), ("", "make test-cluster")])
def test_tests_that_cannot_have_a_slurm_skip_and_say_why(tmp_path: Path, ci: str, reason: str) -> None:
    (tmp_path / "conftest.py").write_text(
        "import slurm_cluster\n"
        "slurm_cluster.why_not = lambda: 'no cluster here'\n"
        f"exec(open({str(CHECKOUT / 'tests/cluster/conftest.py')!r}).read())\n",
        encoding="utf-8",
    )
    (tmp_path / "test_it.py").write_text("def test_it(cluster): assert False\n", encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(tmp_path)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "CI": ci}
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 skipped" in done.stdout
    assert reason in done.stdout


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slurm
def test_nothing_of_a_cluster_stays(slurm_programs: None) -> None:
    policy_was_there = slurm_cluster.POLICY.exists()
    with SlurmCluster(nodes=2) as cluster:
        root = cluster.root
        assert slurm_cluster.LINK.readlink() == root / "etc" / "slurm.conf"
        sleeping = cluster.client("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 1000").strip()
        slurm_cluster.until(
            lambda: cluster.jobs_by_id()[sleeping]["JobState"] == "RUNNING", "the job running"
        )
        with pytest.raises(TimeoutError, match="another test run"), SlurmCluster(patience_s=0):
            pass
        assert cluster.jobs_by_id()[sleeping]["JobState"] == "RUNNING"
    assert not root.exists()
    assert not os.path.lexists(slurm_cluster.LINK)
    assert slurm_cluster.POLICY.exists() == policy_was_there
    names = {"slurmctld", "slurmd", "munged", "slurmstepd"}
    left = [process.info for process in psutil.process_iter(["name", "status"])]
    assert not [one for one in left if one["name"] in names and one["status"] != psutil.STATUS_ZOMBIE]


@pytest.mark.slurm
def test_what_a_killed_test_run_left_is_removed(slurm_programs: None) -> None:
    code = (
        "import os, slurm_cluster\n"
        "cluster = slurm_cluster.SlurmCluster().__enter__()\n"
        "cluster.client('sbatch', '--output=/dev/null', '--wrap=sleep 86399')\n"
        "slurm_cluster.until(lambda: cluster.client('squeue', '-h', '-t', 'R').strip(), 'the job running')\n"
        "print(cluster.root, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    left = Path(killed.stdout.strip())
    assert left.name.startswith(PREFIX)
    assert left.is_dir()
    with SlurmCluster() as cluster:
        assert not left.exists()
        assert cluster.jobs_by_id() == {}
    running = [process for process in psutil.process_iter(["name"]) if "86399" in command_line(process)]
    assert not running
    keepers = [one for one in psutil.process_iter(["name", "status"]) if one.info["name"] == "slurmstepd"]
    assert not [one for one in keepers if one.info["status"] != psutil.STATUS_ZOMBIE]
