"""Exports are the user's own tables with fewer rows; particle sets survive the other package's format."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import starfile
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from particle_files import (
    OPTICS,
    alignment_columns,
    cs_columns,
    loop_block,
    particle_columns,
    write_cryosparc,
    write_relion,
    write_stack,
)
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.conventions import rotation_from_relion
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.exporting import export_particles, write_cs, write_star
from cryodrgn_pipeline.importing import ImportOptions, import_particles
from cryodrgn_pipeline.io.cs import CsTable, load_dataset
from cryodrgn_pipeline.io.runs import write_columns
from cryodrgn_pipeline.particles import Ctf, ImageRef, Optics, ParticleSet, Poses

METADATA_ONLY = ImportOptions(metadata_only=True)


def subset_file(folder: Path, ids: list[Any]) -> Path:
    path = folder / "ids.txt"
    path.write_text("".join(f"{name}\n" for name in ids))
    return path


def test_a_star_subset_is_the_original_text_with_rows_left_out(tmp_path: Path) -> None:
    optics = {name: values * 3 for name, values in OPTICS.items()} | {"rlnOpticsGroup": [1, 2, 3]}
    columns = particle_columns(6) | {"rlnOpticsGroup": [1, 2, 3, 1, 2, 3]}
    columns["rlnLogLikeliContribution"] = ["2.586789e+05", "nan", "1e-30", "0.10", "-0.000000", "7"]
    source = write_relion(tmp_path / "p.star", columns, optics)
    import_particles(source, tmp_path / "import", METADATA_ONLY)
    ids = subset_file(tmp_path, [columns["rlnImageName"][i] for i in (5, 0, 3)])
    exported = export_particles(tmp_path / "import", tmp_path / "out.star", ids)
    assert (exported.files, exported.particles) == ((tmp_path / "out.star",), 3)
    before, after = (path.read_text().splitlines(True) for path in (source, tmp_path / "out.star"))
    start = before.index("data_particles\n")
    rows = [line for line in before[start:] if "@" in line]
    group_2 = [line for line in before[:start] if line.split()[:1] == ["2"]]
    assert len(group_2) == 1
    gone = {*group_2, *(rows[i] for i in (1, 2, 4))}
    gone.discard(rows[5])
    assert after == [line for line in before if line not in gone]
    again = import_particles(tmp_path / "out.star", tmp_path / "again", METADATA_ONLY)
    np.testing.assert_array_equal(again.optics.optics_group, [1, 1, 3])


def test_an_export_of_everything_is_the_same_file(shared_data: Path, tmp_path: Path) -> None:
    for name in ("relion31.star", "empiar_10076_7.star"):
        import_particles(shared_data / name, tmp_path / name, METADATA_ONLY)
        export_particles(tmp_path / name, tmp_path / f"out_{name}")
        assert (tmp_path / f"out_{name}").read_bytes() == (shared_data / name).read_bytes()
    source = shared_data / "cryosparc_p12_j24_first100.cs"
    import_particles(source, tmp_path / "cs", METADATA_ONLY)
    export_particles(tmp_path / "cs", tmp_path / "out.cs")
    assert load_dataset(tmp_path / "out.cs") == load_dataset(source)


def test_repeats_of_an_image_are_exported_one_by_one(tmp_path: Path) -> None:
    columns = particle_columns(3) | {"rlnImageName": ["1@a.mrcs", "1@a.mrcs", "1@a.mrcs"]}
    source = write_relion(tmp_path / "p.star", columns)
    import_particles(source, tmp_path / "import", METADATA_ONLY)
    ids = subset_file(tmp_path, ["\ufeff1@a.mrcs#2"])  # with a spreadsheet's byte order mark
    assert export_particles(tmp_path / "import", tmp_path / "out.star", ids).particles == 1
    again = import_particles(tmp_path / "out.star", tmp_path / "again", METADATA_ONLY)
    assert again.ctf.defocus_u_a.tolist() == [columns["rlnDefocusU"][1]]


@pytest.mark.parametrize("csdat", [False, True])
def test_a_cs_subset_keeps_all_columns_and_cuts_the_passthrough_too(tmp_path: Path, csdat: bool) -> None:
    columns = cs_columns(6, poses=False)
    other = {"uid": columns["uid"][::-1].copy()} | alignment_columns("alignments3D", 6)
    source = write_cryosparc(tmp_path / "p.cs", columns, csdat)
    passthrough = write_cryosparc(tmp_path / "pass.cs", other, csdat)
    options = ImportOptions(metadata_only=True, passthrough=(passthrough,))
    whole = import_particles(source, tmp_path / "import", options)
    ids = subset_file(tmp_path, [columns["uid"][i] for i in (4, 1, 1)])
    exported = export_particles(tmp_path / "import", tmp_path / "out.cs", ids)
    expected = ("out.cs", "out_passthrough_particles.cs", "out.csg")
    assert [path.name for path in exported.files] == list(expected)
    main, rest = (CsTable(path) for path in exported.files[:2])
    np.testing.assert_array_equal(main.uid, columns["uid"][[1, 4]])
    np.testing.assert_array_equal(rest.uid, columns["uid"][[4, 1]])
    assert set(main.fields) == set(columns) - {"uid"}
    assert set(rest.fields) == set(other) - {"uid"}
    options = ImportOptions(metadata_only=True, passthrough=(exported.files[1],))
    again = import_particles(exported.files[0], tmp_path / "again", options)
    rows = np.array([1, 4])
    np.testing.assert_array_equal(again.require_poses("").rotation, whole.require_poses("").rotation[rows])


def test_the_group_file_says_which_file_has_which_slot_and_how_many_particles(tmp_path: Path) -> None:
    columns = cs_columns(6, poses=False) | alignment_columns("alignments_class_2", 6)
    other = {"uid": columns["uid"][::-1].copy()} | alignment_columns("alignments3D", 6)
    other |= {"components_mode_0/value": np.zeros(6, np.float32)}
    source = write_cryosparc(tmp_path / "p.cs", columns)
    passthrough = write_cryosparc(tmp_path / "pass.cs", other)
    options = ImportOptions(metadata_only=True, passthrough=(passthrough,))
    import_particles(source, tmp_path / "import", options)
    ids = subset_file(tmp_path, [columns["uid"][i] for i in (4, 1)])
    export_particles(tmp_path / "import", tmp_path / "out.cs", ids)
    group = yaml.safe_load((tmp_path / "out.csg").read_text())
    assert (group["group"]["type"], group["group"]["name"]) == ("particle", "particles")
    main, rest = (f">out{part}.cs" for part in ("", "_passthrough_particles"))
    assert {name: (slot["metafile"], slot["type"]) for name, slot in group["results"].items()} == {
        "blob": (main, "particle.blob"),
        "ctf": (main, "particle.ctf"),
        "alignments_class_2": (main, "particle.alignments3D"),
        "alignments3D": (rest, "particle.alignments3D"),
        "components_mode_0": (rest, "particle.components"),
    }
    assert {slot["num_items"] for slot in group["results"].values()} == {2}


def test_a_star_file_becomes_a_cs_file_with_its_group_file(tmp_path: Path) -> None:
    import_particles(write_relion(tmp_path / "p.star"), tmp_path / "import", METADATA_ONLY)
    exported = export_particles(tmp_path / "import", tmp_path / "out.cs")
    assert [path.name for path in exported.files] == ["out.cs", "out.csg"]
    slots = yaml.safe_load((tmp_path / "out.csg").read_text())["results"]
    assert set(slots) == {"alignments3D", "blob", "ctf", "location"}


def test_a_group_file_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    import_particles(write_cryosparc(tmp_path / "p.cs"), tmp_path / "import", METADATA_ONLY)
    (tmp_path / "out.csg").write_text("created: by cryoSPARC")
    with pytest.raises(ConfigError, match=r"out\.csg would be replaced"):
        export_particles(tmp_path / "import", tmp_path / "out.cs")
    assert (tmp_path / "out.csg").read_text() == "created: by cryoSPARC"
    assert not (tmp_path / "out.cs").exists()
    export_particles(tmp_path / "import", tmp_path / "mine.cs")
    export_particles(tmp_path / "import", tmp_path / "mine.cs")  # our own is


def test_a_write_that_fails_leaves_the_older_export_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("p.star", "p.cs"):
        source = tmp_path / name
        (write_relion if source.suffix == ".star" else write_cryosparc)(source)
        import_particles(source, tmp_path / "import", METADATA_ONLY)
        output = tmp_path / f"out{source.suffix}"
        export_particles(tmp_path / "import", output)
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        with monkeypatch.context() as patch:

            def full_disk(descriptor: int) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr("os.fsync", full_disk)
            with pytest.raises(OSError, match="No space left"):
                export_particles(tmp_path / "import", output)
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_six_optics_groups_are_read_by_starfile_and_imported_again_alike(tmp_path: Path) -> None:
    sizes = [1.24, 1.25, 1.24, 1.25, 1.24, 1.25]
    optics = {name: values * 6 for name, values in OPTICS.items()} | {
        "rlnOpticsGroup": [3, 1, 2, 6, 5, 4],
        "rlnOpticsGroupName": [f"session_{group}" for group in (3, 1, 2, 6, 5, 4)],
        "rlnImagePixelSize": sizes,
        "rlnVoltage": [300.0, 200.0, 300.0, 300.0, 300.0, 200.0],
    }
    columns = particle_columns(24) | {"rlnOpticsGroup": [row % 6 + 1 for row in range(24)]}
    columns["rlnMicrographName"] = [f"{row:05d}" for row in range(24)]
    source = write_relion(tmp_path / "p.star", columns, optics)
    whole = import_particles(source, tmp_path / "import", METADATA_ONLY)
    rows = np.array([row for row in range(24) if columns["rlnOpticsGroup"][row] in (2, 5, 6)][1:-1])
    ids = subset_file(tmp_path, [whole.particle_id[row] for row in rows[::-1]])
    export_particles(tmp_path / "import", tmp_path / "out.star", ids)
    tables = starfile.read(tmp_path / "out.star")
    assert tables["optics"]["rlnOpticsGroup"].tolist() == [2, 6, 5]
    assert tables["optics"]["rlnOpticsGroupName"].tolist() == ["session_2", "session_6", "session_5"]
    assert list(tables["particles"].columns) == list(columns)
    assert tables["particles"]["rlnImageName"].tolist() == [columns["rlnImageName"][row] for row in rows]
    again = import_particles(tmp_path / "out.star", tmp_path / "again", METADATA_ONLY)
    expected = whole.take(rows)
    assert_same_particles(again, expected, 0)
    np.testing.assert_array_equal(again.particle_id, expected.particle_id)
    np.testing.assert_array_equal(again.optics.optics_group, expected.optics.optics_group)
    assert set(again.micrograph) == {f"{row:05d}" for row in rows}


def test_a_chosen_class_exports_its_own_particles_only(tmp_path: Path) -> None:
    columns = particle_columns() | {"rlnClassNumber": [1, 2, 2, 1]}
    source = write_relion(tmp_path / "p.star", columns)
    import_particles(source, tmp_path / "import", ImportOptions(metadata_only=True, class_number=2))
    assert export_particles(tmp_path / "import", tmp_path / "out.star").particles == 2
    again = import_particles(tmp_path / "out.star", tmp_path / "again", METADATA_ONLY)
    assert again.particle_id.tolist() == columns["rlnImageName"][1:3]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["000001@stack.mrcs", "x@y", "9@z"],
            r"2 of 3 ids are not among the 4 particles of the import .*, such as x@y",
        ),
        ([], "names no particle"),
    ],
)
def test_a_subset_that_does_not_fit_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    import_particles(write_relion(tmp_path / "p.star"), tmp_path / "import", METADATA_ONLY)
    with pytest.raises(InputFormatError, match=message):
        export_particles(tmp_path / "import", tmp_path / "out.star", subset_file(tmp_path, lines))
    assert not (tmp_path / "out.star").exists()


def test_lines_that_are_no_uid_are_refused(tmp_path: Path) -> None:
    import_particles(write_cryosparc(tmp_path / "p.cs"), tmp_path / "import", METADATA_ONLY)
    lines = [2**63, "abc", 2**64, "0x10", "+5", "\u0663"]  # the last is a digit of another script
    with pytest.raises(InputFormatError, match=r"5 of 6 lines are no cryoSPARC uid, such as 'abc'"):
        export_particles(tmp_path / "import", tmp_path / "out.cs", subset_file(tmp_path, lines))
    with pytest.raises(InputFormatError, match=r"1 of 1 lines are no cryoSPARC uid"):
        export_particles(tmp_path / "import", tmp_path / "out.cs", subset_file(tmp_path, [2**64]))


def test_an_id_file_may_repeat_ids_and_hold_blank_lines_but_must_be_text(tmp_path: Path) -> None:
    whole = import_particles(write_relion(tmp_path / "p.star"), tmp_path / "import", METADATA_ONLY)
    second = whole.particle_id[1]
    ids = tmp_path / "ids.txt"
    ids.write_bytes(f"\r\n  {second} \r\n\t\r\n{second}\r\n".encode())
    assert export_particles(tmp_path / "import", tmp_path / "out.star", ids).particles == 1
    for content in (b"\xff\xfe\x00", b" \n\t\n"):
        ids.write_bytes(content)
        with pytest.raises(InputFormatError, match=r"not a text file|names no particle"):
            export_particles(tmp_path / "import", tmp_path / "out.star", ids)


def test_a_missing_subset_file_and_another_suffix_are_refused(tmp_path: Path) -> None:
    import_particles(write_relion(tmp_path / "p.star"), tmp_path / "import", METADATA_ONLY)
    with pytest.raises(InputFormatError, match="no such id file"):
        export_particles(tmp_path / "import", tmp_path / "out.star", tmp_path / "none.txt")
    with pytest.raises(ConfigError, match=r"\.star \(RELION\) or \.cs"):
        export_particles(tmp_path / "import", tmp_path / "out.csv")


def test_the_source_is_never_overwritten_nor_trusted_after_a_change(tmp_path: Path) -> None:
    source = write_relion(tmp_path / "p.star")
    import_particles(source, tmp_path / "import", METADATA_ONLY)
    with pytest.raises(ConfigError, match="imported from"):
        export_particles(tmp_path / "import", source)
    write_relion(source, particle_columns(5))
    with pytest.raises(InputFormatError, match="has changed since"):
        export_particles(tmp_path / "import", tmp_path / "out.star")
    source.unlink()
    with pytest.raises(InputFormatError, match="is gone"):
        export_particles(tmp_path / "import", tmp_path / "out.star")


def test_a_passthrough_of_the_source_is_not_overwritten_either(tmp_path: Path) -> None:
    columns = cs_columns(4, poses=False)
    other = {"uid": columns["uid"]} | alignment_columns("alignments3D", 4)
    source = write_cryosparc(tmp_path / "J7_particles.cs", columns)
    passthrough = write_cryosparc(tmp_path / "J7_passthrough_particles.cs", other)
    before = passthrough.read_bytes()
    options = ImportOptions(metadata_only=True, passthrough=(passthrough,))
    import_particles(source, tmp_path / "import", options)
    ids = subset_file(tmp_path, [columns["uid"][0]])
    with pytest.raises(ConfigError, match=r"J7_passthrough_particles\.cs is a file .* imported from"):
        export_particles(tmp_path / "import", tmp_path / "J7.cs", ids)
    assert passthrough.read_bytes() == before
    assert not (tmp_path / "J7.cs").exists()


def test_the_verb_chooses_by_what_a_run_found(tmp_path: Path) -> None:
    whole = import_particles(write_relion(tmp_path / "p.star"), tmp_path / "import", METADATA_ONLY)
    z = {f"z_{j}": np.arange(4, dtype=np.float32) * (1 - 2 * j) for j in range(2)}
    write_columns(tmp_path / "run" / "latent.parquet", {"particle_id": whole.particle_id} | z)
    found = {"cluster": np.array([0, 1, 1, 2]), "junk": np.array([False, False, True, False])}
    analysis = {"particle_id": whole.particle_id} | found
    write_columns(tmp_path / "run" / "analysis" / "particles.parquet", analysis)
    few = subset_file(tmp_path, whole.particle_id[[0, 1, 2]].tolist())

    def exported(*words: object) -> list[str]:
        out = tmp_path / "out.star"
        done = CliRunner().invoke(
            app, [*map(str, ("export", tmp_path / "import", "-o", out, *words))], catch_exceptions=False
        )
        assert (done.exit_code, done.stdout) == (0, f"{out}\n")
        names: list[str] = starfile.read(out)["particles"]["rlnImageName"].tolist()
        return names

    run = ("--run", tmp_path / "run")
    assert exported(*run, "--cluster", "1,2") == whole.particle_id[[1, 2, 3]].tolist()
    assert exported(*run, "--cluster", "1", "--no-junk") == whole.particle_id[[1]].tolist()
    assert exported(*run, "--where", "z_1 < 0", "--subset", few) == whole.particle_id[[1, 2]].tolist()
    assert exported(*run, "--range", "z_0:1:2", "--invert") == whole.particle_id[[0, 3]].tolist()
    before = (tmp_path / "out.star").read_bytes()
    with pytest.raises(ConfigError, match="need --run RUN"):
        exported("--cluster", "1")
    with pytest.raises(InputFormatError, match="none of 4 particles selected"):
        exported(*run, "--where", "z_0 > 9")
    assert (tmp_path / "out.star").read_bytes() == before


# ── To the other package and back ──


def assert_same_particles(one: ParticleSet, other: ParticleSet, rtol: float) -> None:
    """Same images, rotations, shifts and CTFs; `rtol` is for the one format's float32."""
    assert [one.images.stack_paths[i] for i in one.images.stack] == [
        other.images.stack_paths[i] for i in other.images.stack
    ]
    np.testing.assert_array_equal(one.images.index, other.images.index)
    for name in ("pixel_size_a", "voltage_kv", "cs_mm", "amplitude_contrast"):
        np.testing.assert_allclose(
            getattr(one.optics, name), getattr(other.optics, name), rtol=rtol, atol=1e-30, err_msg=name
        )
    np.testing.assert_array_equal(one.optics.box_size_px, other.optics.box_size_px)
    for name in Ctf.__slots__:
        np.testing.assert_allclose(
            getattr(one.ctf, name), getattr(other.ctf, name), rtol=rtol, atol=rtol, err_msg=name
        )
    assert (one.poses is None) == (other.poses is None)
    if one.poses is not None and other.poses is not None:
        np.testing.assert_allclose(one.poses.rotation, other.poses.rotation, atol=5 * rtol)
        np.testing.assert_allclose(one.poses.shift_a, other.poses.shift_a, rtol=3 * rtol, atol=rtol)
    for left, right in ((one.half_set, other.half_set), (one.micrograph, other.micrograph)):
        np.testing.assert_array_equal(left, right)


