"""The plan of a configuration as a table to read, or as JSON for a program."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryodrgn_pipeline.config.check import load_config
from cryodrgn_pipeline.errors import ConfigError
from cryodrgn_pipeline.planning.jobs import Job, Plan
from cryodrgn_pipeline.planning.sources import SourceSize
from cryodrgn_pipeline.progress import duration

HEADINGS = ("rule", "of", "threads", "GPUs", "memory", "time h:min", "expected", "disk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Of all jobs: disk in MB that their results take, what of it lies there, and what is free beside it; the
    longest job, and hours of cores and GPUs: as expected, and if every job took as long as it may.
    """

    disk_mb: int
    there_mb: int
    free_mb: int
    longest: Job
    cpu_hours: float
    cpu_hours_at_most: float
    gpu_hours: float
    gpu_hours_at_most: float

    @property
    def enough(self) -> bool:
        """Whether the file system has room for the rest of the results."""
        return self.disk_mb - self.there_mb <= self.free_mb


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What a configuration gives: the size of each dataset, all jobs, and their totals."""

    results: Path
    sources: dict[str, SourceSize]
    jobs: list[Job]
    totals: Totals

    def as_json(self) -> dict[str, Any]:
        """The same in plain values."""
        totals = asdict(self.totals) | {"longest": _job_json(self.totals.longest)}
        return {
            "results": str(self.results),
            "datasets": {name: asdict(source) for name, source in self.sources.items()},
            "jobs": [_job_json(job) for job in self.jobs],
            "totals": totals | {"enough_disk": self.totals.enough},
        }

    def lines(self) -> Iterator[str]:
        """The same for a reader."""
        for name, source in self.sources.items():
            known = f" ({source.origin})" if source.origin else ""
            about = "about " if source.sampled else ""
            yield f"{name}: {about}{source.particles:,} particles of {source.box_size_px} px{known}"
            if source.assumed:
                yield f"  {source.assumed}"
        yield ""
        yield from aligned([HEADINGS, *map(_row, self.jobs)])
        yield ""
        totals, longest = self.totals, self.totals.longest
        yield (
            f"disk: {_gigabytes(totals.disk_mb)} of results in {self.results}; {_gigabytes(totals.there_mb)} "
            f"lie there, {_gigabytes(totals.free_mb)} are free" + ("" if totals.enough else ": TOO LITTLE")
        )
        yield (
            f"longest job: {longest.rule} of {_name(longest)}, "
            f"{duration(longest.expected.seconds)} expected, {_hours(longest.runtime_min)} h asked for"
        )
        yield (
            f"in all: {totals.cpu_hours:.1f} CPU hours and {totals.gpu_hours:.1f} GPU hours expected, at "
            f"most {totals.cpu_hours_at_most:.1f} and {totals.gpu_hours_at_most:.1f}"
        )


def plan_workflow(configfile: Path, directory: Path = Path()) -> Planned:
    """What the workflow of a configuration will need, from the start to the reports.

    Parameters
    ----------
    configfile
        The config.yaml to plan.
    directory
        Folder that the workflow will run in: relative paths start there.

    Raises
    ------
    ConfigError
        The configuration has mistakes or names no dataset. Files that are not there are no error: what they
        would tell is assumed, and said.
    """
    config = load_config(configfile)
    if not config.datasets:
        raise ConfigError(f"{configfile}: datasets is empty; name at least one dataset with its particles")
    results = (directory / config.pathvars.results).absolute()
    plan = Plan(config, results, directory)
    jobs = plan.jobs()
    return Planned(
        results=results,
        sources={name: plan.source(name) for name in config.datasets},
        jobs=jobs,
        totals=_totals(jobs, results, list(config.datasets)),
    )


def _totals(jobs: Sequence[Job], results: Path, datasets: Sequence[str]) -> Totals:
    def hours(weights: Sequence[int], minutes: Sequence[float]) -> float:
        return sum(weight * each for weight, each in zip(weights, minutes, strict=True)) / 60

    expected = [job.expected.seconds / 60 for job in jobs]
    asked = [float(job.runtime_min) for job in jobs]
    threads = [job.threads * job.nodes for job in jobs]
    gpus = [job.gpus * job.nodes for job in jobs]
    return Totals(
        disk_mb=sum(job.disk_mb for job in jobs),
        there_mb=sum(_bytes_below(results / name) for name in datasets) // 10**6,
        free_mb=_free_bytes(results) // 10**6,
        longest=max(jobs, key=lambda job: job.expected.seconds),
        cpu_hours=hours(threads, expected),
        cpu_hours_at_most=hours(threads, asked),
        gpu_hours=hours(gpus, expected),
        gpu_hours_at_most=hours(gpus, asked),
    )


def _bytes_below(folder: Path) -> int:
    files = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files)


def _free_bytes(folder: Path) -> int:
    """Free on the file system that a folder is on, or will be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def _job_json(job: Job) -> dict[str, Any]:
    expected = {
        "memory_mb": round(job.expected.memory_bytes / 1e6),
        "runtime_min": round(job.expected.seconds / 60, 1),
        "disk_mb": round(job.expected.disk_bytes / 1e6, 1),
    }
    return {"rule": job.rule} | asdict(job) | {"expected": expected}


def _row(job: Job) -> tuple[str, ...]:
    gpus = job.gpus * job.nodes
    return (
        job.rule,
        _name(job),
        str(job.threads * job.nodes),
        str(gpus) if gpus else "",
        _gigabytes(job.mem_mb),
        _hours(job.runtime_min),
        _hours(math.ceil(job.expected.seconds / 60)),
        _gigabytes(job.disk_mb),
    )


def _name(job: Job) -> str:
    return "/".join(job.wildcards.values())


def _hours(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02d}"


def _gigabytes(megabytes: float) -> str:
    return f"{megabytes / 1000:,.1f} GB" if megabytes >= 100 else f"{megabytes:.0f} MB"


def aligned(rows: Sequence[Sequence[str]], *, left: int = 2) -> Iterator[str]:
    """Rows of words as lines with columns below each other, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        words = [
            word.ljust(width) if number < left else word.rjust(width)
            for number, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(words).rstrip()
