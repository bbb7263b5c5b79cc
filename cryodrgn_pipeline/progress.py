"""Progress that suits its reader: a bar on a terminal, log lines in a file, RUN/progress.json from afar."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from cryodrgn_pipeline.errors import Interrupted
from cryodrgn_pipeline.io.progress_file import FAILED, FINISHED, INTERRUPTED, ProgressFile

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 15.0

_recorded: list[ProgressFile] = []  # the innermost run last


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
def recorded(run: Path) -> Iterator[None]:
    """Keep RUN/progress.json while the block runs: its bars, what is `measured`, and how it ends."""
    record = ProgressFile(run)
    _recorded.append(record)
    state = FAILED
    try:
        yield
        state = FINISHED
    except (Interrupted, KeyboardInterrupt):
        state = INTERRUPTED
        raise
    finally:
        _recorded.pop()
        record.end(state)


def measured(rows: list[dict[str, Any]], epochs: int) -> None:
    """Show the epochs so far, one row each with `loss`, of so many in metrics.jsonl of the run under way."""
    if _recorded and rows:
        _recorded[-1].measured(rows, epochs)


def checkpointed() -> None:
    """Tell who looks in that all that the run under way did so far is kept."""
    if _recorded:
        _recorded[-1].checkpointed()


@contextmanager
def progress(
    what: str, total: int, unit: str = "images", *, done: int = 0, passing: bool = False
) -> Iterator[Advance]:
    """Show how far `what` has come; yields a function to call with the number of units done.

    Parameters
    ----------
    done
        Units that an earlier session did.
    passing
        One of many: its bar leaves no trace on a terminal.
    """
    record = _recorded[-1] if _recorded else None
    if record is not None:
        record.begin(what, total, unit)
        record.skip(done)
    with _shown(what, total, unit, done, passing) as show:

        def advance(count: int, note: str = "") -> None:
            show(count, note)
            if record is not None:
                record.advance(count)

        yield advance


@contextmanager
def _shown(what: str, total: int, unit: str, already: int, passing: bool) -> Iterator[Advance]:
    if sys.stderr.isatty() and log.isEnabledFor(logging.INFO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        what_and_bar = (TextColumn("{task.description}"), BarColumn())
        numbers = (MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*what_and_bar, *numbers, console=Console(stderr=True), transient=passing) as bar:
            task = bar.add_task(what, total=total, completed=already, note="")

            def advance_bar(count: int, note: str = "") -> None:
                speed = bar.tasks[task].speed
                rate = f"{speed:.0f} {unit}/s" if speed else ""
                bar.update(task, advance=count, note=f"{rate} {note}")

            yield advance_bar
        return

    started = last = time.monotonic()
    done = already

    def advance_log(count: int, note: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= LOG_INTERVAL_S:
            last = now
            rate = (done - already) / (now - started)
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