def numbers(low: float, high: float, n: int) -> Any:
    return hnp.arrays(np.float64, n, elements=st.floats(low, high, allow_subnormal=False))


@st.composite
def particle_sets(draw: st.DrawFn) -> ParticleSet:
    """Any particle set a refinement could hand over."""
    n = draw(st.integers(1, 5))
    angle = st.one_of(st.floats(-180, 180), st.sampled_from([0.0, 90.0, -90.0, 180.0, -180.0]))
    angles = draw(hnp.arrays(np.float64, (3, n), elements=angle))
    shift = np.stack([draw(numbers(-50, 50, n)), draw(numbers(-50, 50, n))], axis=1)
    groups = draw(hnp.arrays(np.int64, n, elements=st.integers(1, 3)))
    posed = draw(st.booleans())
    return ParticleSet(
        particle_id=np.array([f"{i}@x" for i in range(n)], dtype=object),
        images=ImageRef(
            stack_paths=("a/s.mrcs", "b.mrcs"),
            stack=draw(hnp.arrays(np.int64, n, elements=st.integers(0, 1))),
            index=draw(hnp.arrays(np.int64, n, elements=st.integers(0, 10**7), unique=True)),
        ),
        optics=Optics(
            optics_group=groups,
            pixel_size_a=draw(numbers(0.3, 8, 4))[groups],
            box_size_px=np.array([0, 64, 128, 256])[groups],
            voltage_kv=np.array([0.0, 300, 200, 300])[groups],
            cs_mm=draw(numbers(0, 3, 4))[groups],
            amplitude_contrast=draw(numbers(0, 1, 4))[groups],
        ),
        ctf=Ctf(
            defocus_u_a=draw(numbers(-3000, 60000, n)),
            defocus_v_a=draw(numbers(-3000, 60000, n)),
            defocus_angle_deg=draw(numbers(-180, 180, n)),
            phase_shift_deg=draw(numbers(0, 180, n)),
        ),
        poses=Poses(rotation=rotation_from_relion(*angles), shift_a=shift) if posed else None,
        contrast_sign=np.ones(n),
        half_set=draw(hnp.arrays(np.int64, n, elements=st.integers(1, 2))) if posed else None,
        class_number=draw(hnp.arrays(np.int64, n, elements=st.integers(0, 3))) if posed else None,
        micrograph=np.array([f"{i:05d}" for i in range(n)], dtype=object) if draw(st.booleans()) else None,
    )


