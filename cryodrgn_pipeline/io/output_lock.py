"""One writer per output: a lock that dies with its process, names it, and tells leftovers of dead runs."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    with held(path.parent / f".{path.name}.lock", path):
        remove_leftovers(path)
        yield


@contextmanager
def held(lock: Path, path: Path) -> Iterator[None]:
    """Hold a lock file, which says who does, while the block writes `path`.

    The system takes the lock from a process that ends, however it ends. Where the file system knows no locks,
    a file is the lock: one that a dead process of this machine, or an earlier attempt of this Slurm job, left
    is taken over.

    Raises
    ------
    CryodrgnPipelineError
        If another process holds it.
    """
    try:
        descriptor = _locked(path, lock)
    except OSError as error:
        if error.errno not in NO_LOCKS_HERE:
            raise
        lock = lock.with_name(f"{lock.name}.held")
        descriptor = _claimed(path, lock)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_self()).encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, lock: Path) -> int:
    """A descriptor of the lock file, which the system says this process holds."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and lock.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
            os.close(descriptor)  # its holder removed it meanwhile: the lock is another file now
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            holder = _in_words(_holder(lock))
            raise CryodrgnPipelineError(
                f"{path}: another process is writing it: {holder} holds {lock}. Wait for it or stop it"
            ) from error


def _claimed(path: Path, claim: Path) -> int:
    """A descriptor of a file that is there while a process writes, where the file system knows no locks."""
    while True:
        try:
            return os.open(claim, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError as error:
            holder = _holder(claim)
            if holder is not None and _is_over(holder):
                claim.unlink(missing_ok=True)
                continue
            raise CryodrgnPipelineError(
                f"{path}: another process is writing it: {_in_words(holder)} holds {claim}. Wait for it or "
                "stop it; if it is dead, remove that file"
            ) from error


def _self() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID")
    return {"host": socket.gethostname(), "pid": os.getpid(), "slurm_job_id": job}


def _holder(lock: Path) -> dict[str, Any] | None:
    """Who wrote into a lock file; None: nobody yet."""
    try:
        holder: dict[str, Any] = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return holder


def _in_words(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "it"
    job = f", Slurm job {holder['slurm_job_id']}" if holder["slurm_job_id"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}"


def _is_over(holder: dict[str, Any]) -> bool:
    """Whether a process is known to be dead: of this machine and no more, or of this Slurm job before."""
    here = _self()
    if holder["host"] == here["host"]:
        return not process_runs(holder["pid"])
    return holder["slurm_job_id"] is not None and holder["slurm_job_id"] == here["slurm_job_id"]


def process_runs(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files and folders that killed writers of `path` left; for who holds its lock."""
    # the names that io.atomic gives its temporary files and folders
    ours = re.compile(rf"\.{re.escape(path.name)}\.(old\.)?[a-z0-9_]{{8}}({re.escape(path.suffix)})?")
    for leftover in path.parent.iterdir() if path.parent.is_dir() else ():
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
