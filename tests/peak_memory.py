"""How much anonymous memory a command and its children hold at most, and how long it runs."""

from __future__ import annotations

import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_S = 0.02


@dataclass(frozen=True)
class Usage:
    """Peak anonymous memory of a process tree (pages of mapped files do not count), wall and CPU time."""

    peak_mb: float
    seconds: float
    cpu_seconds: float


def measured(command: Sequence[object], **options: Any) -> Usage:
    """Run a command to its end; raises `CalledProcessError` if it fails."""
    started, cpu, peak = time.monotonic(), _cpu_of_children(), 0
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, **options) as process:
            while process.poll() is None:
                peak = max(peak, _anonymous_bytes(process.pid))
                time.sleep(POLL_S)
        if process.returncode:
            said.seek(0)
            raise subprocess.CalledProcessError(process.returncode, words, said.read())
    wall = time.monotonic() - started
    return Usage(peak_mb=peak / 1e6, seconds=wall, cpu_seconds=_cpu_of_children() - cpu)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _anonymous_bytes(pid: int) -> int:
    """Of a process and all that it started, as far as they are still there."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
    return own + sum(_anonymous_bytes(int(child)) for child in children)
