"""What jobs ask for beside what they take: peak of anonymous memory, time and disk of every step.

    python benchmarks/planning.py --folder DIR --particles 2000 20000 --boxes 32 64 128

For each box a simulated set; more particles than were simulated are its rows again and again. Every step runs
as a command of its own, on one thread, and its process tree is watched. A table in Markdown goes to stdout; a
peak above what was asked for is marked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from peak_memory import Usage, measured

from cryodrgn_pipeline.config.models import Config
from cryodrgn_pipeline.planning.jobs import Job, Plan

CLI = (sys.executable, "-m", "cryodrgn_pipeline")
SIMULATED = 1000
FIELD_OF_VIEW_A = 192
STEPS = ("import", "preprocess", "consensus", "train", "analyze", "volumes", "report")


@dataclass(frozen=True)
class Row:
    """One step of one set: what was asked for and what it took, disk in bytes."""

    step: str
    particles: int
    box_size_px: int
    asked: Job
    used: Usage
    written: int

    def markdown(self) -> str:
        """A row of the table."""
        expected, peak_mb = self.asked.expected, self.used.peak_mb
        cells = (
            f"{self.particles:,}",
            str(self.box_size_px),
            self.step,
            f"{peak_mb / 1e3:.2f}" + ("" if peak_mb <= self.asked.mem_mb else " !"),
            f"{expected.memory_bytes / 1e9:.2f}",
            f"{self.asked.mem_mb / 1e3:.1f}",
            f"{self.used.cpu_seconds:.0f}",
            f"{expected.seconds:.0f}",
            f"{60 * self.asked.runtime_min}",
            f"{self.written / 1e6:.1f}",
            f"{expected.disk_bytes / 1e6:.1f}",
        )
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| N | box (px) | step | peak (GB) | expected | asked for | CPU (s) | expected (s) | asked for (s) | "
    "disk (MB) | expected |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def simulated(folder: Path, box_size_px: int, particles: int) -> Path:
    """A simulated star file of so many particles; beyond a thousand they are repeated."""
    data = folder / f"simulated_{box_size_px}"
    if not data.exists():
        size = ["--particles", min(SIMULATED, particles), "--box-size", box_size_px]
        scale = ["--pixel-size", FIELD_OF_VIEW_A / box_size_px, "--snr", "0.3"]
        measured([*CLI, "simulate", "-o", data, *size, *scale])
    lines = (data / "particles.star").read_text(encoding="utf-8").splitlines()
    rows = [number for number, line in enumerate(lines) if "@" in line]
    first, last = rows[0], rows[-1] + 1
    again = [lines[rows[number % len(rows)]] for number in range(particles)]
    star = data / f"particles_{particles}.star"
    star.write_text("\n".join([*lines[:first], *again, *lines[last:]]) + "\n", encoding="utf-8")
    return star


def measured_steps(
    folder: Path, particles: int, box_size_px: int, steps: Sequence[str] = STEPS, train: Sequence[str] = ()
) -> Iterator[Row]:
    """Run the steps one after the other, on one thread.

    Parameters
    ----------
    train
        Options of `train` as `key=value`, in the configuration's words: `method=subspace`.
    """
    star = simulated(folder, box_size_px, particles)
    where = folder / f"box{box_size_px}_n{particles}"
    settings = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in train)}
    config = Config.model_validate(
        {
            "datasets": {"set": {"particles": str(star), "preprocess": {"box_size_px": box_size_px}}},
            "train": settings,
            "resources": {"train": {"gpus": 0}, "volumes": {"gpus": 0}}
            | {step: {"threads": 1} for step in ("preprocess", "consensus", "analyze")},
        }
    )
    plan = Plan(config, where)
    standard = {"dataset": "set", "subset": "all", "run": "vae", "series": "centers"}
    run, one = where / "run", ["--threads", "1"]
    told = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", value)]
    of_report = [
        word
        for option, name in (("--consensus", "consensus"), ("--stack", "stack"), ("--import-dir", "import"))
        for word in (option, where / name)
    ]
    commands = {
        "import": ([star, "-o", where / "import"], where / "import"),
        "preprocess": (
            [where / "import", "--box-size", box_size_px, *one, "-o", where / "stack"],
            where / "stack",
        ),
        "consensus": ([where / "stack", "-o", where / "consensus"], where / "consensus"),
        "train": ([where / "stack", "--device", "cpu", *one, *told, "-o", run], run),
        "analyze": ([run], run / "analysis"),
        "volumes": (
            [run, "--z", run / "analysis" / "centers.csv", *one, "-o", run / "volumes"],
            run / "volumes",
        ),
        "report": (
            [run, "--volumes", run / "volumes", *of_report],
            run / "report",
        ),
    }
    for step in steps:
        words, output = commands[step]
        asked = plan.job(step, standard | {"box": str(box_size_px)})
        used = measured([*CLI, step, *words])
        written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        yield Row(step, particles, box_size_px, asked, used, written)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for sets and results; kept")
    parser.add_argument("--particles", type=int, nargs="+", default=[2000, 20_000])
    parser.add_argument("--boxes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--train", nargs="*", default=[], metavar="KEY=VALUE", help="such as method=subspace")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    print(HEADER)
    for box in given.boxes:
        for particles in given.particles:
            for row in measured_steps(given.folder, particles, box, given.steps, given.train):
                print(row.markdown(), flush=True)


if __name__ == "__main__":
    main()
