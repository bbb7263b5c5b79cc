"""The manifest of a step: what ran, with which versions, on what, how long."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cryodrgn_pipeline import __version__

RECORDED_PACKAGES = ("torch", "numpy", "scipy", "mrcfile", "starfile", "cryosparc-tools", "snakemake")


def environment() -> dict[str, Any]:
    """Versions, git commit (in a checkout), platform and the current time, for a manifest."""
    versions = {"cryodrgn_pipeline": __version__, "python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def digest(content: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
