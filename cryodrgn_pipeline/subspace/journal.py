"""Checkpoints inside the subspace: what was interrupted goes on where it was, to the same result bit for bit.

The engine is a tree of steps, each a function of what came before and of nothing else, so what a step left
may be read back in its place. `once` keeps a result until the step that asked for it is over, `loop` the
latest state of a sequence, `summed` and `gathered` what a pass over the images has come to. Nothing is
written until so many minutes have passed or a signal comes; then all that would be lost is. Where no journal
is in force (`keeping`), the same is computed and nothing kept.

Several ranks take the same steps and share the images of each pass. The tensors that a step left on rank 0
stand for all, since linear algebra does not repeat its last bits from process to process. Rank 0 writes, and
no part of a pass.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cryodrgn_pipeline import __version__
from cryodrgn_pipeline.errors import InputFormatError, Interrupted
from cryodrgn_pipeline.io.atomic import replacing
from cryodrgn_pipeline.progress import checkpointed, progress
from cryodrgn_pipeline.ranks import ALONE, Ranks
from cryodrgn_pipeline.subspace.codec import Encoded, decoded, encoded, mapped, tensors_of
from cryodrgn_pipeline.subspace.images import LevelImages

if TYPE_CHECKING:
    from cryodrgn_pipeline.fourier_images import FourierImages
    from cryodrgn_pipeline.stack import Stack
    from cryodrgn_pipeline.training.state import StopRequest

log = logging.getLogger(__name__)

FORMAT = "cryodrgn_pipeline.journal.1"
SUFFIX = ".safetensors"
SAVED = "a checkpoint is kept; go on with the same command and --resume"
T = TypeVar("T")


class Steps:
    """Steps that only compute: what `journal` gives where nothing is kept."""

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The result of `make`, or what it was before an interruption."""
        return make()

    def loop(self, name: str, state: T, steps: Sequence[Callable[[T], T]]) -> T:
        """What the steps make of `state` in turn, without those that were taken before an interruption."""
        for step in steps:
            state = step(state)
        return state

    def summed(
        self,
        what: str,
        images: LevelImages,
        sums: Sequence[Tensor],
        add: Callable[[slice, FourierImages], None],
    ) -> None:
        """Call `add` with the place and the data of each chunk of images: it adds to `sums`, in place."""
        self._pass(what, images, 0, add)

    def gathered(self, what: str, images: LevelImages, ask: Callable[[slice, FourierImages], T]) -> T:
        """What `ask` says of each chunk, as one: dataclasses or tuples of tensors with a row per image."""
        rows = Rows(len(images))
        self._pass(what, images, 0, lambda part, chunk: rows.add(ask(part, chunk)))
        result: T = rows.of(slice(0, len(images)))
        return result

    def _pass(
        self,
        what: str,
        images: LevelImages,
        done: int,
        each: Callable[[slice, FourierImages], None],
        ranks: Ranks = ALONE,
    ) -> None:
        share = ranks.share(len(images))
        with progress(what, share.stop - share.start, done=done, passing=True) as advance:
            for part, chunk in images.chunks(done, ranks):
                each(part, chunk)
                advance(len(chunk))
                if self._hurried():
                    return

    def _hurried(self) -> bool:
        """Whether a pass is to end with the chunk that is done."""
        return False


class Rows:
    """What is known of N images, filled from the first on, in one block of memory for each tensor."""

    def __init__(self, count: int) -> None:
        self.count, self.filled = count, 0
        self._all: Any = None

    def add(self, value: Any) -> None:
        """Take the next rows: those of a chunk of images."""
        if self._all is None:
            self._all = mapped(value, lambda one: one.new_empty(self.count, *one.shape[1:]))
        count = 0
        for whole, part in zip(tensors_of(self._all), tensors_of(value), strict=True):
            count = len(part)
            whole[self.filled : self.filled + count] = part
        self.filled += count

    def of(self, images: slice) -> Any:
        """Those of some images."""
        return mapped(self._all, lambda one: one[images])


@dataclass(slots=True)
class _Frame:
    """A step under way: its path, the paths of what it keeps, and how often it used each name."""

    path: str
    kept: list[str] = field(default_factory=list)
    uses: dict[str, int] = field(default_factory=dict)


