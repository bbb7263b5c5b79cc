"""Subsets by cluster, range, condition, outline and id file."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import make_latent
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.io.ids import read_ids, write_ids
from cryodrgn_pipeline.landscape.analysis import AnalysisSettings, analyze_run
from cryodrgn_pipeline.landscape.expression import evaluate_condition
from cryodrgn_pipeline.landscape.select import Selection, select_particles


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_latent(tmp_path / "run")
    analyze_run(tmp_path / "run", AnalysisSettings(clusters=6, umap=False))
    return tmp_path / "run"


def table(run: Path) -> pd.DataFrame:
    latent = pd.read_parquet(run / "latent.parquet")
    return latent.merge(pd.read_parquet(run / "analysis" / "particles.parquet"), on="particle_id")


def selected(run: Path, **conditions) -> list[str]:
    return select_particles(run, Selection(**conditions))[0].tolist()


def test_select_writes_the_ids_of_a_cluster_in_source_order_and_prints_the_count(run: Path, tmp_path: Path):
    out = tmp_path / "ids.txt"
    arguments = ["select", str(run), "--cluster", "0,3", "-o", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    all_rows = table(run)
    expected = all_rows.loc[all_rows["cluster"].isin([0, 3]), "particle_id"].tolist()
    assert 0 < len(expected) < 240
    assert out.read_text().splitlines() == expected
    assert result.stdout == f"{len(expected)} of 240 particles: {out}\n"


def test_no_cluster_at_all_is_refused_instead_of_keeping_everything(run: Path, tmp_path: Path):
    arguments = ["select", str(run), "--cluster", "", "-o", str(tmp_path / "ids.txt")]
    with pytest.raises(ConfigError, match="whole numbers separated by commas expected"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_conditions_combine_by_and_and_invert_turns_the_whole_around(run: Path):
    rows = table(run)
    both = (rows["z_0"] >= -1) & (rows["z_0"] <= 2) & ~rows["junk"]
    chosen = selected(run, ranges=("z_0:-1:2",), no_junk=True)
    assert chosen == rows.loc[both, "particle_id"].tolist()
    assert selected(run, ranges=("z_0:-1:2",), no_junk=True, invert=True) == (
        rows.loc[~both, "particle_id"].tolist()
    )


@pytest.mark.parametrize(
    ("text", "column", "low", "high"),
    [("loss::1.0", "loss", -np.inf, 1.0), ("pc_1:0:", "pc_1", 0, np.inf), ("norm:1:3", "norm", 1, 3)],
)
def test_a_range_may_be_open_and_reads_any_column(run: Path, text: str, column: str, low, high):
    rows = table(run).assign(norm=lambda t: np.linalg.norm(t[["z_0", "z_1", "z_2"]].astype(float), axis=1))
    expected = rows.loc[rows[column].between(low, high), "particle_id"].tolist()
    assert 0 < len(expected) < 240
    assert selected(run, ranges=(text,)) == expected


def test_an_outline_selects_what_lies_inside_a_concave_polygon(run: Path):
    corners = [(-2, -2), (2, -2), (2, 2), (0, -1), (-2, 2)]
    text = "z_0,z_1:" + " ".join(f"{x},{y}" for x, y in corners)
    from matplotlib.path import Path as Outline

    rows = table(run)
    inside = Outline(corners).contains_points(rows[["z_0", "z_1"]].to_numpy())
    assert 0 < inside.sum() < 240
    assert selected(run, outlines=(text,)) == rows.loc[inside, "particle_id"].tolist()


def test_an_id_file_intersects_and_ids_of_other_particles_count_for_nothing(run: Path, tmp_path: Path):
    ids = table(run)["particle_id"].tolist()
    (tmp_path / "some.txt").write_text("\n".join([ids[9], ids[4], "stranger", ""]) + "\n")
    assert selected(run, id_files=(tmp_path / "some.txt",)) == [ids[4], ids[9]]


def test_uint64_ids_survive_beyond_the_precision_of_a_float(tmp_path: Path):
    latent = make_latent(tmp_path, ids="cs")
    wanted = int(latent["particle_id"][17])
    assert wanted > 2**63
    assert selected(tmp_path, conditions=(f"particle_id == {wanted}",)) == [wanted]
    write_ids(tmp_path / "one.txt", np.array([wanted], dtype=np.uint64))
    assert (tmp_path / "one.txt").read_text() == f"{wanted}\n"
    assert selected(tmp_path, id_files=(tmp_path / "one.txt",)) == [wanted]
    (tmp_path / "star.txt").write_text("000001@a.mrcs\n")
    with pytest.raises(InputFormatError, match="are no cryoSPARC uid"):
        read_ids(tmp_path / "star.txt", latent["particle_id"].to_numpy())


def test_a_selection_of_nothing_is_an_error_that_counts_what_each_condition_kept(run: Path, tmp_path: Path):
    with pytest.raises(
        InputFormatError, match=r"none of 240 particles.*loss::0 keeps 0.*z_0 < 99' keeps 240"
    ):
        selected(run, ranges=("loss::0",), conditions=("z_0 < 99",))
    assert not (tmp_path / "ids.txt").exists()


def test_an_unknown_column_lists_the_columns_there_are(run: Path):
    with pytest.raises(ConfigError, match=r"no column 'zz'; there are: particle_id, z_0.*cluster"):
        selected(run, ranges=("zz:0:1",))
    with pytest.raises(ConfigError, match=r"no column 'zz'; there are: particle_id, z_0.*cluster"):
        selected(run, conditions=("zz > 1",))


def test_an_unknown_cluster_and_a_missing_analysis_are_said(run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="no cluster 77; there are 0 to 5"):
        selected(run, clusters=(77,))
    make_latent(tmp_path / "fresh")
    with pytest.raises(ConfigError, match="run `analyze` first"):
        selected(tmp_path / "fresh", clusters=(0,))


def test_an_analysis_of_other_particles_is_refused(run: Path):
    make_latent(run, n=100)
    with pytest.raises(InputFormatError, match="240 rows that are not the 100 particles"):
        selected(run, clusters=(0,))


@pytest.mark.parametrize("text", ["z_0", "z_0:1", "z_0:a:b", "particle_id:0:1"])
def test_a_range_that_cannot_be_read_says_how_to_write_one(run: Path, text: str):
    with pytest.raises(ConfigError, match=r"COLUMN:LOW:HIGH|holds no numbers"):
        selected(run, ranges=(text,))


COLUMNS = {
    "a": np.array([1.0, 2.0, np.nan, -4.0]),
    "n": np.array([0, 1, 2, 3], dtype=np.int32),
    "flag": np.array([True, False, True, False]),
    "name": np.array(["x", "y", "x", "z"], dtype=object),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a > 0", [1, 1, 0, 0]),
        ("not a > 0", [0, 0, 1, 1]),
        ("-5 < a <= 1", [1, 0, 0, 1]),
        ("flag", [1, 0, 1, 0]),
        ("flag and n < 2 or name == 'z'", [1, 0, 0, 1]),
        ("(a > 0) & ~flag | (n == 3)", [0, 1, 0, 1]),
        ("n in (0, 3)", [1, 0, 0, 1]),
        ("name not in ['x', 'y']", [0, 0, 0, 1]),
        ("abs(a) ** 2 / 4 + n % 2 >= 2", [0, 1, 0, 1]),
        ("n ** 9 ** 9 > 1", [0, 0, 1, 1]),
        ("True", [1, 1, 1, 1]),
    ],
)
def test_a_condition_means_what_it_says(text: str, expected: list[int]):
    assert evaluate_condition(text, COLUMNS).astype(int).tolist() == expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "a.dtype",
        "a[0] > 1",
        "[x for x in (1, 2)]",
        "(lambda: True)()",
        "abs(a, 1) > 0",
        "sum(a) > 1",
        "a if flag else n",
        "f'{a}' == 'x'",
        "a > 1; n > 1",
        "(b := a) > 1",
        "a >",
        "a + 1",
        "a and flag",
        "a > 1 & n < 2",
        "name > 1",
        "-name > 1",
        "n in 3",
        "a is None",
        "not " * 5000 + "flag",
        "1" + "0" * 500 + " < a + 1" + "0" * 500,
    ],
)
def test_anything_but_a_condition_is_refused(text: str):
    with pytest.raises(ConfigError):
        evaluate_condition(text, COLUMNS)


@given(text=st.text(max_size=40))
def test_no_text_makes_a_condition_fail_in_an_unforeseen_way(text: str):
    with contextlib.suppress(ConfigError):
        assert evaluate_condition(text, COLUMNS).shape == (4,)
