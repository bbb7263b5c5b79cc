"""Fixtures of the cluster tests: where a Slurm can be started, and one that several tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from slurm_cluster import SlurmCluster, install, why_not


@pytest.fixture(scope="session")
def slurm_programs() -> None:
    """Slurm's programs, installed where they are missing; skips, and says why, where that cannot be."""
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