class Journal(Steps):
    """What a folder keeps of the steps of a run.

    Parameters
    ----------
    folder
        Files of this very run, each the function of its name that the run computes; it is made when there is
        something to write.
    stack, device
        The images of the run, and what works on them.
    kinds
        Dataclasses that results are made of, beside tensors, images of a level, lattices and plain values.
    every_minutes
        About as much work as may be lost.
    stop
        Once a signal has set it, everything is written and `Interrupted` raised.
    ranks
        Those that take the same steps, each with a journal on this folder.
    """

    def __init__(
        self,
        folder: Path,
        stack: Stack,
        kinds: Sequence[type[Any]],
        *,
        every_minutes: float,
        stop: StopRequest,
        device: str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder, self.stack, self.device, self.stop, self.ranks = folder, stack, device, stop, ranks
        self.every_s = 60 * every_minutes
        self._kinds = {kind.__name__: kind for kind in kinds}
        self._frames = [_Frame("")]
        self._unwritten: dict[str, Encoded] = {}
        self._passes: dict[str, Callable[[], None]] = {}  # path of the pass under way, and what writes it
        self._written = time.monotonic()

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The result of `make`, or what it was before an interruption."""
        path = self._enter(name)
        found = self._read(path)
        if found is None:
            found = self._keep(path, {"value": self._inside(path, make)})
        value: T = found["value"]
        return value

    def loop(self, name: str, state: T, steps: Sequence[Callable[[T], T]]) -> T:
        """What the steps make of `state` in turn, without those that were taken before an interruption."""
        path = self._enter(name)
        latest = self._read(path) or {"state": state, "taken": 0}
        while latest["taken"] < len(steps):
            number, before = latest["taken"], latest["state"]

            def step(number: int = number, before: T = before) -> T:
                return steps[number](before)

            after = self._inside(f"{path}.{number + 1}", step)
            latest = self._keep(path, {"state": after, "taken": number + 1})
        result: T = latest["state"]
        return result

    def summed(
        self,
        what: str,
        images: LevelImages,
        sums: Sequence[Tensor],
        add: Callable[[slice, FourierImages], None],
    ) -> None:
        """Call `add` with the place and the data of each chunk of images: it adds to `sums`, in place."""
        path, done = self._enter(what), 0
        found = self._read(path) if self.ranks.size == 1 else None
        if found is not None:
            for total, value in zip(sums, found["sums"], strict=True):
                total.copy_(value)
            done = found["done"]

        def each(part: slice, chunk: FourierImages) -> None:
            nonlocal done
            add(part, chunk)
            done = part.stop

        def write() -> None:
            self._write(path, encoded({"sums": list(sums), "done": done}))

        with self._passing(path, write):
            self._pass(what, images, done, each, self.ranks)
        self.ranks.sum_(*sums)

    def gathered(self, what: str, images: LevelImages, ask: Callable[[slice, FourierImages], T]) -> T:
        """What `ask` says of each chunk, as one: dataclasses or tuples of tensors with a row per image."""
        share = self.ranks.share(len(images))
        path, rows, parts = self._enter(what), Rows(share.stop - share.start), 0
        while self.ranks.size == 1 and (found := self._read(f"{path}@{parts}")) is not None:
            rows.add(found["rows"])
            parts += 1
        written = rows.filled

        def write() -> None:
            nonlocal parts, written
            if rows.filled > written:
                self._write(f"{path}@{parts}", encoded({"rows": rows.of(slice(written, rows.filled))}))
                parts, written = parts + 1, rows.filled

        with self._passing(path, write):
            self._pass(what, images, written, lambda part, chunk: rows.add(ask(part, chunk)), self.ranks)
        result: T = mapped(rows.of(slice(None)), self.ranks.gathered)
        return result

    def write(self) -> None:
        """Write what is not written yet, then remove what it stands for.

        Raises
        ------
        OSError
            If the disk is full; what was written before stays.
        """
        if not self.ranks.leads:
            return
        for path in list(self._unwritten):
            self._write(path, self._unwritten[path])
            del self._unwritten[path]
        for write_pass in self._passes.values():
            write_pass()
        live = {path for frame in self._frames for path in frame.kept}
        for file in self.folder.glob(f"*{SUFFIX}"):
            if file.name.removesuffix(SUFFIX).split("@")[0] not in live:
                file.unlink()
        self._written = time.monotonic()
        checkpointed()

    def _look_up(self) -> None:
        """Write if it is time, or if a signal asks any rank for it: then nothing follows."""
        signal_number = int(self.ranks.largest(self.stop.signal_number or 0)[0])
        if signal_number or time.monotonic() - self._written >= self.every_s:
            self.write()
        if signal_number:
            raise Interrupted(signal_number, SAVED)

    def _hurried(self) -> bool:
        if self.ranks.size > 1:
            return bool(self.stop)  # then the ranks look up together
        self._look_up()
        return False

    def _pass(
        self,
        what: str,
        images: LevelImages,
        done: int,
        each: Callable[[slice, FourierImages], None],
        ranks: Ranks = ALONE,
    ) -> None:
        super()._pass(what, images, done, each, ranks)
        if ranks.size > 1:
            self._look_up()

    @contextmanager
    def _passing(self, path: str, write: Callable[[], None]) -> Iterator[None]:
        if self.ranks.size > 1:
            yield
            return
        self._passes[path] = write
        try:
            yield
        finally:
            del self._passes[path]

    def _enter(self, name: str) -> str:
        """The path of a name that is used in the step under way, which keeps it from now on."""
        frame = self._frames[-1]
        use = frame.uses[name] = frame.uses.get(name, 0) + 1
        word = "_".join(name.replace(":", "").split()) + (f"-{use}" if use > 1 else "")
        path = f"{frame.path}.{word}" if frame.path else word
        frame.kept.append(path)
        return path

    def _inside(self, path: str, step: Callable[[], T]) -> T:
        self._frames.append(_Frame(path))
        try:
            return step()
        finally:
            for kept in self._frames.pop().kept:
                self._unwritten.pop(kept, None)

    def _keep(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        # laid out as when it is read: the same sums later, to the last bit
        laid_out: dict[str, Any] = mapped(mapped(value, Tensor.contiguous), self.ranks.told)
        self._unwritten[path] = encoded(laid_out)
        self._look_up()
        return laid_out

    def _write(self, path: str, value: Encoded) -> None:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in value.tensors.items()}
        metadata = {"format": FORMAT, "version": __version__, "tree": json.dumps(value.tree)}
        file = self.folder / f"{path}{SUFFIX}"
        try:
            with replacing(file) as temporary:
                save_file(plain, temporary, metadata=metadata)
        except (OSError, SafetensorError) as error:  # a full disk is either, and neither names the file
            size = sum(tensor.nbytes for tensor in plain.values())
            raise OSError(
                f"{file}: a checkpoint of {size / 1e9:.3g} GB could not be written ({error}). What was "
                "written before is whole: make room, then the same command with --resume goes on from it."
            ) from error

    def _read(self, path: str) -> dict[str, Any] | None:
        file = self.folder / f"{path}{SUFFIX}"
        if not any(self.ranks.largest(self.ranks.leads and file.is_file())):
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                meta = stored.metadata() or {}
                if (meta.get("format"), meta.get("version")) != (FORMAT, __version__):
                    log.warning("%s: written by another version of this program, so not used", file)
                    return None
                # copied to where memory is aligned as everywhere: the same sums, to the last bit
                tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise InputFormatError(f"{file}: damaged ({error}). Remove it and train again.") from error
        log.info("from before the interruption: %s", path)
        value: dict[str, Any] = decoded(
            Encoded(json.loads(meta["tree"]), tensors), self._kinds, self.stack, self.device
        )
        return value


_in_force: list[Journal] = []


@contextmanager
def keeping(journal: Journal) -> Iterator[None]:
    """Put a journal in force; when the block ends well, what it wrote is not needed any more and goes."""
    _in_force.append(journal)
    try:
        yield
    finally:
        _in_force.pop()
    if journal.ranks.leads:
        shutil.rmtree(journal.folder, ignore_errors=True)


def journal() -> Steps:
    """The journal in force, or steps that only compute."""
    return _in_force[-1] if _in_force else Steps()
