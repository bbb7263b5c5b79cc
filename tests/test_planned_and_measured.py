"""Steps stay within the memory that their jobs ask for, and jobs do not ask for much more than steps take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from planning import Row, measured_steps

LARGE_MB = 1000  # below, what is mapped and not counted, and the room left for it, outweigh what is held
MOST = 3.0  # times the peak that is asked for, where it is larger


def within(rows: list[Row]) -> list[Row]:
    """Check every row; those whose peak is large."""
    for row in rows:
        assert 50 < row.used.peak_mb < row.asked.mem_mb, row
        assert 0 < row.written < 1e6 * row.asked.disk_mb, row
        if row.used.peak_mb > LARGE_MB:
            assert row.asked.mem_mb < MOST * row.used.peak_mb, row
    return [row for row in rows if row.used.peak_mb > LARGE_MB]


def test_a_small_set_stays_within_the_memory_and_disk_that_are_asked_for(tmp_path: Path) -> None:
    steps = ("import", "preprocess", "consensus", "train")
    rows = list(measured_steps(tmp_path, 300, 16, steps, ["method=subspace", "latent_dim=2"]))
    within(rows)
    assert [row.step for row in rows] == list(steps)


@pytest.mark.heavy
@pytest.mark.parametrize(("particles", "box_size_px"), [(5000, 64), (1000, 128)])
def test_a_step_that_takes_much_asks_for_that_and_not_for_much_more(
    tmp_path: Path, particles: int, box_size_px: int
) -> None:
    rows = list(measured_steps(tmp_path, particles, box_size_px))
    assert "train" in {row.step for row in within(rows)}
