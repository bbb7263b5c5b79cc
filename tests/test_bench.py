"""The benchmark's own arithmetic: reading cryoDRGN's log, tables, and the section of RESULTS.md."""

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench
import structures
from bench_report import (
    BEGIN,
    END,
    PEER,
    Row,
    at_time,
    conclusion,
    final_rows,
    gains_table,
    rewrite,
    scores_table,
)

LOG = """=====> Epoch: 1 Average gen loss = 0.730874, KLD = 4.9, total loss = 0.731647; Finished in 0:00:24.9
# [Train Epoch: 2/100] [2000/4000 particles] gen loss=0.520340, kld=21.1, beta=0.125000, loss=0.523668
=====> Epoch: 2 Average gen loss = 0.6, KLD = 10.7, total loss = 0.62; Finished in 0:01:04.5
=====> Epoch: 2 Average gen loss = 0.6, KLD = 10.7, total loss = 0.61; Finished in 1:00:04.5
"""


def row(method: str, moving: float, **changes: object) -> Row:
    base = Row(
        set="hinge32",
        method=method,
        seed=0,
        commands=["train"],
        commit="abc",
        load=1.0,
        wall_s={"train": 10.0, "volumes": 2.0},
        cpu_s={"train": 20.0},
        peak_mb=500.0,
        fsc_auc={"unmasked": 0.4, "union": 0.4, "moving": moving},
        each=[moving - 0.01, moving, moving + 0.01],
        references={"consensus": {"moving": 0.3, "union": 0.35}, "oracle": {"moving": 0.45, "union": 0.46}},
        headroom=(moving - 0.3) / 0.15,
        latent={"r2": {"motion": 0.9}},
    )
    return replace(base, **changes)


def peer(epoch: int, moving: float, wall_s: float) -> Row:
    wall = {"train": wall_s, "volumes": 0.0}
    return row(PEER, moving, epoch=epoch, wall_s=wall, converged=False, extra={"loss": 0.5})


ROWS = [peer(1, 0.31, 5), peer(20, 0.40, 1000), row("subspace", 0.44), row("subspace", 0.46, seed=1)]


def test_epochs_are_read_from_the_log_and_a_repeated_one_counts_once():
    found = bench.epochs_of(LOG)
    assert found == {1: (0.731647, 24.9), 2: (0.61, 3604.5)}


@pytest.mark.parametrize(("last", "flat"), [(0.5499, True), (0.54, False), (0.56, True)])
def test_a_loss_is_flat_when_ten_epochs_lower_it_by_less_than_half_a_percent(last, flat):
    assert bench.is_flat({10: (0.551, 1.0), 20: (last, 1.0)}, 20) == flat
    assert not bench.is_flat({20: (last, 1.0)}, 20)


def test_the_gain_compares_the_mean_over_seeds_with_the_last_epoch():
    line = gains_table(ROWS).splitlines()[-1]
    assert "| hinge32 | subspace | 0, 1 | +0.050 | +0.050 … +0.050 | 1.00 | 83 | no | 0.310 |" in line
    assert gains_table(ROWS[2:]) == ""


def test_at_equal_time_the_last_epoch_reached_counts():
    assert at_time(ROWS[:2], 12.0) == "0.310"
    assert at_time(ROWS[:2], 1.0) == "none yet; 0.310 after epoch 1, 5 s"
    assert at_time(ROWS[:2], 2000.0) == "0.400"


def test_the_conclusion_counts_only_sets_on_which_cryodrgn_converged():
    assert conclusion(ROWS) == ""
    flat = [peer(20, 0.40, 1000), row("vae", 0.42)]
    other = [replace(each, set="large32") for each in (peer(20, 0.30, 1000), row("vae", 0.38))]
    rows = [replace(each, converged=True) for each in flat + other] + [
        replace(each, set="rigid32") for each in ROWS
    ]
    said = conclusion(rows)
    assert (
        "mean of hinge32, large32: +0.050. Of those with scores by image (hinge32, large32): +0.050" in said
    )
    assert "rigid32" not in said
    rows[2] = replace(rows[2], each=[])  # only the mean was kept
    assert "large32: +0.050. Of those with scores by image (hinge32): +0.020 (" in conclusion(rows)


