"""Fixtures that all rooms' tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")


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
