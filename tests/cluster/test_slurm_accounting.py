"""A cluster as most sites have it: accounts, jobs that others may push aside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from interrupted import Make, goes_on, the_training, unfinished
from projects import RUN, TRAINED
from slurm_cluster import SlurmCluster, until

pytestmark = [pytest.mark.slurm, pytest.mark.heavy]
WITH_ACCOUNT = {"# slurm_account: YOUR_ACCOUNT": "slurm_account: lab"}


@pytest.fixture(scope="module")
def site(slurm_programs: None) -> Iterator[SlurmCluster]:
    """One node, accounting, and a partition whose jobs push those of the others aside."""
    with SlurmCluster(accounting=True, preemption=True) as up:
        yield up


def test_jobs_are_charged_to_the_account_of_the_profile_and_watched_by_sacct(
    make: Make, tmp_path: Path, site: SlurmCluster
) -> None:
    project = make(tmp_path / "project", train={"epochs": 2}, profile=WITH_ACCOUNT)
    head = project.on_cluster(f"{RUN}/analysis/analysis.json")
    assert head.code == 0, head.output
    jobs = site.jobs()
    assert [job["Comment"].partition("_wildcards")[0] for job in jobs] == [
        "rule_train_model",
        "rule_analyze_latent",
    ]
    accounted = site.client("sacct", "-X", "-n", "-P", "-o", "JobID,Account,State,AllocTRES").splitlines()
    rows = {row.split("|")[0]: row.split("|")[1:] for row in accounted}
    assert [rows[job["JobId"]][:2] for job in jobs] == [["lab", "COMPLETED"]] * 2
    assert "gres/gpu=1" in rows[jobs[0]["JobId"]][2]
    assert "gpu" not in rows[jobs[1]["JobId"]][2]
    assert (project.run_folder / "analysis" / "particles.parquet").is_file()


def test_an_account_that_does_not_exist_is_named(make: Make, tmp_path: Path, site: SlurmCluster) -> None:
    wrong = {"# slurm_account: YOUR_ACCOUNT": "slurm_account: nobodys"}
    before = site.jobs_by_id().keys()
    head = make(tmp_path / "project", profile=wrong).on_cluster("--retries", "0", TRAINED)
    assert head.code == 1
    assert "nobodys" in head.output
    assert site.jobs_by_id().keys() == before


def test_a_training_that_is_pushed_aside_waits_its_turn_and_goes_on(
    make: Make, tmp_path: Path, site: SlurmCluster, uninterrupted: Path
) -> None:
    project = make(tmp_path / "project", profile=WITH_ACCOUNT)
    with project.started(TRAINED) as head:
        job = the_training(site, project)
        seen = project.epoch
        urgent = ("--partition=high", f"--cpus-per-task={site.cpus}", "--output=/dev/null")
        other = site.client("sbatch", "--parsable", *urgent, "--wrap=sleep 5").strip()
        until(lambda: site.jobs_by_id()[other]["JobState"] == "RUNNING", "the urgent job running")
        assert site.jobs_by_id()[job["JobId"]]["JobState"] == "PENDING"
        unfinished(project)
        head.wait()
    assert head.code == 0, head.output
    (after,) = (found for found in site.jobs("train_model") if found["JobId"] == job["JobId"])
    assert (after["JobState"], after["Restarts"]) == ("COMPLETED", "1")
    goes_on(project, uninterrupted, after=seen - 10)  # saved every ten; Slurm gives no time to save more
