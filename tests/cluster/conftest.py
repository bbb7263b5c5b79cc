"""Fixtures of the cluster tests: a Slurm, where one can be started, and projects for it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from interrupted import EPOCHS, Make
from projects import TRAINED, Project
from slurm_cluster import SlurmCluster, install, why_not

NO_ACCOUNTING = {"# slurm-status-command: squeue": "slurm-status-command: squeue"}


@pytest.fixture(scope="session")
def slurm_programs(pytestconfig: pytest.Config) -> None:
    """Slurm's programs, installed where they are missing; skips, and says why, where that cannot be.

    Nobody's machine gets packages and daemons unasked: only CI's, or with `-m slurm`.
    """
    if os.environ.get("CI") != "true" and "slurm" not in pytestconfig.getoption("markexpr"):
        pytest.skip("installs Debian's packages and starts a Slurm on this machine: `make test-cluster`")
    if reason := why_not():
        pytest.skip(reason)
    try:
        install(accounting=True)
    except RuntimeError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"Slurm cannot be installed: {error}")
        pytest.skip(f"Slurm cannot be installed: {error}")


@pytest.fixture(scope="module")
def cluster(slurm_programs: None) -> Iterator[SlurmCluster]:
    """Two nodes with a GPU each, no accounting; one for all tests of a module."""
    with SlurmCluster(nodes=2) as up:
        yield up


@pytest.fixture(scope="session")
def make(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a project of which only the training, and what follows it, is left to do."""
    from typer.testing import CliRunner

    from cryodrgn_pipeline.cli import app

    consensus = tmp_path_factory.mktemp("consensus") / "consensus"
    words = ["consensus", str(tiny_set / "stack"), "-o", str(consensus)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    if done.exit_code:
        pytest.fail(done.output)

    def make(
        folder: Path,
        train: Mapping[str, Any] | None = None,
        resources: Mapping[str, Any] | None = None,
        profile: Mapping[str, str] = NO_ACCOUNTING,
    ) -> Project:
        settings = {"train": {"epochs": EPOCHS, **(train or {})}, "resources": resources or {}}
        project = Project(folder, tiny_set / "set" / "particles.star", settings, profile)
        project.provide(tiny_set / "import", tiny_set / "stack", consensus)
        return project

    return make


@pytest.fixture(scope="session")
def uninterrupted(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the training of `make`, without a cluster and without an interruption."""
    project = make(tmp_path_factory.mktemp("uninterrupted") / "project")
    project.verb("run", "--cores", "1", TRAINED)
    return project.run_folder
