"""RUN/progress.json and RUN/metrics.jsonl while a run goes on, so that others can look in from anywhere."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryodrgn_pipeline.io.atomic import write_json
from cryodrgn_pipeline.io.runs import write_metrics

log = logging.getLogger(__name__)

PROGRESS_FILE, FORMAT = "progress.json", 1
STATES = RUNNING, INTERRUPTED, FAILED, FINISHED = ("running", "interrupted", "failed", "finished")
INTERVAL_S = 5.0  # between two writes: a parallel file system is not to notice them


def utc_now() -> str:
    """The time as ISO text, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class ProgressFile:
    """What `folder`/progress.json says; docs/file-formats.md has its keys.

    It is a courtesy: where it cannot be written (a full disk), the log says so once and the run goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / PROGRESS_FILE
        self._phase_started = self._written = time.monotonic()
        self._already = 0  # units of the phase that an earlier session did
        self._cannot_write = False
        self._content: dict[str, Any] = {
            "format": FORMAT,
            "state": RUNNING,
            "phase": "starting",
            "done": 0,
            "total": 0,
            "unit": "",
            "rate_per_s": None,
            "seconds_left": None,
            "epoch": None,
            "epochs": None,
            "loss": None,
            "last_checkpoint": None,
            "updated": utc_now(),
            "started": utc_now(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }
        self._write()

    def begin(self, phase: str, total: int, unit: str) -> None:
        """Say that a phase of so many units begins."""
        self._phase_started, self._already = time.monotonic(), 0
        self._content |= {"phase": phase, "done": 0, "total": total, "unit": unit}
        self._content |= {"rate_per_s": None, "seconds_left": None}
        self._write_sometimes()

    def skip(self, count: int) -> None:
        """Say that so many units of the phase were done before: they say nothing about its speed."""
        self._already += count
        self._content["done"] += count

    def advance(self, count: int) -> None:
        """Say that so many units of the phase are done."""
        self._content["done"] += count
        seconds = time.monotonic() - self._phase_started
        if seconds > 0 and self._content["done"] > self._already:
            rate = (self._content["done"] - self._already) / seconds
            left = max(self._content["total"] - self._content["done"], 0) / rate
            self._content |= {"rate_per_s": round(rate, 3), "seconds_left": round(left, 1)}
        self._write_sometimes()

    def checkpointed(self) -> None:
        """Say that all that was done so far is kept."""
        self._content["last_checkpoint"] = utc_now()
        self._write_sometimes()

    def measured(self, rows: list[dict[str, Any]], epochs: int) -> None:
        """Write metrics.jsonl beside it, and what its last row says of so many epochs."""
        self._content |= {"epoch": len(rows), "epochs": epochs, "loss": rows[-1]["loss"]}
        self._try(lambda: write_metrics(self.path.parent, rows))
        self._write_sometimes()

    def end(self, state: str) -> None:
        """Say how the run ended."""
        self._content["state"] = state
        if state == FINISHED:
            self._content["seconds_left"] = 0.0
        self._write()

    def _write_sometimes(self) -> None:
        if time.monotonic() - self._written >= INTERVAL_S:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        self._content["updated"] = utc_now()
        self._try(lambda: write_json(self.path, self._content))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._cannot_write:
                log.warning("progress cannot be recorded: %s", error)
            self._cannot_write = True
