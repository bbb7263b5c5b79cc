"""cryoDRGN 4.3.1 in a virtual environment of its own, and how the programs are run and timed side by side."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from cryodrgn_pipeline import __version__

HERE = Path(__file__).resolve().parent
PEER = "cryodrgn==4.3.1"
PEER_TORCH = "torch==2.13.0"  # named, so that both programs run on the same build


@dataclass(frozen=True)
class Check:
    """One number, the bound it must keep, and whether smaller or larger is right."""

    what: str
    value: float
    bound: float
    at_most: bool = True

    @property
    def good(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def row(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return (
            f"| {self.what} | {self.value:.3g} | {sign} {self.bound:g} | {'pass' if self.good else 'FAIL'} |"
        )


class Bench:
    """Where things lie, and how commands are run and timed; makes cryoDRGN's environment where missing."""

    def __init__(self, venv: Path, work: Path, threads: int) -> None:
        install_peer(venv)
        self.bin, self.work, self.threads = venv / "bin", work, threads
        work.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, tuple[float, float]] = {}
        self.peak_mb: dict[str, float] = {}
        self.environment = os.environ | {
            name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        }

    def run(self, name: str, command: list[str | Path]) -> str:
        """Run one command, remember its wall and CPU seconds and its peak memory, return what it printed."""
        print(f"[{name}] {' '.join(map(str, command))}", file=sys.stderr, flush=True)
        with tempfile.TemporaryFile("w+") as said:
            started = time.monotonic()
            process = subprocess.Popen(
                [str(word) for word in command], env=self.environment, stdout=said, stderr=subprocess.STDOUT
            )
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self.seconds[name] = (time.monotonic() - started, used.ru_utime + used.ru_stime)
            self.peak_mb[name] = used.ru_maxrss / 1024
            said.seek(0)
            printed = said.read()
        if process.returncode:
            raise SystemExit(f"{name} failed:\n{printed}")
        return printed

    def peer(self, *words: str | Path) -> list[str | Path]:
        return [self.bin / "cryodrgn", *words]

    def ours(self, *words: str | Path) -> list[str | Path]:
        return [sys.executable, "-m", "cryodrgn_pipeline", *words]

    def epoch_times(
        self, name: str, command: list[str | Path], images: int, mark: str
    ) -> tuple[float, float]:
        """Wall and CPU milliseconds per image and epoch, from the second epoch on."""
        print(f"[{name}] {' '.join(map(str, command))}", file=sys.stderr, flush=True)
        marks: list[tuple[float, float]] = []
        with subprocess.Popen(
            [str(word) for word in command],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            watched, lines = psutil.Process(process.pid), []
            for line in process.stdout or ():
                lines.append(line)
                if re.search(mark, line):
                    spent = watched.cpu_times()
                    marks.append((time.monotonic(), spent.user + spent.system))
        if process.returncode or len(marks) < 2:
            raise SystemExit(f"{name} failed ({len(marks)} epochs seen):\n{''.join(lines)}")
        (wall, cpu), (wall_end, cpu_end) = marks[0], marks[-1]
        epochs = len(marks) - 1
        return 1e3 * (wall_end - wall) / images / epochs, 1e3 * (cpu_end - cpu) / images / epochs

    def machine(self) -> str:
        """Versions, threads and processor, for the record."""
        names = (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        )
        versions = "import importlib.metadata as m; print(m.version('cryodrgn'), 'torch', m.version('torch'))"
        peer = self.run("peer version", [self.bin / "python", "-c", versions]).strip()
        return (
            f"cryodrgn-pipeline {__version__} (torch {torch.__version__}), cryodrgn {peer}, Python "
            f"{platform.python_version()}, {self.threads} threads of {os.cpu_count()} on "
            f"{next(names, platform.machine())}; load before the run {os.getloadavg()[0]:.1f}"
        )


def install_peer(venv: Path) -> None:
    """Make cryoDRGN's environment unless it is there."""
    if (venv / "bin" / "cryodrgn").exists():
        return
    print(f"installing {PEER} into {venv}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, PEER_TORCH], check=True)
    subprocess.run([*pip, PEER_TORCH, PEER], check=True)


def table(checks: list[Check]) -> str:
    """The checks as a table."""
    return "\n".join(
        ["| what | measured | bound | |", "|---|---|---|---|", *(check.row() for check in checks)]
    )
