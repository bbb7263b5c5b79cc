"""The Snakemake workflow from the command line's side: find it, run it, show how its jobs get on."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cryodrgn_pipeline.errors import ConfigError, CryodrgnPipelineError
from cryodrgn_pipeline.io.atomic import replacing

if TYPE_CHECKING:
    import psutil

POLL_INTERVAL_S = 1.0
LINES_PER_POLL = 5
HEAD_BYTES = 256
SAVING_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A program that runs the workflow as a job of its own and may want it to end.

    `check` is called every second; when it raises, all jobs are told to save and end (SIGTERM) before the
    exception goes on. `keep_open` are file descriptors, such as a lock's, that Snakemake holds as long as it
    lives. Everything is printed to stdout.
    """

    check: Callable[[], None]
    keep_open: Sequence[int] = ()


def workflow_root() -> Path:
    """Find the folder that holds `workflows/` and `rules/`: inside an installed wheel, or the checkout.

    Raises
    ------
    CryodrgnPipelineError
        Neither is there, so the installation is damaged.
    """
    package = Path(__file__).resolve().parent
    for root in (package / "_bundle", package.parent):
        if (root / "workflows" / "Snakefile").is_file():
            return root
    raise CryodrgnPipelineError(
        f"no workflows/Snakefile in {package / '_bundle'} or {package.parent}; install the package again"
    )


def run_workflow(
    configfile: Path,
    *,
    cores: str | None = None,
    profile: str | None = None,
    extra: Sequence[str] = (),
    host: Host | None = None,
) -> int:
    """Check a configuration, then run Snakemake on it; returns Snakemake's exit code.

    Parameters
    ----------
    configfile
        The config.yaml to run.
    cores
        Number of cores, or `all`.
    profile
        A folder with a Snakemake profile, or the name of one of ours (local-gpu, slurm).
    extra
        Further words for Snakemake, passed on as they are.
    host
        The program whose job this is, if any.

    Raises
    ------
    ConfigError
        The configuration has mistakes, or names files that do not exist.
    """
    from cryodrgn_pipeline.config.check import load_config, missing_files

    config = load_config(configfile)
    known, _ = _snakemake_words().parse_known_args(list(extra))
    directory = Path(known.directory or ".")
    if not config.datasets:
        raise ConfigError(f"{configfile}: datasets is empty; name at least one dataset with its particles")
    if missing := missing_files(config, directory):
        raise ConfigError(f"{configfile}: files that do not exist:\n  " + "\n  ".join(missing))
    command = snakemake_command(configfile, cores=cores, profile=profile, extra=extra)
    logs = None if known.dry_run else directory / config.pathvars.logs
    return _supervised(command, logs, host)


def snakemake_command(
    configfile: Path, *, cores: str | None, profile: str | None, extra: Sequence[str]
) -> list[str]:
    """Build the words of the Snakemake call: our Snakefile and profiles, and this Python."""
    root = workflow_root() / "workflows"
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(root / "Snakefile")]
    command += ["--configfile", str(configfile.resolve())]
    known, _ = _snakemake_words().parse_known_args(list(extra))
    if cores is None and profile is None and known.jobs is None:
        cores = "all"
    if cores is not None:
        command += ["--cores", cores]
    if profile is not None:
        ours = root / "profiles" / profile
        command += ["--profile", str(ours) if ours.is_dir() and not Path(profile).is_dir() else profile]
    return [*command, *extra]


def copy_profile(name: str, folder: Path, *, force: bool = False) -> Path:
    """Copy one of our profiles into `folder`, to be filled in; `run --profile NAME` there takes the copy.

    Parameters
    ----------
    name
        local-gpu or slurm.
    folder
        Where `NAME/config.yaml` is written, usually the working directory.
    force
        Replace a copy that is already there.

    Raises
    ------
    ConfigError
        There is no such profile, or the copy exists and `force` is not set.
    """
    profiles = workflow_root() / "workflows" / "profiles"
    known = sorted(path.name for path in profiles.iterdir() if path.name != "default")
    if name not in known:
        raise ConfigError(f"no profile {name}; there are: {', '.join(known)}")
    copy = folder / name / "config.yaml"
    if copy.exists() and not force:
        raise ConfigError(f"{copy} exists and is left as it is; --force replaces it")
    copy.parent.mkdir(parents=True, exist_ok=True)
    with replacing(copy) as temporary:
        shutil.copyfile(profiles / name / "config.yaml", temporary)
    return copy