def test_scores_name_each_final_run_with_the_ends_between_which_it_lies():
    assert [each.epoch for each in final_rows(ROWS)] == [20, None, None]
    table = scores_table(ROWS)
    assert "| hinge32 | consensus | – | 0.350 | 0.300 |" in table
    assert "| hinge32 | subspace, seed 1 | 0.400 | 0.400 | 0.460 | 1.07 | motion 0.900 |" in table
    assert "epoch 1 |" not in table


def test_the_section_is_replaced_and_the_rest_kept(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\nbefore\n")
    rewrite(page, f"{BEGIN}\nfirst\n{END}")
    page.write_text(page.read_text() + "\nafter\n")
    rewrite(page, f"{BEGIN}\nsecond\n{END}")
    text = page.read_text()
    assert "first" not in text
    assert text.index("before") < text.index("second") < text.index("after")
    assert text.count(BEGIN) == text.count(END) == 1


def test_a_structure_is_taken_only_with_its_checksum_and_cut_to_its_chains():
    lines = [b"HEADER\n", *(f"ATOM  {1:5d}  CA  ALA {chain}   1\n".encode() for chain in "ABC")]
    content = b"".join(lines)
    known = structures.Structure("package==1", "a.pdb", hashlib.sha256(content).hexdigest(), "AC")
    assert structures.verified(content, known) == content
    with pytest.raises(SystemExit, match="SHA-256"):
        structures.verified(content + b"x", known)
    assert structures.with_chains(content, "AC") == lines[1] + lines[3]
    assert structures.with_chains(content, "") == content


def test_every_set_can_be_asked_of_simulate():
    from cryodrgn_pipeline.cli import app

    names = {name for name, parameter in _options(app)}
    for words, structure in bench.SETS.values():
        assert {word for word in words.split() if word.startswith("--")} <= names
        assert structure is None or structure in structures.STRUCTURES


def _options(app: object) -> list[tuple[str, object]]:
    import typer.main

    command = typer.main.get_command(app).commands["simulate"]  # type: ignore[arg-type,attr-defined]
    return [(option, parameter) for parameter in command.params for option in parameter.opts]


def test_rows_are_collected_with_the_fastest_drawing_of_cryodrgn(tmp_path):
    for epoch, drawing in ((1, 90.0), (20, 9.0)):
        folder = tmp_path / "hinge32" / f"peer_epoch_{epoch}"
        folder.mkdir(parents=True)
        wall = {"train": 30.0 * epoch, "volumes": drawing}
        bench.keep(row(PEER, 0.3, epoch=epoch, wall_s=wall), folder)
    assert [each.total_wall_s for each in bench.collected(tmp_path)] == [39.0, 609.0]


def test_kept_rows_of_cryodrgn_stand_where_there_is_no_run_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "KEPT", tmp_path / "kept")
    work = tmp_path / "work"
    for place, each in (("peer_epoch_20", peer(20, 0.4, 1000)), ("vae_s0", row("vae", 0.44))):
        (work / "hinge32" / place).mkdir(parents=True)
        bench.keep(each, work / "hinge32" / place)
    (work / "hinge32" / "peer").mkdir()
    (work / "hinge32" / "peer" / "run.log").write_text(LOG)
    bench.keep_peer(work / "hinge32")
    before = bench.collected(work)
    shutil.rmtree(work / "hinge32" / "peer_epoch_20")
    assert bench.collected(work) == before
    monkeypatch.setitem(bench.SETS, "hinge32", ("--particles 1", None))
    assert [each.method for each in bench.collected(work)] == ["vae"]
