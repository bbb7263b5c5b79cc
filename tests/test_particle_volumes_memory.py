"""How many latent points share a pass: more where there is memory, fewer widths where one does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from cryodrgn_pipeline import particle_volumes_memory
from cryodrgn_pipeline.errors import ConfigError
from cryodrgn_pipeline.io import memory
from cryodrgn_pipeline.particle_volumes_memory import GIB, SHARE, plan_passes, sums_bytes
from cryodrgn_pipeline.particle_volumes_sums import TargetSums


def plan(box_size_px: int, targets: int, memory_gb: float | None):
    return plan_passes(box_size_px, targets, 4, grids=10, kept=0, memory_gb=memory_gb)


def test_more_memory_means_fewer_passes_never_more() -> None:
    passes = [plan(64, 40, gib).passes(40) for gib in (0.4, 0.8, 1.6, 3.2)]
    assert passes == sorted(passes, reverse=True)
    assert passes[0] > 1
    assert passes[-1] == 1


def test_twenty_states_of_128_px_share_a_pass_within_12_gib() -> None:
    found = plan(128, 20, 12)
    assert (found.passes(20), found.widths) == (1, 4)
    assert found.most < 12 * GIB


def test_a_large_box_has_fewer_widths_before_it_is_refused() -> None:
    assert plan(256, 1, 12).widths == 4
    assert plan(256, 1, 7).widths in (2, 3)
    assert plan(256, 5, 7).per_pass == 1
    with pytest.raises(ConfigError, match="--memory-gb"):
        plan(256, 1, 3)


def test_a_plan_stays_within_its_share_of_what_is_available(monkeypatch) -> None:
    monkeypatch.setattr(particle_volumes_memory, "available_bytes", lambda: 10 * GIB)
    found = plan(128, 40, None)
    assert found.most <= SHARE * 10 * GIB
    assert found.most + sums_bytes(128, 1, 4, with_model=True) > SHARE * 10 * GIB
    assert found.passes(40) > 1


def test_sums_take_the_memory_that_was_planned() -> None:
    sums = TargetSums(32, 3, 4).sums
    assert sums.nbytes == pytest.approx(sums_bytes(32, 3, 4, with_model=True), rel=0.02)


def test_a_jobs_limit_counts_where_it_is_tighter_than_the_machine(tmp_path: Path, monkeypatch) -> None:
    whole = memory.available_bytes()
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1500000\ninactive_file 500000\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    if not any("::" in line for line in Path("/proc/self/cgroup").read_text().splitlines()):
        pytest.skip("no control groups of the second version here")
    assert memory.available_bytes() == 3500000 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() > 3500000


def test_the_peak_is_at_least_what_is_held() -> None:
    held = bytearray(64 * 2**20)
    assert memory.peak_bytes() > len(held)