def run_command_line(words: Sequence[str]) -> int:
    """Run one of our own verbs in a process of its own; returns its exit code."""
    return _supervised([sys.executable, "-m", "cryodrgn_pipeline", *words], None)


def _snakemake_words() -> argparse.ArgumentParser:
    """Parse the few of Snakemake's options that change what we do ourselves."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-d", "--directory")
    parser.add_argument("-j", "--jobs")
    parser.add_argument("-n", "--dry-run", "--dryrun", action="store_true")
    for switch in "aDfFklpqSt":  # known, so that -n is found in -np
        parser.add_argument(f"-{switch}", action="store_true")
    return parser


def _supervised(command: list[str], logs: Path | None, host: Host | None = None) -> int:
    """Run a command whose jobs find our command line on PATH; end with it, whoever is asked to end."""
    own_bin = str(Path(sys.executable).parent)
    environment = dict(os.environ, PATH=os.pathsep.join([own_bin, *os.get_exec_path()]))
    if host is not None:
        process = subprocess.Popen(
            command,
            env=environment,
            stderr=subprocess.STDOUT,
            pass_fds=host.keep_open,
            start_new_session=True,  # a signal to us reaches the jobs through _end_tree, and once only
        )
        with following(logs, sys.stdout):
            return _exit_code(_hosted(process, host))
    process = subprocess.Popen(command, env=environment)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        previous = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
            signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        }
    try:
        with following(logs, sys.stderr):
            return _exit_code(_waited(process))
    finally:
        if in_main_thread:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _waited(process: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # Snakemake got the same Ctrl-C, saves what can be saved and ends
            continue


def _hosted(process: subprocess.Popen[bytes], host: Host) -> int:
    try:
        while True:
            host.check()
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=POLL_INTERVAL_S)
    except BaseException:
        _end_tree(process.pid)
        process.wait()
        raise


def _end_tree(pid: int) -> None:
    """Tell a process and all below it to end, and wait: a training that saves outlives its Snakemake."""
    import psutil

    try:
        head = psutil.Process(pid)
        tree = [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + SAVING_LIMIT_S
    while running := [process for process in tree if _is_alive(process)]:
        if time.monotonic() > deadline:
            for process in running:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(0.1)


def _is_alive(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def following(folder: Path | None, stream: TextIO) -> Iterator[None]:
    """Copy what is written to the log files below `folder` to `stream`, each line with its job's name.

    Parameters
    ----------
    folder
        The workflow's folder of logs; None follows nothing.
    stream
        Where the lines go, usually stderr.
    """
    if folder is None:
        yield
        return
    reader = _LogReader(folder)
    reader.new_lines()  # what is there already is old
    done = threading.Event()

    def copy() -> None:
        while not done.wait(POLL_INTERVAL_S):
            for line in reader.new_lines():
                print(line, file=stream, flush=True)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for line in reader.new_lines():
            print(line, file=stream, flush=True)


class _LogReader:
    """Remembers how far each log file has been read; one that begins differently is another file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, tuple[bytes, int]] = {}

    def new_lines(self) -> list[str]:
        lines = []
        for path in sorted(self._folder.rglob("*.log")):
            job = path.relative_to(self._folder).with_suffix("").as_posix()
            fresh = [line for line in self._fresh_text(path).splitlines() if line.strip()]
            lines += [f"  {job} | {line}" for line in fresh[-LINES_PER_POLL:]]
        return lines

    def _fresh_text(self, path: Path) -> str:
        head, offset = self._read.get(path, (b"", 0))
        try:
            with path.open("rb") as file:
                beginning = file.read(HEAD_BYTES)
                if not beginning.startswith(head):
                    offset = 0
                file.seek(offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # removed between listing and reading: Snakemake clears a log before each attempt
            return ""
        offset += len(whole) + len(newline)
        self._read[path] = (beginning[: min(offset, HEAD_BYTES)], offset)
        return whole.decode("utf-8", errors="replace")
