"""What `status` shows: a table for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cryodrgn_pipeline.io.progress_file import FAILED, FINISHED, INTERRUPTED, RUNNING
from cryodrgn_pipeline.progress import duration
from cryodrgn_pipeline.watching.look import LOST, Job

STYLES = {FINISHED: "green", RUNNING: "bold", INTERRUPTED: "yellow", FAILED: "red", LOST: "red"}
WIDTH_OF_A_FILE = 160  # characters, where no terminal says how wide it is


def table_of(jobs: list[Job]) -> Table:
    """One row a job."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("dataset", "subset/run", "step", "state", "epoch", "loss", "speed", "left", "checkpoint"):
        table.add_column(heading, no_wrap=True)
    table.add_column("where, and what it says", overflow="fold")
    before = ("", "")
    for job in jobs:
        here = (job.dataset, f"{job.subset}/{job.run}" if job.run else "")
        shown = [part if here != before else "" for part in here]
        cells = (*shown, job.step, _state(job), *_numbers(job.progress), _words(job))
        table.add_row(*cells, style=STYLES.get(job.state))
        before = here
    return table


def show(jobs: Callable[[], list[Job]], every_s: float | None) -> None:
    """Print the table; with `every_s` show it anew every so many seconds, until all is finished or Ctrl-C."""
    import time

    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    if every_s is None:
        console.print(table_of(jobs()))
        return
    latest = jobs()
    with Live(table_of(latest), console=console, auto_refresh=False) as live:
        while any(job.state != FINISHED for job in latest):
            time.sleep(every_s)
            latest = jobs()
            live.update(table_of(latest), refresh=True)


def _state(job: Job) -> str:
    if job.state == LOST and job.since is not None:
        return f"no sign of life for {_ago(job.since)}"
    return job.state


def _numbers(progress: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Epoch, loss, speed, time left and age of the last checkpoint."""
    epoch, epochs, loss = (progress.get(key) for key in ("epoch", "epochs", "loss"))
    running = progress.get("state") == RUNNING
    rate, left = (progress.get(key) if running else None for key in ("rate_per_s", "seconds_left"))
    kept = progress.get("last_checkpoint") if progress.get("state") != FINISHED else None
    return (
        "" if epoch is None else f"{epoch}/{epochs}",
        "" if loss is None else f"{loss:.4f}",
        "" if rate is None else f"{rate:.0f} {progress['unit']}/s",
        "" if left is None else duration(left),
        "" if kept is None else f"{_ago(kept)} ago",
    )


def _words(job: Job) -> str:
    progress, words = job.progress, []
    if progress and job.state != FINISHED:
        words.append(progress["host"])
        if progress["slurm_job_id"]:
            words[0] += f", Slurm job {progress['slurm_job_id']}"
        if progress["state"] == RUNNING:
            words.append(progress["phase"])
    return ": ".join([*words, *([job.said] if job.said else [])])


def _ago(when: str) -> str:
    return duration(max(0.0, (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()))
