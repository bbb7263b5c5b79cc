"""cryoSPARC files: both encodings, passthrough by uid, damaged files refused without a crash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from particle_files import alignment_columns, cs_columns, write_cryosparc

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.cs import CsTable, load_dataset, write_masked


@pytest.mark.parametrize("csdat", [False, True])
def test_both_encodings_read_the_same(tmp_path: Path, csdat: bool) -> None:
    columns = cs_columns()
    table = CsTable(write_cryosparc(tmp_path / "p.cs", columns, csdat))
    assert table.uid.dtype == np.uint64
    np.testing.assert_array_equal(table.uid, columns["uid"])
    for name in set(columns) - {"uid"}:
        np.testing.assert_array_equal(table.column(name), columns[name])


def test_uids_beyond_2_to_53_stay_apart(tmp_path: Path) -> None:
    columns = cs_columns(3) | {"uid": np.array([2**64 - 1, 2**64 - 2, 2**53 + 1], dtype=np.uint64)}
    table = CsTable(write_cryosparc(tmp_path / "p.cs", columns))
    assert [int(uid) for uid in table.uid] == [2**64 - 1, 2**64 - 2, 2**53 + 1]


def test_passthrough_columns_are_joined_by_uid_not_by_row(tmp_path: Path) -> None:
    columns = cs_columns(5, poses=False)
    other = {"uid": columns["uid"]} | alignment_columns("alignments3D", 5)
    order = np.array([3, 0, 4, 1, 2])
    extra = {name: np.concatenate([values[order], values[:0]]) for name, values in other.items()}
    table = CsTable(
        write_cryosparc(tmp_path / "p.cs", columns), [write_cryosparc(tmp_path / "passthrough.cs", extra)]
    )
    np.testing.assert_array_equal(table.numbers("alignments3D/pose"), other["alignments3D/pose"])
    np.testing.assert_array_equal(table.integers("alignments3D/split"), other["alignments3D/split"])


def test_several_passthroughs_and_uids_of_no_interest_are_fine(tmp_path: Path) -> None:
    full = cs_columns(6)
    main = {name: values[2:5] for name, values in full.items() if name.startswith(("uid", "blob"))}
    ctf = {name: values[::-1] for name, values in full.items() if name.startswith(("uid", "ctf"))}
    poses = {name: values for name, values in full.items() if name.startswith(("uid", "alignments"))}
    paths = [write_cryosparc(tmp_path / f"{i}.cs", part) for i, part in enumerate((main, ctf, poses))]
    table = CsTable(paths[0], paths[1:])
    np.testing.assert_array_equal(table.column("ctf/df1_A"), full["ctf/df1_A"][2:5])
    np.testing.assert_array_equal(table.column("alignments3D/pose"), full["alignments3D/pose"][2:5])


def test_the_main_files_columns_win_over_the_passthroughs(tmp_path: Path) -> None:
    columns = cs_columns(2)
    stale = columns | {"ctf/df1_A": np.zeros(2, dtype=np.float32)}
    table = CsTable(
        write_cryosparc(tmp_path / "p.cs", columns), [write_cryosparc(tmp_path / "pass.cs", stale)]
    )
    np.testing.assert_array_equal(table.column("ctf/df1_A"), columns["ctf/df1_A"])


def test_a_passthrough_of_other_particles_is_refused(tmp_path: Path) -> None:
    main = write_cryosparc(tmp_path / "p.cs", cs_columns(4))
    columns = cs_columns(4)
    other = write_cryosparc(tmp_path / "pass.cs", columns | {"uid": columns["uid"] + np.uint64(3)})
    with pytest.raises(InputFormatError, match=r"pass.cs: lacks 3 of the 4 uids"):
        CsTable(main, [other])


def test_repeated_uids_are_refused_with_their_number(tmp_path: Path) -> None:
    columns = cs_columns(5) | {"uid": np.array([7, 8, 7, 9, 8], dtype=np.uint64)}
    path = write_cryosparc(tmp_path / "p.cs", columns)
    with pytest.raises(InputFormatError, match=r"2 uids stand for 4 of 5 rows, such as 7, 8"):
        CsTable(path)


@pytest.mark.parametrize("csdat", [False, True])
@pytest.mark.parametrize("cut", [1, 3, 40, 400, -20, -60])
def test_a_truncated_file_is_refused(tmp_path: Path, csdat: bool, cut: int) -> None:
    """Negative cuts keep so many bytes from the front. cryosparc-tools 5.0.3 crashes on some of these."""
    path = write_cryosparc(tmp_path / "p.cs", cs_columns(50), csdat)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputFormatError, match="truncated"):
        load_dataset(path)


def test_what_is_no_cs_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(InputFormatError, match="no such"):
        load_dataset(tmp_path / "none.cs")
    (tmp_path / "p.cs").write_text("data_\n")
    with pytest.raises(InputFormatError, match=r"not a \.cs file"):
        load_dataset(tmp_path / "p.cs")
    empty = {name: values[:0] for name, values in cs_columns(1).items()}
    with pytest.raises(InputFormatError, match="no particles"):
        load_dataset(write_cryosparc(tmp_path / "empty.cs", empty))


def test_nan_is_refused_with_column_row_and_uid(tmp_path: Path) -> None:
    columns = cs_columns(4)
    columns["alignments3D/shift"][2, 1] = np.nan
    table = CsTable(write_cryosparc(tmp_path / "p.cs", columns))
    with pytest.raises(
        InputFormatError, match=rf"alignments3D/shift .* in 1 of 4 rows: row 3 .*{columns['uid'][2]}"
    ):
        table.numbers("alignments3D/shift")


def test_a_masked_copy_keeps_all_columns_and_the_order(tmp_path: Path) -> None:
    columns = cs_columns(5)
    path = write_cryosparc(tmp_path / "p.cs", columns, csdat=True)
    keep = columns["uid"][[4, 1]]
    assert write_masked(path, keep, tmp_path / "out.cs") == 2
    assert (tmp_path / "out.cs").read_bytes().startswith(b"\x93NUMPY")
    table = CsTable(tmp_path / "out.cs")
    for name in set(columns) - {"uid"}:
        np.testing.assert_array_equal(table.column(name), columns[name][[1, 4]])
    np.testing.assert_array_equal(table.uid, columns["uid"][[1, 4]])
