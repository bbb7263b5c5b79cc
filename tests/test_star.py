"""STAR files of every shape RELION writes are read right, and damaged ones are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import starfile
from particle_files import OPTICS, loop_block, particle_columns, write_relion

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.star import read_table, scan_blocks, write_masked, write_tables


def names(path: Path) -> list[str]:
    return [block.name for block in scan_blocks(path)]


def test_our_reader_agrees_with_starfile(tmp_path: Path) -> None:
    path = write_relion(tmp_path / "p.star", particle_columns(50))
    theirs = starfile.read(path, parse_as_string=["rlnMicrographName"])["particles"]
    block = scan_blocks(path)[1]
    assert list(theirs.columns) == list(block.columns)
    table = read_table(path, block, ["rlnImageName", "rlnMicrographName"], ["rlnDefocusU", "rlnAnglePsi"])
    for name in ("rlnDefocusU", "rlnAnglePsi"):
        np.testing.assert_allclose(table.numbers(name), theirs[name].to_numpy(dtype=float), rtol=1e-15)
    for name in ("rlnImageName", "rlnMicrographName"):
        assert table.text(name).to_pylist() == theirs[name].tolist()


def test_blocks_are_found_in_either_order(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    path.write_text(loop_block("particles", particle_columns()) + loop_block("optics", OPTICS))
    blocks = scan_blocks(path)
    assert [block.name for block in blocks] == ["particles", "optics"]
    assert read_table(path, blocks[0], [], ["rlnDefocusU"]).rows == 4
    assert read_table(path, blocks[1], [], ["rlnVoltage"]).numbers("rlnVoltage").tolist() == [300]


def test_a_block_that_is_no_loop_has_one_row(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    path.write_text(
        "data_optics\n\n_rlnOpticsGroup 1\n_rlnOpticsGroupName 'two words'\n_rlnVoltage  200.0\n"
        "_rlnMtfFileName /data/o'hara/mtf.star\n_rlnA \"it's\"\n\n"
    )
    block = scan_blocks(path)[0]
    texts = ["rlnOpticsGroupName", "rlnMtfFileName", "rlnA"]
    table = read_table(path, block, texts, ["rlnOpticsGroup", "rlnVoltage"])
    read = [table.text(name).to_pylist() for name in texts]
    assert read == [["two words"], ["/data/o'hara/mtf.star"], ["it's"]]
    assert table.numbers("rlnVoltage").tolist() == [200]
    assert table.integers("rlnOpticsGroup").tolist() == [1]


def test_tabs_carriage_returns_and_a_missing_last_newline_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    path.write_bytes(b"data_\r\n\r\nloop_\r\n_rlnA #1\r\n_rlnB\r\n1\tx\r\n  2 \t y")
    block = scan_blocks(path)[0]
    table = read_table(path, block, ["rlnB"], ["rlnA"])
    assert table.numbers("rlnA").tolist() == [1, 2]
    assert table.text("rlnB").to_pylist() == ["x", "y"]


def test_a_path_that_starts_with_data_is_not_a_block(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    path.write_text("data_images\nloop_\n_rlnA #1\n_rlnB #2\ndata_set/x.mrc 1\ndata_set/y.mrc 2\n")
    assert names(path) == ["images"]
    assert read_table(path, scan_blocks(path)[0], ["rlnA"], []).rows == 2


def test_digits_with_leading_zeros_stay_text(tmp_path: Path) -> None:
    path = write_relion(tmp_path / "p.star")
    table = read_table(path, scan_blocks(path)[1], ["rlnMicrographName"], [])
    assert table.text("rlnMicrographName").to_pylist()[0] == "00007"


def test_quoted_texts_may_hold_blanks(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    path.write_text('data_\nloop_\n_rlnA #1\n_rlnB #2\n"my mic.mrc" 1\n"" 2\n')
    table = read_table(path, scan_blocks(path)[0], ["rlnA"], ["rlnB"])
    assert table.text("rlnA").to_pylist() == ["my mic.mrc", ""]
    assert table.numbers("rlnB").tolist() == [1, 2]


@pytest.mark.parametrize("word", ["nan", "NaN", "inf", "-inf", "abc", "<NA>"])
def test_a_value_that_is_no_finite_number_is_named_with_its_rows(tmp_path: Path, word: str) -> None:
    columns = particle_columns() | {"rlnDefocusU": [15000.5, word, 15000.5, word]}
    path = write_relion(tmp_path / "p.star", columns)
    table = read_table(path, scan_blocks(path)[1], [], ["rlnDefocusU"])
    with pytest.raises(InputFormatError, match=r"rlnDefocusU .* in 2 of 4 rows: row 2 .*, row 4"):
        table.numbers("rlnDefocusU")


def test_fractions_are_not_taken_for_counts(tmp_path: Path) -> None:
    path = write_relion(tmp_path / "p.star", particle_columns() | {"rlnClassNumber": [1, 1, 1.5, 1]})
    table = read_table(path, scan_blocks(path)[1], [], ["rlnClassNumber"])
    with pytest.raises(InputFormatError, match=r"whole numbers, but 1 of 4 rows do not, first row 3"):
        table.integers("rlnClassNumber")


@pytest.mark.parametrize(
    ("row", "found"), [("1 2\n", "2 values"), ("1 2 3 4\n", "4 values"), ("1", "1 values")]
)
def test_rows_that_are_too_short_or_too_long_are_refused(tmp_path: Path, row: str, found: str) -> None:
    path = tmp_path / "p.star"
    path.write_text(f"data_\nloop_\n_rlnA #1\n_rlnB #2\n_rlnC #3\n1 2 3\n4 5 6\n{row}")
    with pytest.raises(InputFormatError, match=f"1 of the 3 rows .* first row 3 with {found}"):
        read_table(path, scan_blocks(path)[0], [], ["rlnA", "rlnB"])


def test_a_file_cut_in_the_middle_of_a_row_is_refused(tmp_path: Path) -> None:
    path = write_relion(tmp_path / "p.star")
    path.write_bytes(path.read_bytes().rstrip()[:-20])
    with pytest.raises(InputFormatError, match="truncated"):
        read_table(path, scan_blocks(path)[1], [], ["rlnDefocusU"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello\n", "not a STAR file"),
        (b"\x00\x01\x02" * 100, "not a STAR file"),
        (b"data_\nloop_\n_rlnA\n_rlnA\n1 2\n", "more than once"),
        (b"data_\n_rlnA\n", "has no value"),
    ],
)
def test_what_is_no_star_file_is_said_so(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.star"
    path.write_bytes(content)
    with pytest.raises(InputFormatError, match=message):
        scan_blocks(path)


def test_a_missing_file_and_an_empty_loop_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(InputFormatError, match="no such STAR file"):
        scan_blocks(tmp_path / "none.star")
    path = tmp_path / "p.star"
    path.write_text("data_\nloop_\n_rlnA #1\n\n")
    with pytest.raises(InputFormatError, match="no rows"):
        read_table(path, scan_blocks(path)[0], [], ["rlnA"])


def test_a_masked_copy_differs_by_whole_lines_only(tmp_path: Path) -> None:
    path = write_relion(tmp_path / "p.star", particle_columns(6))
    mask = np.array([True, False, True, True, False, False])
    write_masked(path, {"particles": mask}, tmp_path / "out.star")
    before, after = (p.read_bytes().splitlines(True) for p in (path, tmp_path / "out.star"))
    rows = [line for line in before if b"@" in line]
    dropped = [line for line, kept in zip(rows, mask, strict=True) if not kept]
    assert after == [line for line in before if line not in dropped]


def test_written_numbers_keep_their_digits(tmp_path: Path) -> None:
    values = np.array([13108.0824181234, 1e-7, -180.0])
    write_tables({"particles": {"rlnDefocusU": values, "rlnName": ["00007", "a", "b"]}}, tmp_path / "o.star")
    block = scan_blocks(tmp_path / "o.star")[0]
    table = read_table(tmp_path / "o.star", block, ["rlnName"], ["rlnDefocusU"])
    np.testing.assert_allclose(table.numbers("rlnDefocusU"), values, rtol=1e-11)
    assert table.text("rlnName").to_pylist() == ["00007", "a", "b"]


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rlnDefocusU"):
        write_tables({"particles": {"rlnDefocusU": np.array([1.0, np.nan])}}, tmp_path / "o.star")
    assert not (tmp_path / "o.star").exists()
