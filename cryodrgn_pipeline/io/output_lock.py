"""One writer per output: a lock that dies with its process, so leftovers of dead runs can be told."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryodrgn_pipeline.errors import CryodrgnPipelineError

log = logging.getLogger(__name__)

NO_LOCKS_HERE = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold the right to write `path`; remove the temporary files that killed writers left beside it.

    Raises
    ------
    CryodrgnPipelineError
        If another process is writing the same output now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    descriptor = _locked(path, lock)
    try:
        if descriptor is not None:
            _remove_leftovers(path)
        yield
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)
            os.close(descriptor)


def _locked(path: Path, lock: Path) -> int | None:
    """A descriptor that holds `lock`, or None where the file system knows no locks."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and lock.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
            os.close(descriptor)  # its holder removed it meanwhile: the lock is another file now
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise CryodrgnPipelineError(
                    f"{path}: another process is writing it (it holds {lock}); wait for it or stop it"
                ) from error
            if error.errno not in NO_LOCKS_HERE:
                raise
            log.debug("%s: this file system has no locks; leftovers of dead runs stay", lock)
            return None


def _remove_leftovers(path: Path) -> None:
    # the names that io.atomic gives its temporary files and folders
    ours = re.compile(rf"\.{re.escape(path.name)}\.(old\.)?[a-z0-9_]{{8}}({re.escape(path.suffix)})?")
    for leftover in path.parent.iterdir():
        if ours.fullmatch(leftover.name):
            log.warning("removing %s, which a run that was killed left", leftover)
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def full_disk_explained(path: Path, needed_bytes: int) -> Iterator[None]:
    """Refuse to start on a disk that is too small, and say so when it fills up on the way.

    Raises
    ------
    CryodrgnPipelineError
        If fewer than `needed_bytes` are free beside `path`, or a write finds no space.
    """
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        raise CryodrgnPipelineError(
            f"{path}: needs {needed_bytes / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free in {path.parent}; "
            "make room, write elsewhere, or choose a smaller box or float16"
        )
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CryodrgnPipelineError(
            f"{path}: the disk or quota is full ({needed_bytes / 1e9:.3g} GB are needed); the unfinished "
            "output was removed"
        ) from error
