"""Progress that suits its reader: a bar on a terminal, one log line per interval in a file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 15.0


class Advance(Protocol):
    """Report `count` more units done, with an optional note shown beside the bar."""

    def __call__(self, count: int, note: str = "") -> None: ...


def duration(seconds: float) -> str:
    """Seconds as `1 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"


@contextmanager
def progress(what: str, total: int, unit: str = "images") -> Iterator[Advance]:
    """Show how far `what` has come; yields a function to call with the number of units done."""
    if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, note="")

            def advance_bar(count: int, note: str = "") -> None:
                speed = bar.tasks[task].speed
                rate = f"{speed:.0f} {unit}/s" if speed else ""
                bar.update(task, advance=count, note=f"{rate} {note}")

            yield advance_bar
        return

    started = last = time.monotonic()
    done = 0

    def advance_log(count: int, note: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= LOG_INTERVAL_S:
            last = now
            rate = done / (now - started)
            left = duration((total - done) / rate) if rate else "?"
            log.info(
                "%s: %d of %d %s, %.0f %s/s, %s left%s",
                what,
                done,
                total,
                unit,
                rate,
                unit,
                left,
                f", {note}" if note else "",
            )

    yield advance_log