@settings(deadline=None, max_examples=25)
@given(particle_sets())
def test_star_to_cs_to_star_is_the_identity(particles: ParticleSet) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_star(particles, folder / "one.star")
        first = import_particles(folder / "one.star", folder / "1", METADATA_ONLY)
        export_particles(folder / "1", folder / "two.cs")
        second = import_particles(folder / "two.cs", folder / "2", METADATA_ONLY)
        export_particles(folder / "2", folder / "three.star")
        third = import_particles(folder / "three.star", folder / "3", METADATA_ONLY)
    assert_same_particles(particles, first, 1e-10)
    assert_same_particles(first, second, 2e-7)
    assert_same_particles(first, third, 2e-7)
    assert third.particle_id.tolist() == first.particle_id.tolist()
    np.testing.assert_array_equal(second.class_number, particles.class_number)
    np.testing.assert_array_equal(third.class_number, first.class_number)
    if particles.class_number is not None:
        np.testing.assert_array_equal(first.class_number, particles.class_number + 1)  # RELION's first is 1


@pytest.mark.parametrize("name", ["relion30_pfcrt.star", "relion31.star", "empiar_10076_7.star"])
def test_real_refinements_survive_cryosparc_and_back(shared_data: Path, tmp_path: Path, name: str) -> None:
    extra = () if name != "relion30_pfcrt.star" else ("amplitude_contrast=0.1",)
    options = ImportOptions(metadata_only=True, assignments=extra)
    first = import_particles(shared_data / name, tmp_path / "1", options)
    export_particles(tmp_path / "1", tmp_path / "two.cs")
    import_particles(tmp_path / "two.cs", tmp_path / "2", METADATA_ONLY)
    export_particles(tmp_path / "2", tmp_path / "three.star")
    assert_same_particles(
        first, import_particles(tmp_path / "three.star", tmp_path / "3", METADATA_ONLY), 2e-7
    )


