"""One external job of cryoSPARC while it is filled: it ends completed or failed, whatever happens."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryodrgn_pipeline.errors import ExternalJobError
from cryodrgn_pipeline.interop.cryosparc_client import Connection, outputs_of, repeated, talking

log = logging.getLogger(__name__)

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
RUNNING = ("running", "waiting")
BUILDING, COMPLETED = "building", "completed"
MAP_FOLDER = "volumes"  # in the job's own folder


class ExternalJob:
    """An external job; `handle` is the client's own object for it."""

    def __init__(self, connection: Connection, project: str, handle: Any) -> None:
        self._connection = connection
        self._job = handle
        self.project = project
        self.uid: str = handle.uid

    @property
    def name(self) -> str:
        """How people speak of it, such as `P3 J42`."""
        return f"{self.project} {self.uid}"

    def status(self) -> str:
        """What cryoSPARC says now: building, running, waiting, completed, failed, killed …"""
        with talking(f"asking for the status of {self.name}"):
            return str(self._job.refresh().status)

    def inputs(self) -> dict[str, list[tuple[str, str]]]:
        """The connected (job, output) of each input."""
        if self._connection.is_4:
            return {
                group["name"]: [(c["job_uid"], c["group_name"]) for c in group["connections"]]
                for group in self._job.doc["input_slot_groups"]
            }
        return {
            name: [(c.job_uid, c.output) for c in given.connections]
            for name, given in self._job.inputs.items()
        }

    def output_names(self) -> list[str]:
        """The outputs that it has been given."""
        return list(outputs_of(self._job, self._connection.is_4))

    def clear(self) -> None:
        """Back to building, without files and events; a job that still runs is marked as failed before."""
        if self.status() in RUNNING:
            self.fail("the push was interrupted; it is taken up again")
        if self.status() != BUILDING:
            with talking(f"clearing {self.name}"):
                self._job.clear()

    def connect(self, name: str, source_job: str, output: str, slots: Mapping[str, str]) -> None:
        """Connect an output of another job, with these slots (name → dtype), as input `name`."""
        with talking(f"connecting {source_job} {output} to {self.name}"):
            self._job.connect(name, source_job, output, slots=self._slots(slots))

    def add_output(
        self, kind: str, name: str, slots: Mapping[str, str], title: str, passthrough: str | None = None
    ) -> None:
        """Add an output with slots (name → dtype) of its own, and those of an input passed through."""
        with talking(f"adding output {name} to {self.name}"):
            self._job.add_output(
                type=kind, name=name, slots=self._slots(slots), passthrough=passthrough, title=title
            )

    def _slots(self, slots: Mapping[str, str]) -> list[dict[str, Any]]:
        if self._connection.is_4:
            return [{"prefix": name, "dtype": dtype, "required": True} for name, dtype in slots.items()]
        return [{"name": name, "dtype": dtype} for name, dtype in slots.items()]

    def allocate(self, output: str, rows: Any) -> Any:
        """An empty dataset for an output: of these uids, or of so many rows."""
        with talking(f"asking for the columns of {output} of {self.name}"):
            return self._job.alloc_output(output, rows)

    def save(self, output: str, dataset: Any) -> None:
        """Save an output; an `ExternalJobError` where cryoSPARC then counts other rows than were sent."""
        repeated(f"saving {output} of {self.name}", lambda: self._job.save_output(output, dataset))
        rows = outputs_of(self._job, self._connection.is_4)[output].rows
        if rows != len(dataset):
            raise ExternalJobError(
                f"cryoSPARC holds {rows} rows of output {output} of {self.name}; {len(dataset)} were sent"
            )

    def upload(self, path: str, source: Path) -> None:
        """Upload a file into the job's folder and check its size there."""

        def send() -> None:
            with source.open("rb") as stream:  # anew for each attempt
                self._job.upload(path, stream, overwrite=True)

        with talking(f"making the folder of {path} in {self.name}"):
            self._job.mkdir(str(Path(path).parent), parents=True, exist_ok=True)
        repeated(f"uploading {path} to {self.name}", send)
        sent = source.stat().st_size
        stored = self._connection.stored_bytes(self.project, f"{self.uid}/{path}", sent)
        if stored != sent:
            raise ExternalJobError(
                f"cryoSPARC holds {stored} bytes of {path} in {self.name}, but {source} has {sent}"
            )

    def log(self, text: str) -> None:
        """A line in the event log."""
        with talking(f"writing to the event log of {self.name}"):
            self._job.log(text)

    def progress(self, text: str) -> None:
        """A line in the event log that replaces the last such line (4.x: one more line)."""
        with talking(f"writing to the event log of {self.name}"):
            self._job.log(text, **({} if self._connection.is_4 else {"name": "progress"}))

    def show(self, image: Path, text: str) -> None:
        """A PNG image with a caption in the event log."""
        with talking(f"uploading {image.name} to {self.name}"), image.open("rb") as stream:
            self._job.log_plot(stream, text, formats=["png"])

    def set_tile(self, image: Path) -> None:
        """The PNG image on the job's card; a client of 4.x has no call for it."""
        if not self._connection.is_4:
            with talking(f"uploading {image.name} to {self.name}"), image.open("rb") as stream:
                self._job.set_tile_image(stream)

    def start(self) -> None:
        """Set it running: outputs can be saved from now on."""
        with talking(f"starting {self.name}"):
            self._job.start("running")

    def complete(self) -> None:
        """Say that all is done."""
        with talking(f"completing {self.name}"):
            self._job.stop()

    def fail(self, reason: str) -> None:
        """Say that it failed, and why."""
        with talking(f"marking {self.name} as failed"):
            if self._connection.is_4:  # which cannot hand over a reason
                self._job.stop(True)
                self._job.log(reason, level="error")
            else:
                self._job.stop(error=reason)


@contextmanager
def filling(job: ExternalJob) -> Iterator[None]:
    """End a job with a block, which starts it: completed, or failed on any exception, Ctrl-C or SIGTERM.

    The client's own `job.run()` marks a job that was interrupted by Ctrl-C as completed, and leaves one that
    was ended by SIGTERM running.
    """
    with _signals(_exit):
        try:
            yield
            job.complete()
        except BaseException as error:
            with _signals(signal.SIG_IGN, signal.SIGINT):
                _mark_failed(job, error)
            raise


def _mark_failed(job: ExternalJob, error: BaseException) -> None:
    try:
        job.fail(f"{type(error).__name__}: {error}")
    except ExternalJobError as second:
        log.error("%s; the same command takes %s up again", second, job.name)


def _exit(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _signals(action: Any, *more: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, action) for number in (*ENDING_SIGNALS, *more)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
