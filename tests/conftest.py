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
