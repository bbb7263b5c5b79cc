"""What lets a training be interrupted: one writer at a time, a resume state, signals that save."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from cryodrgn_pipeline.errors import InputFormatError, Interrupted
from cryodrgn_pipeline.io.atomic import write_json
from cryodrgn_pipeline.io.checkpoints import MODEL_FILE, load_state, save_state
from cryodrgn_pipeline.io.output_lock import held, remove_leftovers
from cryodrgn_pipeline.io.progress_file import PROGRESS_FILE
from cryodrgn_pipeline.ranks import started_by_torchrun

log = logging.getLogger(__name__)

OUTPUTS = (MODEL_FILE, "latent.parquet", "metrics.jsonl")
MANIFEST = "run.json"  # written last: its presence says that the run is whole


class CheckpointFolder:
    """The `checkpoints/` of a run: `state.pt` to resume from, and the fingerprint of what it belongs to.

    Checkpoints of another fingerprint are moved aside with the results they led to, never deleted.
    """

    def __init__(self, run: Path, fingerprint: str) -> None:
        self.run, self.fingerprint = run, fingerprint
        self.path = run / "checkpoints"

    @property
    def state_file(self) -> Path:
        """The resume state."""
        return self.path / "state.pt"

    @property
    def journal(self) -> Path:
        """What a subspace keeps of its steps."""
        return self.path / "journal"

    def open(self, *, resume: bool, epochs: int = 0) -> dict[str, Any] | None:
        """The state to go on from, or None where there is none; makes the folder ready for writing."""
        state = None
        if self.state_file.exists() or self.journal.exists():
            same = self._stored_fingerprint() == self.fingerprint
            if not resume:
                self._move_aside("starting over (--resume was not given)")
            elif not same:
                self._move_aside("the images, the subset or the settings have changed: starting over")
            elif self.state_file.exists():
                state = load_state(self.state_file)
                if state["epoch"] > epochs:
                    self._move_aside(
                        f"they hold {state['epoch']} epochs, {epochs} are asked for: starting over"
                    )
                    state = None
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "fingerprint.json", {"fingerprint": self.fingerprint})
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write the resume state, atomically."""
        save_state(self.state_file, state)

    def close(self) -> None:
        """Remove the folder of a run that is whole and needs no checkpoints any more."""
        (self.path / "fingerprint.json").unlink(missing_ok=True)
        with suppress(OSError):  # something else is in it
            self.path.rmdir()

    def _stored_fingerprint(self) -> str | None:
        try:
            stored = json.loads((self.path / "fingerprint.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return str(stored.get("fingerprint"))

    def _move_aside(self, why: str) -> None:
        stored = (self._stored_fingerprint() or "unknown")[:8]
        aside, number = self.run / f"checkpoints.{stored}", 1
        while aside.exists():
            number += 1
            aside = self.run / f"checkpoints.{stored}.{number}"
        self.path.rename(aside)
        for name in (*OUTPUTS, MANIFEST):
            if (self.run / name).exists():
                (self.run / name).rename(aside / name)
        log.info("older checkpoints and results moved to %s: %s", aside, why)


def finished(run: Path, fingerprint: str, epochs: int | None = None) -> bool:
    """Whether the run folder holds all results of this very training.

    Raises
    ------
    InputFormatError
        If its manifest is damaged.
    """
    try:
        manifest = json.loads((run / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise InputFormatError(f"{run / MANIFEST}: not JSON ({error}). Remove it and train again.") from error
    whole = all((run / name).is_file() for name in OUTPUTS)
    same_length = epochs is None or manifest.get("epochs") == epochs
    return whole and same_length and manifest.get("fingerprint") == fingerprint


@contextmanager
def only_writer(run: Path) -> Iterator[None]:
    """Hold the run folder's lock, or raise `CryodrgnPipelineError` when another process does."""
    run.mkdir(parents=True, exist_ok=True)
    with held(run / ".lock", run):
        for name in (*OUTPUTS, MANIFEST, PROGRESS_FILE, "checkpoints/state.pt"):
            remove_leftovers(run / name)
        yield


class StopRequest:
    """Set by SIGTERM or SIGINT: the loop saves and leaves at the next batch; a second SIGINT (Ctrl-C) kills.

    A second SIGTERM does not: Slurm sends two.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listen while the block runs, and to the program's end when that is stopped."""
        former = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        except Interrupted:
            former.clear()  # another signal is not to disturb the ending
            raise
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number
        if number == signal.SIGINT and not started_by_torchrun():  # it hands on what all processes have had
            signal.signal(number, signal.SIG_DFL)
