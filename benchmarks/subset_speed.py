"""How long a subset of a million particles takes to resolve, for both kinds of ids.

    python benchmarks/subset_speed.py [--rows 1000000] [--rounds 3] [--folder DIR]

Makes a run of that many particles (latent.parquet with 8 coordinates, an analysis, an id file that names all
of them in another order) and prints, as a Markdown table, the seconds that each of these takes once the
libraries are loaded: finding the rows of the id file's particles (what `train --subset` and `export --subset`
do), and choosing by cluster and junk, by an expression, and by an id file (what `select` does, its id file
written). The last column is the whole `select` command, from start to end. Each is a process of its own; the
fastest of the rounds counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHOICES = {
    "cluster and no junk": ["--cluster", "0,3,7", "--no-junk"],
    "expression": ["--where", "z_0 > 0.5 and (loss < 1.2 or abs(z_1) > 1)"],
    "all of an id file": ["--ids", "ids.txt"],
}
ROWS_OF_IDS = """
import sys, time
from pathlib import Path
import pyarrow.compute, pyarrow.csv, pyarrow.parquet
from cryodrgn_pipeline.io.ids import read_id_rows
from cryodrgn_pipeline.io.tables import read_extra
started, cpu = time.perf_counter(), time.process_time()
known = read_extra(Path("latent.parquet"), ["particle_id"])["particle_id"]
rows = read_id_rows(Path("ids.txt"), known, "the run")
assert len(rows) == len(known)
print(time.perf_counter() - started, time.process_time() - cpu)
"""
SELECTED = """
import sys, time
from pathlib import Path
import pyarrow.compute, pyarrow.csv, pyarrow.parquet
from cryodrgn_pipeline.cli._choice import selection
from cryodrgn_pipeline.io.ids import write_ids
from cryodrgn_pipeline.landscape.select import select_particles
option, value, *junk = sys.argv[1:]
given = {name: [value] if option == f"--{name}" else [] for name in ("cluster", "where")}
ids = [Path(value)] if option == "--ids" else []
started, cpu = time.perf_counter(), time.process_time()
wanted = selection(given["cluster"], [], given["where"], [], ids, bool(junk), False)
write_ids(Path("out.txt"), select_particles(Path("."), wanted)[0])
print(time.perf_counter() - started, time.process_time() - cpu)
"""


def write_run(folder: Path, rows: int, star: bool) -> None:
    """A run's tables, and an id file of all its particles, shuffled."""
    from cryodrgn_pipeline.io.runs import write_columns

    rng = np.random.default_rng(0)
    if star:
        names = [
            f"{i % 200 + 1:06d}@Extract/job007/Movies/FoilHole_{i // 200:06d}_Data.mrcs" for i in range(rows)
        ]
        ids = np.array(names, dtype=object)
    else:
        ids = rng.permutation(np.arange(rows, dtype=np.uint64) * np.uint64(18446744073709))
    latent = {
        f"{name}_{j}": rng.normal(size=rows).astype(np.float32) for name in ("z", "std") for j in range(8)
    }
    latent |= {"loss": rng.normal(1, 0.1, rows).astype(np.float32), "held_out": rng.random(rows) < 0.05}
    write_columns(folder / "latent.parquet", {"particle_id": ids} | latent)
    analysis = {"cluster": rng.integers(0, 20, rows, dtype=np.int32), "junk": rng.random(rows) < 0.02}
    analysis |= {name: rng.normal(size=rows).astype(np.float32) for name in ("junk_score", "pc_1", "umap_1")}
    write_columns(folder / "analysis" / "particles.parquet", {"particle_id": ids} | analysis)
    shuffled = ids[rng.permutation(rows)].tolist()
    (folder / "ids.txt").write_text("".join(f"{name}\n" for name in shuffled), encoding="utf-8")


def measured(folder: Path, script: str, *words: str) -> tuple[float, float]:
    """Wall and CPU seconds that a script says it took."""
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    wall, cpu = done.stdout.split()
    return float(wall), float(cpu)


def whole_command(folder: Path, words: list[str]) -> float:
    """Wall seconds of `select`."""
    command = [sys.executable, "-m", "cryodrgn_pipeline", "select", ".", *words, "-o", "out.txt"]
    started = time.monotonic()
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    arguments = parser.parse_args()
    rounds = range(arguments.rounds)
    print(f"{arguments.rows:,} particles, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}\n")
    print("| subset | ids | wall (s) | CPU (s) | whole command, wall (s) |\n|---|---|---|---|---|")
    for star in (True, False):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            folder, kind = Path(name), "star" if star else "uid"
            write_run(folder, arguments.rows, star)
            wall, cpu = min(measured(folder, ROWS_OF_IDS) for _ in rounds)
            print(f"| rows of an id file | {kind} | {wall:.2f} | {cpu:.2f} | |")
            for what, words in CHOICES.items():
                wall, cpu = min(measured(folder, SELECTED, *words) for _ in rounds)
                whole = min(whole_command(folder, words) for _ in rounds)
                print(f"| {what} | {kind} | {wall:.2f} | {cpu:.2f} | {whole:.2f} |", flush=True)


if __name__ == "__main__":
    main()