def test_a_real_cryosparc_refinement_survives_relion(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "cryosparc_p12_j24_first100.cs"
    first = import_particles(source, tmp_path / "1", METADATA_ONLY)
    export_particles(tmp_path / "1", tmp_path / "two.star")
    second = import_particles(tmp_path / "two.star", tmp_path / "2", METADATA_ONLY)
    assert_same_particles(first, second, 1e-9)


def test_images_are_named_as_in_the_source_not_where_they_were_found(
    shared_data: Path, tmp_path: Path
) -> None:
    import_particles(shared_data / "relion31.star", tmp_path / "1")
    export_particles(tmp_path / "1", tmp_path / "two.cs")
    assert set(CsTable(tmp_path / "two.cs").column("blob/path")) == {"relion31.mrcs"}


def test_relions_mark_of_a_stack_stays_out_of_paths(tmp_path: Path) -> None:
    stack = write_stack(tmp_path / "s.mrc")
    source = write_relion(tmp_path / "p.star", particle_columns(stack="s.mrc:mrcs"))
    for options, path in ((ImportOptions(), str(stack)), (METADATA_ONLY, "s.mrc")):
        assert import_particles(source, tmp_path / "1", options).images.stack_paths == (path,)
        export_particles(tmp_path / "1", tmp_path / "two.cs")
        assert set(CsTable(tmp_path / "two.cs").column("blob/path")) == {"s.mrc"}


def test_remedies_and_overrides_reach_the_other_packages_file(tmp_path: Path) -> None:
    source = write_relion(tmp_path / "p.star")
    options = ImportOptions(metadata_only=True, assignments=("voltage_kv=200",))
    first = import_particles(source, tmp_path / "1", options)
    export_particles(tmp_path / "1", tmp_path / "two.cs")
    second = import_particles(tmp_path / "two.cs", tmp_path / "2", METADATA_ONLY)
    assert_same_particles(first, second, 2e-7)
    np.testing.assert_array_equal(second.optics.voltage_kv, 200)


def test_dark_particles_are_said_when_written_for_relion(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("cryodrgn_pipeline"), "propagate", True)
    import_particles(write_cryosparc(tmp_path / "p.cs"), tmp_path / "1", METADATA_ONLY)
    export_particles(tmp_path / "1", tmp_path / "two.star")
    assert "4 of 4 particles are dark on light" in caplog.text


def test_uids_made_from_star_ids_are_the_same_every_time_and_differ(tmp_path: Path) -> None:
    particles = import_particles(write_relion(tmp_path / "p.star"), tmp_path / "1", METADATA_ONLY)
    write_cs(particles, tmp_path / "a.cs")
    write_cs(particles.take(np.array([2, 0])), tmp_path / "b.cs")
    a, b = (CsTable(tmp_path / name).uid for name in ("a.cs", "b.cs"))
    assert len(set(a.tolist())) == 4
    np.testing.assert_array_equal(b, a[[2, 0]])


def test_poses_of_a_subset_stay_with_their_particles(tmp_path: Path) -> None:
    whole = import_particles(write_relion(tmp_path / "p.star"), tmp_path / "1", METADATA_ONLY)
    ids = subset_file(tmp_path, [whole.particle_id[3], whole.particle_id[1]])
    export_particles(tmp_path / "1", tmp_path / "two.cs", ids)
    part = import_particles(tmp_path / "two.cs", tmp_path / "2", METADATA_ONLY)
    expected = whole.take(np.array([1, 3]))
    assert_same_particles(replace(expected, contrast_sign=part.contrast_sign), part, 2e-7)


# ── Whatever the tables hold ──

WORDS = st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126), min_size=1, max_size=9)
CELLS = WORDS.filter(lambda word: word[0] not in "#_\"'" and not word.startswith(("data_", "loop_")))


