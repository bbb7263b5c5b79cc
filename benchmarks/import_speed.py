"""How long a million particles take to import, and how much memory: one process each, measured from outside.

    python benchmarks/import_speed.py [--rows 1000000] [--folder DIR]

Makes a RELION 3.1 star file (30 columns) and a cryoSPARC .cs file in both encodings, imports each in a
process of its own with --metadata-only, exports half of the particles again, and prints wall time, CPU time
and peak resident memory of each as a Markdown table. `starfile.read` of the same star file stands beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROWS_OF_TEXT = 20000
COLUMN_NAMES = """
rlnCoordinateX rlnCoordinateY rlnMicrographName rlnImageName rlnOpticsGroup rlnDefocusU rlnDefocusV
rlnDefocusAngle rlnPhaseShift rlnCtfBfactor rlnCtfScalefactor rlnCtfMaxResolution
rlnCtfFigureOfMerit rlnAngleRot rlnAngleTilt rlnAnglePsi rlnOriginXAngst rlnOriginYAngst
rlnClassNumber rlnNormCorrection rlnRandomSubset rlnLogLikeliContribution
rlnMaxValueProbDistribution rlnNrOfSignificantSamples rlnGroupNumber rlnHelicalTubeID
rlnAngleTiltPrior rlnAnglePsiPrior rlnAutopickFigureOfMerit rlnParticleSelectZScore
"""
COLUMNS = COLUMN_NAMES.split()
WHOLE = {"rlnClassNumber", "rlnNrOfSignificantSamples", "rlnGroupNumber", "rlnHelicalTubeID"}
OPTICS = (
    "data_optics\n\nloop_ \n_rlnOpticsGroupName #1 \n_rlnOpticsGroup #2 \n_rlnVoltage #3 \n"
    "_rlnSphericalAberration #4 \n_rlnAmplitudeContrast #5 \n_rlnImagePixelSize #6 \n_rlnImageSize #7 \n"
    "opticsGroup1            1   300.000000     2.700000     0.100000     1.060000          256 \n \n\n"
)


def write_star(path: Path, rows: int) -> None:
    """A star file as RELION lays it out; numbers repeat after 20,000 rows, image names do not."""
    rng = np.random.default_rng(0)
    fixed = {"rlnPhaseShift": 0.0, "rlnCtfBfactor": 0.0, "rlnCtfScalefactor": 1.0, "rlnNormCorrection": 0.9}
    tails = []
    for row in range(min(rows, ROWS_OF_TEXT)):
        values = rng.normal(size=len(COLUMNS)) * 60
        cells = []
        for name, value in zip(COLUMNS, values, strict=True):
            if name in ("rlnMicrographName", "rlnImageName"):
                continue
            if name in WHOLE:
                cells.append(f"{1 + row % 4:12d}")
            elif name == "rlnOpticsGroup":
                cells.append(f"{1:12d}")
            elif name == "rlnRandomSubset":
                cells.append(f"{1 + row % 2:12d}")
            elif name.startswith("rlnDefocus") and name != "rlnDefocusAngle":
                cells.append(f"{15000 + value:12.6f}")
            else:
                cells.append(f"{fixed.get(name, value):12.6f}")
        tails.append((" ".join(cells[:2]), " ".join(cells[2:])))
    with path.open("w") as file:
        head = "".join(f"_{name} #{i} \n" for i, name in enumerate(COLUMNS, start=1))
        file.write(f"\n# version 30001\n\n{OPTICS}\n# version 30001\n\ndata_particles\n\nloop_ \n{head}")
        for row in range(rows):
            before, after = tails[row % len(tails)]
            name = f"FoilHole_{row // 200:06d}_Data.mrc"
            stack = f"{row % 200 + 1:06d}@Extract/job007/Movies/{name}s"
            file.write(f"{before} MotionCorr/job002/Movies/{name} {stack} {after} \n")


def write_cs(path: Path, rows: int, csdat: bool) -> None:
    """A .cs file with the columns of a homogeneous refinement."""
    from cryosparc.dataset import CSDAT_FORMAT, NUMPY_FORMAT, Dataset

    rng = np.random.default_rng(0)
    columns = {
        "uid": rng.permutation(np.arange(rows, dtype=np.uint64) * np.uint64(18446744073709)),
        "blob/path": np.array([f"J19/extract/mic_{i // 200:06d}_particles.mrc" for i in range(rows)], object),
        "blob/idx": (np.arange(rows) % 200).astype(np.uint32),
        "blob/shape": np.full((rows, 2), 256, dtype=np.uint32),
        "blob/psize_A": np.full(rows, 1.06, dtype=np.float32),
        "blob/sign": np.full(rows, -1, dtype=np.float32),
        "ctf/type": np.full(rows, "ctffind4", dtype=object),
        "ctf/exp_group_id": np.zeros(rows, dtype=np.uint32),
        "ctf/accel_kv": np.full(rows, 300, dtype=np.float32),
        "ctf/cs_mm": np.full(rows, 2.7, dtype=np.float32),
        "ctf/amp_contrast": np.full(rows, 0.1, dtype=np.float32),
        "ctf/df1_A": rng.uniform(1e4, 2e4, rows).astype(np.float32),
        "ctf/df2_A": rng.uniform(1e4, 2e4, rows).astype(np.float32),
        "ctf/df_angle_rad": rng.uniform(-1.5, 1.5, rows).astype(np.float32),
        "ctf/phase_shift_rad": np.zeros(rows, dtype=np.float32),
        "ctf/scale": np.ones(rows, dtype=np.float32),
        "ctf/bfactor": np.zeros(rows, dtype=np.float32),
        "ctf/tilt_A": np.zeros((rows, 2), dtype=np.float32),
        "ctf/trefoil_A": np.zeros((rows, 2), dtype=np.float32),
        "ctf/tetra_A": np.zeros((rows, 4), dtype=np.float32),
        "ctf/anisomag": np.zeros((rows, 4), dtype=np.float32),
        "alignments3D/pose": rng.normal(size=(rows, 3)).astype(np.float32),
        "alignments3D/shift": rng.normal(size=(rows, 2)).astype(np.float32),
        "alignments3D/psize_A": np.full(rows, 1.06, dtype=np.float32),
        "alignments3D/split": (np.arange(rows) % 2).astype(np.uint32),
        "alignments3D/class": np.zeros(rows, dtype=np.uint32),
        "alignments3D/error": rng.normal(size=rows).astype(np.float32),
        "alignments3D/class_posterior": np.ones(rows, dtype=np.float32),
        "alignments3D/alpha": np.ones(rows, dtype=np.float32),
    }
    Dataset(list(columns.items())).save(path, format=CSDAT_FORMAT if csdat else NUMPY_FORMAT)


def measure(*command: str | Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident GB of a child process."""
    started = time.monotonic()
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    words = [sys.executable, *map(str, command)]
    child = os.posix_spawn(sys.executable, words, dict(os.environ), file_actions=quiet)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(map(str, command))}")
    return time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, rows = Path(name), arguments.rows
        sources = {
            "star, 30 columns": folder / "p.star",
            ".cs, NumPy encoding": folder / "numpy.cs",
            ".cs, CSDAT encoding": folder / "csdat.cs",
        }
        write_star(sources["star, 30 columns"], rows)
        write_cs(sources[".cs, NumPy encoding"], rows, csdat=False)
        write_cs(sources[".cs, CSDAT encoding"], rows, csdat=True)
        print(f"{rows:,} rows, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}\n")
        print("| step | file (MB) | wall (s) | CPU (s) | peak memory (GB) |\n|---|---|---|---|---|")
        verb = ("-m", "cryodrgn_pipeline", "-q")
        for what, source in sources.items():
            size, output = source.stat().st_size / 1e6, folder / source.stem
            report(f"import {what}", size, measure(*verb, "import", source, "--metadata-only", "-o", output))
            ids = folder / "ids.txt"
            half(output, ids)
            target = folder / f"half{source.suffix}"
            command = (*verb, "export", output, "--subset", ids, "-o", target)
            report(f"export half of it ({source.suffix})", size, measure(*command))
        star = sources["star, 30 columns"]
        code = f"import starfile; starfile.read({str(star)!r})"
        report("starfile.read, for comparison", star.stat().st_size / 1e6, measure("-c", code))


def half(import_dir: Path, ids: Path) -> None:
    """Every second particle's id."""
    from cryodrgn_pipeline.io.tables import read_extra

    names = read_extra(import_dir / "particles.parquet", ["particle_id"])["particle_id"][::2]
    ids.write_text("\n".join(map(str, names)) + "\n")


def report(what: str, size_mb: float, measured: tuple[float, float, float]) -> None:
    """One row of the table."""
    wall, cpu, memory = measured
    print(f"| {what} | {size_mb:.0f} | {wall:.1f} | {cpu:.1f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
