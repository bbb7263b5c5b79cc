"""Where each job stands, from files alone: outputs, progress.json of trainings, and logs.

Nothing is asked of Snakemake, Slurm or a process, so that it works from any machine that sees the folder.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryodrgn_pipeline.io.output_lock import process_runs
from cryodrgn_pipeline.io.progress_file import FAILED, FINISHED, INTERRUPTED, PROGRESS_FILE, RUNNING

if TYPE_CHECKING:
    from cryodrgn_pipeline.config.models import Config, Dataset

WAITING, LOST = "waiting", "no sign of life"
SILENCE_S = 600.0  # a solve for large maps takes minutes in which nothing is said
TAIL_BYTES = 4096
Place = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job of the workflow: its place in it, its `state`, and what it last said.

    `said` is the last line of its log, `since` when it last said something (UTC, ISO), `progress` the
    progress.json of a training.
    """

    step: str
    dataset: str
    subset: str | None = None
    run: str | None = None
    state: str
    said: str = ""
    since: str | None = None
    progress: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """Where the results and the logs of a workflow are."""

    results: Path
    logs: Path


def jobs_of(config: Config, directory: Path) -> list[Job]:
    """Every job that a configuration asks for; folders are relative to `directory`."""
    folders = Folders(results=directory / config.pathvars.results, logs=directory / config.pathvars.logs)
    found: list[Job] = []
    for name, dataset in config.datasets.items():
        boxes = {_box_size_px(config, dataset, run): None for run in dataset.runs}
        found += _of_dataset(folders, name, list(boxes))
        for run, asked in dataset.runs.items():
            for subset in asked.subsets:
                found += _of_run(folders, name, subset, run)
    return found


def jobs_in(results: Path, logs: Path) -> list[Job]:
    """Every job that left something in a folder of results."""
    folders = Folders(results=results, logs=logs)
    found: list[Job] = []
    for dataset in sorted(path.parent for path in results.glob("*/import")):
        name = dataset.name
        boxes = sorted(
            int(path.name.removeprefix("stack_")) for path in dataset.glob("stack_*") if path.is_dir()
        )
        found += _of_dataset(folders, name, boxes)
        marks = [*dataset.glob(f"*/*/{PROGRESS_FILE}"), *dataset.glob("*/*/run.json")]
        for run in sorted({path.parent for path in marks}):
            found += _of_run(folders, name, run.parent.name, run.name)
    return found


def _box_size_px(config: Config, dataset: Dataset, run: str) -> int:
    own = dataset.runs[run].box_size_px
    if own is not None:
        return own
    says = "box_size_px" in dataset.preprocess.model_fields_set
    return (dataset if says else config).preprocess.box_size_px


def _of_dataset(folders: Folders, dataset: str, boxes: list[int]) -> Iterator[Job]:
    results, logs = folders.results / dataset, folders.logs / dataset
    place: Place = {"dataset": dataset}
    yield _step("import", results / "import" / "import.json", logs / "import.log", place)
    for box in boxes:
        made = results / f"stack_{box}" / "stack.json", logs / f"preprocess_{box}.log"
        yield _step(f"preprocess, {box} px", *made, place)
        made = results / f"consensus_{box}" / "consensus.json", logs / f"consensus_{box}.log"
        yield _step(f"consensus, {box} px", *made, place)


def _of_run(folders: Folders, dataset: str, subset: str, run: str) -> Iterator[Job]:
    results, logs = (folder / dataset / subset / run for folder in (folders.results, folders.logs))
    place: Place = {"dataset": dataset, "subset": subset, "run": run}
    yield _training(results, logs / "train.log", place)
    yield _step("analyze", results / "analysis" / "analysis.json", logs / "analyze.log", place)
    series = {path.name for path in (results / "volumes").glob("*") if not path.name.startswith(".")}
    series |= {path.stem.removeprefix("volumes_") for path in logs.glob("volumes_*.log")}
    for name in sorted(series):
        made = results / "volumes" / name / "volumes.parquet", logs / f"volumes_{name}.log"
        yield _step(f"volumes, {name}", *made, place)
    yield _step("report", results / "report.html", logs / "report.log", place)


def _step(step: str, made: Path, log: Path, place: Place) -> Job:
    """A job that has made its output, or what its log says."""
    said, written = _last_line(log)
    if made.exists():
        state = FINISHED
    elif written is None:
        state = WAITING
    elif said.startswith("error: "):
        state = FAILED
    elif said.startswith("stopped by signal"):
        state = INTERRUPTED
    else:
        state = RUNNING if time.time() - written < SILENCE_S else LOST
    since = None if written is None else datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds")
    return Job(step=step, state=state, said="" if state == FINISHED else said, since=since, **place)


def _training(run: Path, log: Path, place: Place) -> Job:
    progress = _read(run / PROGRESS_FILE)
    if progress is None or (run / "run.json").exists() or progress["state"] == FINISHED:
        # not yet begun, or whole
        job = _step("train", run / "run.json", log, place)
        progress = progress if job.state == FINISHED and progress is not None else {}
        return Job(**job.as_json() | {"progress": progress})
    state = progress["state"]
    if state == RUNNING and (_silent(progress["updated"]) or _gone(progress["host"], progress["pid"])):
        state = LOST
    said, _ = _last_line(log)
    said = said if state in (FAILED, INTERRUPTED) else ""
    return Job(step="train", state=state, said=said, since=progress["updated"], progress=progress, **place)


def _silent(updated: str) -> bool:
    return (datetime.now(UTC) - datetime.fromisoformat(updated)).total_seconds() > SILENCE_S


def _gone(host: str, pid: int) -> bool:
    """Whether a process of this very machine is no more."""
    return host == socket.gethostname() and not process_runs(pid)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def _last_line(log: Path) -> tuple[str, float | None]:
    """The last line of a log that says something, and when it was written (s since 1970; None: no log)."""
    try:
        with log.open("rb") as file:
            written = os.fstat(file.fileno()).st_mtime
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return "", None
    spoken = [line.strip() for line in lines if line.strip()]
    return spoken[-1] if spoken else "", written
