"""The whole workflow through the shipped slurm profile on a real Slurm, with and without accounting."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from projects import Project
from slurm_cluster import Job, SlurmCluster

pytestmark = pytest.mark.slurm
SITE = """\
site_module() { export SITE_MODULES="$*"; }
site_module load "$1"
echo "$SLURM_JOB_ID gpus=$CUDA_VISIBLE_DEVICES modules=$SITE_MODULES" >> "$2"
"""


@dataclass(frozen=True)
class Ran:
    """A workflow that ran on a cluster."""

    project: Project
    jobs: list[Job]
    environments: dict[str, str]


@pytest.fixture(scope="module")
def ran(cluster: SlurmCluster, tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The workflow from particles to report, at a site without accounting that loads a module."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "site.sh").write_text(SITE, encoding="utf-8")
    seen = folder / "environments.txt"
    modules = f"set -- cuda/12.8 {seen} && . {folder}/site.sh"
    project = Project(
        folder / "project",
        tiny_set / "set" / "particles.star",
        profile={
            "# precommand: module load cuda/12.8": f"precommand: {modules}",
            "# slurm-status-command: squeue": "slurm-status-command: squeue",
            "# slurm_partition: YOUR_PARTITION": "slurm_partition: cpu",
            "# slurm_extra: \"'--exclude=node7'\"": "slurm_extra: \"'--nice=5'\"",
            "# set-resources:": "set-resources:",
            "#   train_model: {slurm_partition: YOUR_GPU_PARTITION}": "  train_model: {slurm_partition: gpu}",
        },
    )
    head = project.on_cluster()
    assert head.code == 0, head.output
    environments = dict(line.split(" ", 1) for line in seen.read_text(encoding="utf-8").splitlines())
    return Ran(project, cluster.jobs(), environments)


def the_job(ran: Ran, rule: str) -> Job:
    (job,) = (job for job in ran.jobs if job["Comment"].startswith(f"rule_{rule}_"))
    return job


def test_every_step_is_one_job_of_slurm_and_ends_well(ran: Ran) -> None:
    rules = Counter(job["Comment"].removeprefix("rule_").partition("_wildcards")[0] for job in ran.jobs)
    assert rules == {
        "import_particles": 1,
        "preprocess_images": 1,
        "reconstruct_consensus": 1,
        "train_model": 1,
        "analyze_latent": 1,
        "decode_volumes": 2,
        "write_report": 1,
    }
    assert {job["JobState"] for job in ran.jobs} == {"COMPLETED"}


def test_what_the_steps_write_is_there(ran: Ran) -> None:
    run, dataset = ran.project.run_folder, ran.project.folder / "results" / "mine"
    assert len(pd.read_parquet(run / "latent.parquet")) == 96
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["epochs"] == 2
    assert (run / "report.html").stat().st_size > 10_000
    assert (dataset / "consensus_16" / "map.mrc").is_file()
    assert len(list((run / "volumes" / "centers").glob("vol_*.mrc"))) == 3


def test_training_has_a_gpu_and_import_has_none(ran: Ran) -> None:
    train, first = the_job(ran, "train_model"), the_job(ran, "import_particles")
    assert train["TresPerJob"] == "gres:gpu:1"
    assert "TresPerJob" not in first
    assert ran.environments[train["JobId"]].startswith("gpus=0 ")
    assert ran.environments[first["JobId"]].startswith("gpus= ")


def test_jobs_go_to_the_partitions_that_the_profile_names(ran: Ran) -> None:
    assert the_job(ran, "train_model")["Partition"] == "gpu"
    assert the_job(ran, "import_particles")["Partition"] == "cpu"


def test_other_words_of_the_profile_reach_sbatch(ran: Ran) -> None:
    assert {job["Nice"] for job in ran.jobs} == {"5"}


def test_jobs_ask_for_the_memory_minutes_and_threads_of_the_configuration(ran: Ran) -> None:
    train = the_job(ran, "train_model")
    assert "mem=1000M" in train["TRES"]
    assert train["TimeLimit"] == "00:10:00"
    assert train["CPUs/Task"] == "1"


def test_every_job_loads_the_modules_of_the_profile(ran: Ran) -> None:
    assert set(ran.environments) == {job["JobId"] for job in ran.jobs}
    assert all(line.endswith("modules=load cuda/12.8") for line in ran.environments.values())


def test_a_second_run_submits_nothing(ran: Ran, cluster: SlurmCluster) -> None:
    again = ran.project.on_cluster()
    assert again.code == 0, again.output
    assert "Nothing to be done" in again.output
    assert len(cluster.jobs()) == len(ran.jobs)