@st.composite
def star_subsets(draw: st.DrawFn) -> tuple[dict[str, list[Any]], dict[str, list[Any]], list[int], bool]:
    """A RELION file with any further columns and any optics groups, rows to keep, and the order of blocks."""
    n = draw(st.integers(1, 8))
    groups = draw(st.lists(st.integers(1, 99), min_size=1, max_size=6, unique=True))
    optics = {name: values * len(groups) for name, values in OPTICS.items()} | {"rlnOpticsGroup": groups}
    extra = draw(st.lists(st.from_regex("rln[A-Z][a-z]{2,8}Own", fullmatch=True), max_size=4, unique=True))
    optics |= {
        f"{name}Optics": draw(st.lists(CELLS, min_size=len(groups), max_size=len(groups))) for name in extra
    }
    columns = particle_columns(n) | {
        "rlnOpticsGroup": draw(st.lists(st.sampled_from(groups), min_size=n, max_size=n))
    }
    columns["rlnMicrographName"] = draw(
        st.lists(st.from_regex("0{0,3}[0-9]{1,4}", fullmatch=True), min_size=n, max_size=n)
    )
    columns |= {name: draw(st.lists(CELLS, min_size=n, max_size=n)) for name in extra}
    names = draw(st.permutations(list(columns)))
    keep = draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))
    return {name: columns[name] for name in names}, optics, keep, draw(st.booleans())


