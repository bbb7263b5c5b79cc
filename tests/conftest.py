"""Fixtures that all rooms' tests share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest-xdist (`-n 2`) the tests of a file share a process and its fixtures.

    Those on a cluster all share one process: there is one cluster at a time.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "cluster" if nodeid.startswith("tests/cluster/") else str(super()._split_scope(nodeid))

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def handlers_return() -> Iterator[None]:
    """A command line that ran in this process has put its own handlers in, and ended with SIGTERM ignored."""
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of experimental fixtures; they are not part of the project, so a user may lack them."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CRYODRGN_PIPELINE_TEST_DATA", default))
    if not folder.is_dir():
        message = f"experimental fixtures not found in {folder} (set CRYODRGN_PIPELINE_TEST_DATA)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 simulated particles of 16 px, imported (`import/`) and prepared (`stack/`) by the product."""
    from typer.testing import CliRunner

    from cryodrgn_pipeline.cli import app

    folder = tmp_path_factory.mktemp("tiny")
    for command in (
        f"simulate -o {folder}/set --box-size 16 --pixel-size 12 --particles 96 --snr 0.5 --states 3",
        f"import {folder}/set/particles.star -o {folder}/import",
        f"preprocess {folder}/import --box-size 16 -o {folder}/stack",
    ):
        done = CliRunner().invoke(app, command.split(), catch_exceptions=False)
        if done.exit_code:
            pytest.fail(f"{command}: {done.output}")
    return folder


@pytest.fixture(scope="session")
def cryosparc4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment made as workflows/envs/cryosparc-4.7.yaml and its script say.

    CRYODRGN_PIPELINE_TEST_CRYOSPARC4 may name one that is there already.
    """
    given = os.environ.get("CRYODRGN_PIPELINE_TEST_CRYOSPARC4")
    if given:
        return Path(given)
    import yaml

    checkout = Path(__file__).resolve().parents[1]
    environment = yaml.safe_load((checkout / "workflows/envs/cryosparc-4.7.yaml").read_text(encoding="utf-8"))
    (packages,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    folder = tmp_path_factory.mktemp("cryosparc4") / "venv"
    python = folder / "bin" / "python"
    commands = (
        [sys.executable, "-m", "venv", folder],
        [python, "-m", "pip", "install", "--quiet", *(package.replace(" ", "") for package in packages)],
        [python, "-m", "pip", "install", "--quiet", "--no-deps", checkout],
    )
    for command in commands:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if done.returncode:
            message = f"cryosparc-tools 4.7 cannot be installed here: {done.stderr[-500:]}"
            if os.environ.get("CI") == "true":
                pytest.fail(message)
            pytest.skip(message)
    return python
