"""The benchmark of scaling: its sets, its measuring, its fits, and the whole chain on some particles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import data_path
import scaling
import scaling_set

from cryodrgn_pipeline.io.mrc import MrcImages

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZES = [10_000, 100_000, 1_000_000]


def test_a_power_is_found_beside_what_a_step_takes_whatever_the_number() -> None:
    def best(values: list[float]) -> float:
        power, lowest, highest = scaling.growth(SIZES, values)
        assert lowest <= power <= highest
        return power

    assert best([5 + 3e-5 * n for n in SIZES]) == pytest.approx(1, abs=0.011)
    assert best([2 + 1e-9 * n**1.5 for n in SIZES]) == pytest.approx(1.5, abs=0.011)
    assert best([4.0, 4.0, 4.0]) == 0
    assert best([1 + 1e-6 * n * np.log(n) for n in SIZES]) == pytest.approx(scaling.N_LOG_N, abs=0.02)
    with pytest.raises(ValueError, match="positive"):
        scaling.growth(SIZES, [1.0, 0.0, 1.0])


def test_powers_that_noise_could_have_made_are_told_and_others_are_not() -> None:
    noisy = [(5 + 3e-4 * n) * factor for n, factor in zip(SIZES, (1.0, 0.95, 1.03), strict=True)]
    _, lowest, highest = scaling.growth(SIZES, noisy)
    assert lowest < 1 < highest
    _, lowest, _ = scaling.growth(SIZES, [1e-9 * n**1.5 for n in SIZES])
    assert lowest > scaling.N_LOG_N


def measured(step: str, particles: int, cpu_s: float, gib: float) -> scaling.Measured:
    return scaling.Measured(step, particles, 2 * cpu_s, cpu_s, int(gib * 2**30), 10**9, 1)


def test_the_page_says_how_steps_grow_and_whether_one_exceeds_the_memory() -> None:
    results = [
        measured(step, n, 2 + 1e-4 * n**power, gib)
        for n, gib in zip(SIZES, (0.5, 0.6, 1.6), strict=True)
        for step, power in (("import", 1.0), ("train", 0.5))
    ]
    page = scaling.page(results, 64, 10_000)
    (imported,) = [line for line in page.splitlines() if line.startswith("| import |")]
    assert "3.4 min (1.7 min), 1.60 GiB" in imported
    assert "N^1.00 (" in imported
    (trained,) = [line for line in page.splitlines() if line.startswith("| train |")]
    assert "N^0.50 (" in trained
    assert "1.60 GiB, below the limit" in page
    assert "from 100,000 to 1,000,000 particles it grew by 1.2 KB a particle" in page
    assert "ABOVE" in scaling.page([*results, measured("report", SIZES[-1], 1.0, 9.0)], 64, 10_000)


def test_memory_is_that_of_a_process_and_its_children_without_files() -> None:
    this = os.getpid()
    before = scaling.anonymous_bytes(this)
    program = "block = bytearray(b'1' * 50_000_000); print('ready', flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    grown = scaling.anonymous_bytes(this) - before
    child.communicate("\n")
    assert 50e6 < grown < 80e6  # and not the libraries that it shares
    assert scaling.anonymous_bytes(this) - before < 20e6


def test_a_step_that_fails_ends_the_benchmark_with_its_log(tmp_path: Path) -> None:
    step = scaling.Step("import", (sys.executable, "-c", "raise SystemExit('no such set')"), tmp_path)
    with pytest.raises(SystemExit, match="no such set"):
        scaling.measured_or_read(step, 10, tmp_path, 1)
    assert not list(tmp_path.glob("measured/*.json"))


def test_a_short_step_counts_with_the_best_of_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = iter([measured("import", 10, cpu_s, 1.0) for cpu_s in (3.0, 1.0, 2.0, 50.0)])  # wall: twice that
    made = tmp_path / "made"

    def make(*_: object) -> scaling.Measured:
        made.mkdir()  # an error where an earlier run has left it
        return next(runs)

    monkeypatch.setattr(scaling, "measure", make)
    short, long = (scaling.Step(name, (), made) for name in ("import", "train"))
    assert scaling.measured_or_read(short, 10, tmp_path, 3).cpu_s == 1
    made.rmdir()
    assert scaling.measured_or_read(long, 10, tmp_path, 3).cpu_s == 50
    assert not list(runs)
    assert scaling.measured_or_read(short, 10, tmp_path, 3).cpu_s == 1


def test_a_generated_set_repeats_particles_with_other_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_set, "DISTINCT", 20)
    scaling_set.write_set(tmp_path / "set", 50, 16)
    rows = [line.split("\t") for line in (tmp_path / "set" / scaling_set.STAR).read_text().splitlines()]
    rows = [row for row in rows if len(row) > 10]
    names = [row[2] for row in rows]
    assert len(set(names)) == 50
    assert names[7] == "000003@stacks/001.mrcs"
    assert rows[0][5:] == rows[20][5:] == rows[40][5:]  # the same defocus and pose
    stacks = [MrcImages(tmp_path / "set" / scaling_set.stack_name(n)) for n in range(10)]
    images = np.concatenate([stack.read(np.arange(5)) for stack in stacks])
    assert len(np.unique(images.reshape(50, -1), axis=0)) == 50
    assert stacks[0].header.dtype == np.float16


@pytest.mark.heavy
def test_the_chain_runs_from_a_set_to_exported_files_and_is_measured_once(tmp_path: Path) -> None:
    """The small form of the benchmark that makes SCALING.md."""
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--folder", str(tmp_path / "work")]
    command += ["--particles", "300", "--box-size", "16", "--learn-from", "200", "-o", str(tmp_path / "S.md")]
    command += ["--repeats", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    first = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    steps = [step.name for step in scaling.chain(tmp_path, 300, 16, 200)]
    assert [line.split(":")[0] for line in first.stdout.splitlines()] == [f"300 {name}" for name in steps]
    page = (tmp_path / "S.md").read_text()
    for name in steps:
        assert f"| {name} | " in page
    for step in scaling.chain(tmp_path / "work" / "300", 300, 16, 200):
        assert step.output.exists()
        kept = scaling.measured_or_read(step, 300, tmp_path / "work" / "300", 1)
        assert kept.peak_bytes > 20e6
        assert kept.cpu_s > 0
        assert kept.output_bytes > 0
    again = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0, again.stderr
    assert again.stdout == ""


def test_the_data_path_is_timed_with_and_without_a_network(tiny_set: Path) -> None:
    import torch

    data = data_path.training_data(tiny_set / "stack", torch.device("cpu"))
    table = data_path.table(data, 16, 32, cold=True)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        "bytes alone",
        "batches, no network",
        "training, 256 x 3",
    ]
    assert "%" in table.splitlines()[-1]


def test_the_time_of_a_batch_is_divided_without_a_rest(tiny_set: Path) -> None:
    import torch

    data = data_path.training_data(tiny_set / "stack", torch.device("cpu"))
    lines = data_path.profile(data, np.arange(96), 32).splitlines()
    rows = [[word.strip() for word in line.strip("|").split("|")] for line in lines[2:]]
    assert [name for name, *_ in rows] == [
        "reading",
        "transforms",
        "CTFs, grey scale, gathering",
        "Python, and starting operations",
    ]
    assert all(float(ms) >= 0 for _, ms, _ in rows)
    assert sum(float(share.removesuffix("%")) for *_, share in rows) == pytest.approx(100, abs=2)


def test_the_subspace_speed_is_measured_against_its_formulas() -> None:
    command = [sys.executable, str(BENCHMARKS / "subspace_speed.py"), "--boxes", "16", "--maps", "3"]
    command += ["--images", "20", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| 16 |")]
    assert all(float(cell) >= 0 for cell in row.strip("| ").split("|"))
    assert "ms an image" in done.stdout.splitlines()[-1]