@settings(deadline=None, max_examples=40)
@given(star_subsets())
def test_a_star_subset_keeps_rows_columns_values_and_groups(
    made: tuple[dict[str, list[Any]], dict[str, list[Any]], list[int], bool],
) -> None:
    columns, optics, keep, optics_last = made
    blocks = [loop_block("optics", optics), loop_block("particles", columns)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "p.star"
        source.write_text("".join(reversed(blocks) if optics_last else blocks))
        whole = import_particles(source, folder / "import", METADATA_ONLY)
        export_particles(folder / "import", folder / "out.star", whole.particle_id[keep])
        rows = sorted(keep)
        used = {columns["rlnOpticsGroup"][row] for row in rows}
        kept = [
            loop_block(
                "optics", _rows(optics, [i for i, g in enumerate(optics["rlnOpticsGroup"]) if g in used])
            )
        ]
        kept.append(loop_block("particles", _rows(columns, rows)))
        assert (folder / "out.star").read_text() == "".join(reversed(kept) if optics_last else kept)
        again = import_particles(folder / "out.star", folder / "again", METADATA_ONLY)
    expected = whole.take(np.array(rows))
    assert_same_particles(again, expected, 0)
    np.testing.assert_array_equal(again.particle_id, expected.particle_id)
    np.testing.assert_array_equal(again.optics.optics_group, expected.optics.optics_group)


def _rows(columns: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
    return {name: [values[row] for row in rows] for name, values in columns.items()}


COLUMN_TYPES = st.sampled_from(["f4", "f8", "u1", "u4", "u8", "i4", "i8", "2f4", "3f8", "2u4"])
UIDS = st.one_of(st.integers(0, 2**64 - 1), st.integers(2**53, 2**53 + 9), st.integers(2**64 - 9, 2**64 - 1))


@st.composite
def cs_subsets(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], list[int], bool]:
    """A .cs file and a passthrough in another order, with columns of any type, and rows to keep."""
    uids = np.array(draw(st.lists(UIDS, min_size=1, max_size=8, unique=True)), dtype=np.uint64)
    n = len(uids)
    main = cs_columns(n) | {"uid": uids}
    order = np.array(draw(st.permutations(range(n))))
    rest: dict[str, Any] = {"uid": uids[order]}
    for table in (main, rest):
        for number, kind in enumerate(draw(st.lists(COLUMN_TYPES, max_size=4))):
            table[f"own/{len(table)}_{number}"] = draw(
                hnp.arrays(np.dtype(kind).base, (n, *np.dtype(kind).shape))
            )
        texts = draw(
            st.lists(
                st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=9),
                min_size=n,
                max_size=n,
            )
        )
        table[f"own/text{len(table)}"] = np.array(texts, dtype=object)
    keep = draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))
    return main, rest, keep, draw(st.booleans())


