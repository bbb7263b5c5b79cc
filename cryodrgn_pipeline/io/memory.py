"""How much memory this process may still take, and how much it has taken."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory that can be had without swapping: what the system has left, or what a job's limit leaves.

    Linux' own estimate where there is one (it counts caches that can be dropped), else the free pages.
    """
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        left = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([left, *_left_of_limits()])


def _left_of_limits() -> list[int]:
    """What the control groups of this process (a Slurm job, a container) leave of their limits."""
    try:
        own = next(
            line.split("::", 1)[1]
            for line in Path("/proc/self/cgroup").read_text().split("\n")
            if "::" in line
        )
    except (OSError, StopIteration):
        return []
    left = []
    group = CGROUPS / own.strip().lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(CGROUPS):
            break
        try:
            limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit != "max":
            cache = int(counts.get("inactive_file", 0))  # files read before, dropped when memory is needed
            left.append(max(0, int(limit) - int(used) + cache))
    return left


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
