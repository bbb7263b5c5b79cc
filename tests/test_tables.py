"""particles.parquet holds what was put in; what is wrong with a table that is not one is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.runs import read_z
from cryodrgn_pipeline.io.tables import read_extra, read_particles, write_particles
from cryodrgn_pipeline.particles import Ctf, ImageRef, Optics, ParticleSet, Poses

N = 4
CONTRACT = """
particle_id image_path image_index optics_group pixel_size_a box_size_px voltage_kv cs_mm
amplitude_contrast phase_shift_deg defocus_u_a defocus_v_a defocus_angle_deg rotation_00
rotation_01 rotation_02 rotation_10 rotation_11 rotation_12 rotation_20 rotation_21 rotation_22
shift_x_a shift_y_a contrast_sign half_set micrograph class
"""


def make_particles(uid: bool = False, poses: bool = True, optional: bool = True) -> ParticleSet:
    rng = np.random.default_rng(1)
    strings = np.array([f"{i + 1}@a.mrcs" for i in range(N)], dtype=object)
    return ParticleSet(
        particle_id=np.arange(N, dtype=np.uint64) + np.uint64(2**63 + 1) if uid else strings,
        images=ImageRef(
            stack_paths=("b.mrcs", "a.mrcs"), stack=np.array([1, 1, 0, 1]), index=np.array([3, 0, 0, 1])
        ),
        optics=Optics(
            optics_group=np.array([1, 1, 7, 1]),
            pixel_size_a=rng.uniform(1, 2, N),
            box_size_px=np.array([64, 64, 0, 64]),
            voltage_kv=np.full(N, 300.0),
            cs_mm=np.full(N, 2.7),
            amplitude_contrast=np.full(N, 0.1),
        ),
        ctf=Ctf(**{name: rng.normal(size=N) for name in Ctf.__slots__}),
        poses=Poses(rotation=rng.normal(size=(N, 3, 3)), shift_a=rng.normal(size=(N, 2))) if poses else None,
        contrast_sign=np.full(N, -1.0),
        half_set=np.array([1, 2, 1, 2]) if optional else None,
        micrograph=np.array(["00007", "a", "b", "c"], dtype=object) if optional else None,
        class_number=np.array([1, 1, 2, 3]) if optional else None,
    )


def assert_same(one: ParticleSet, other: ParticleSet) -> None:
    np.testing.assert_array_equal(one.particle_id, other.particle_id)
    assert one.particle_id.dtype == other.particle_id.dtype
    paths = [[part.images.stack_paths[i] for i in part.images.stack] for part in (one, other)]
    assert paths[0] == paths[1]
    np.testing.assert_array_equal(one.images.index, other.images.index)
    for part in ("optics", "ctf", "poses"):
        if getattr(one, part) is None:
            assert getattr(other, part) is None
            continue
        for name in getattr(one, part).__slots__:
            left, right = getattr(getattr(one, part), name), getattr(getattr(other, part), name)
            np.testing.assert_array_equal(left, right, err_msg=name)
            assert left.dtype == right.dtype
    for name in ("contrast_sign", "half_set", "micrograph", "class_number"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("uid", [True, False])
@pytest.mark.parametrize("poses", [True, False])
@pytest.mark.parametrize("optional", [True, False])
def test_particles_read_back_bit_for_bit(tmp_path: Path, uid: bool, poses: bool, optional: bool) -> None:
    particles = make_particles(uid, poses, optional)
    write_particles(particles, tmp_path / "particles.parquet")
    assert_same(particles, read_particles(tmp_path / "particles.parquet"))


def test_the_table_has_exactly_the_columns_of_the_contract(tmp_path: Path) -> None:
    write_particles(make_particles(), tmp_path / "particles.parquet")
    table = pq.read_table(tmp_path / "particles.parquet")
    assert table.column_names == CONTRACT.split()
    assert str(table.schema.field("particle_id").type) == "string"
    assert table["box_size_px"].to_pylist() == [64, 64, None, 64]


def test_uids_above_2_to_53_are_stored_as_uint64(tmp_path: Path) -> None:
    write_particles(make_particles(uid=True), tmp_path / "particles.parquet")
    column = pq.read_table(tmp_path / "particles.parquet")["particle_id"]
    assert str(column.type) == "uint64"
    assert column.to_pylist() == [2**63 + 1 + i for i in range(N)]


def test_missing_poses_are_null_columns(tmp_path: Path) -> None:
    write_particles(make_particles(poses=False), tmp_path / "particles.parquet")
    table = pq.read_table(tmp_path / "particles.parquet")
    assert table["rotation_21"].null_count == N
    assert table["shift_y_a"].null_count == N


def test_a_folder_stands_for_the_table_in_it(tmp_path: Path) -> None:
    write_particles(make_particles(), tmp_path / "particles.parquet")
    assert len(read_particles(tmp_path)) == N


def test_extra_columns_travel_with_the_table(tmp_path: Path) -> None:
    applied = np.linspace(0, 1, N)
    write_particles(make_particles(), tmp_path / "particles.parquet", {"applied_shift_x_a": applied})
    extra = read_extra(tmp_path / "particles.parquet", ["applied_shift_x_a"])
    np.testing.assert_array_equal(extra["applied_shift_x_a"], applied)
    assert_same(make_particles(), read_particles(tmp_path / "particles.parquet"))


def test_an_unknown_extra_column_is_named(tmp_path: Path) -> None:
    write_particles(make_particles(), tmp_path / "particles.parquet")
    with pytest.raises(InputFormatError, match="no column z_0"):
        read_extra(tmp_path / "particles.parquet", ["z_0"])


def test_a_table_without_a_needed_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "particles.parquet"
    write_particles(make_particles(), path)
    pq.write_table(pq.read_table(path).drop_columns(["defocus_u_a"]), path)
    with pytest.raises(InputFormatError, match="defocus_u_a"):
        read_particles(path)


def test_a_missing_or_damaged_table_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(InputFormatError, match="no such table; `cryodrgn-pipeline import`"):
        read_particles(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputFormatError, match="not a readable Parquet"):
        read_particles(tmp_path / "bad.parquet")


def test_columns_of_unequal_length_are_refused() -> None:
    particles = make_particles()
    with pytest.raises(ValueError, match="half_set"):
        ParticleSet(
            particle_id=particles.particle_id,
            images=particles.images,
            optics=particles.optics,
            ctf=particles.ctf,
            poses=None,
            contrast_sign=particles.contrast_sign,
            half_set=np.array([1, 2]),
        )


def test_a_table_of_latents_saved_by_a_spreadsheet_is_read_and_one_without_numbers_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "z.csv"
    path.write_bytes(b"\xef\xbb\xbfz_0,z_1\r\n0.5,-1\r\n")
    np.testing.assert_array_equal(read_z(path), [[0.5, -1]])
    for content in (
        "z_0,z_1\n",
        "z_0,z_1\n1,nan\n",
        "z_0,z_1\n1,two\n",
        "z_0,z_1\n1,2,3\n",
        "z_1,z_0\n1,2\n",
    ):
        path.write_text(content)
        with pytest.raises(InputFormatError, match=r"z\.csv: .* expected"):
            read_z(path)