@settings(deadline=None, max_examples=40)
@given(cs_subsets())
def test_a_cs_subset_keeps_rows_columns_values_and_uids(
    made: tuple[dict[str, Any], dict[str, Any], list[int], bool],
) -> None:
    main, rest, keep, csdat = made
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_cryosparc(folder / "p.cs", main, csdat)
        passthrough = write_cryosparc(folder / "pass.cs", rest, csdat)
        options = ImportOptions(metadata_only=True, passthrough=(passthrough,))
        whole = import_particles(source, folder / "import", options)
        np.testing.assert_array_equal(whole.particle_id, main["uid"])
        ids = subset_file(folder, [whole.particle_id[row] for row in keep])
        exported = export_particles(folder / "import", folder / "out.cs", ids)
        for table, file in zip((main, rest), exported.files[:2], strict=True):
            rows = np.isin(table["uid"], main["uid"][keep])
            cut = load_dataset(file)
            assert set(cut.fields()) == set(table)
            for column, values in table.items():
                assert cut[column].dtype == values.dtype
                np.testing.assert_array_equal(np.asarray(cut[column]), values[rows])


@settings(deadline=None, max_examples=25)
@given(cs_subsets())
def test_a_cs_file_through_a_star_file_keeps_poses_ctf_and_order(
    made: tuple[dict[str, Any], dict[str, Any], list[int], bool],
) -> None:
    main, _, keep, _ = made
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = import_particles(write_cryosparc(folder / "p.cs", main), folder / "1", METADATA_ONLY)
        export_particles(folder / "1", folder / "two.star", whole.particle_id[keep])
        second = import_particles(folder / "two.star", folder / "2", METADATA_ONLY)
    assert_same_particles(whole.take(np.array(sorted(keep))), second, 1e-9)
