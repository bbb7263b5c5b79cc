"""MRC files are read as mrcfile wrote them, and what is damaged is refused with sizes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
from images_on_disk import write_stack

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.mrc import (
    MrcImages,
    MrcStackWriter,
    read_header,
    read_volume,
    write_volume,
)


def numbers(dtype: str, n: int = 5, box: int = 6) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(1).integers(0, 100, (n, box, box + 2))
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", ["<i1", "<i2", "<f4", "<u2", "<f2", ">i2", ">f4", ">u2"])
def test_images_of_every_mode_and_byte_order_read_as_written(tmp_path: Path, dtype: str) -> None:
    images = numbers(dtype)
    path = write_stack(tmp_path / "a.mrcs", images, 1.25)
    header = read_header(path)
    assert (header.n_images, header.ny, header.nx) == (5, 6, 8)
    assert header.voxel_size_a == pytest.approx(1.25, rel=1e-6)
    with MrcImages(path) as stack:
        rows = np.array([3, 4, 0, 0, 2, 1])
        got = stack.read(rows)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, images[rows].astype(np.float32))


def test_signed_bytes_stay_signed(tmp_path: Path) -> None:
    images = np.full((1, 4, 4), -3, dtype=np.int8)
    assert MrcImages(write_stack(tmp_path / "a.mrcs", images)).read(np.array([0])).min() == -3


def test_a_single_image_and_a_volume_flagged_stack_read_as_stacks(tmp_path: Path) -> None:
    image = numbers("f4")[0]
    with mrcfile.new(tmp_path / "one.mrc") as mrc:
        mrc.set_data(image)
    with mrcfile.new(tmp_path / "volume.mrc") as mrc:
        mrc.set_data(numbers("f4"))
        mrc.set_volume()
    np.testing.assert_array_equal(MrcImages(tmp_path / "one.mrc").read(np.array([0]))[0], image)
    np.testing.assert_array_equal(MrcImages(tmp_path / "volume.mrc").read(np.arange(5)), numbers("f4"))


def test_an_extended_header_is_skipped(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "a.mrcs", numbers("f4"))
    with mrcfile.open(path, "r+") as mrc:
        mrc.set_extended_header(np.zeros(777, dtype="V1"))
    assert read_header(path).data_offset == 1024 + 777
    np.testing.assert_array_equal(MrcImages(path).read(np.array([4]))[0], numbers("f4")[4])


def test_a_truncated_stack_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "a.mrcs", numbers("f4"))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    expected = rf"a\.mrcs.*truncated.*{size} bytes.*{size - 1} bytes.*4 whole"
    with pytest.raises(InputFormatError, match=expected):
        read_header(path)


def test_a_stack_that_shrinks_while_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "a.mrcs", numbers("f4"))
    stack = MrcImages(path)
    with path.open("r+b") as file:
        file.truncate(1100)
    with pytest.raises(InputFormatError, match="became shorter"):
        stack.read(np.array([4]))


@pytest.mark.parametrize("content", [b"", b"x" * 500, b"\xff" * 2000, b"data_particles\n" * 200])
def test_what_is_no_mrc_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.mrcs"
    path.write_bytes(content)
    with pytest.raises(InputFormatError, match=r"odd\.mrcs"):
        read_header(path)


def test_complex_modes_and_missing_files_are_refused(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "c.mrc") as mrc:
        mrc.set_data(np.zeros((2, 4, 4), dtype=np.complex64))
    with pytest.raises(InputFormatError, match="mode 4"):
        read_header(tmp_path / "c.mrc")
    with pytest.raises(InputFormatError, match="no such image file"):
        read_header(tmp_path / "none.mrcs")


def test_image_numbers_outside_the_stack_are_refused(tmp_path: Path) -> None:
    stack = MrcImages(write_stack(tmp_path / "a.mrcs", numbers("f4")))
    for wrong in (5, -1):
        with pytest.raises(InputFormatError, match=rf"image number {wrong} .*has 5"):
            stack.read(np.array([0, wrong]))


def test_open_stacks_travel_to_other_processes_by_path(tmp_path: Path) -> None:
    stack = MrcImages(write_stack(tmp_path / "a.mrcs", numbers("f4")))
    travelled = pickle.loads(pickle.dumps(stack))
    np.testing.assert_array_equal(travelled.read(np.array([1])), stack.read(np.array([1])))


@pytest.mark.parametrize(("dtype", "mode"), [("float32", 2), ("float16", 12)])
def test_a_written_stack_is_valid_and_tells_its_statistics(tmp_path: Path, dtype: str, mode: int) -> None:
    images = np.random.default_rng(2).normal(3, 2, (7, 8, 8)).astype(np.float32)
    with MrcStackWriter(
        tmp_path / "s.mrcs", n_images=7, box_size_px=8, voxel_size_a=1.31, dtype=dtype, label="seven"
    ) as writer:
        for part in (images[:3], images[3:4], images[4:]):
            writer.append(part)
    assert mrcfile.validate(tmp_path / "s.mrcs")
    with mrcfile.open(tmp_path / "s.mrcs") as mrc:
        np.testing.assert_array_equal(mrc.data, images.astype(dtype))
        assert mrc.is_image_stack()
        assert int(mrc.header.mode) == mode
        assert float(mrc.voxel_size.x) == pytest.approx(1.31, rel=1e-6)
        assert float(mrc.header.dmean) == pytest.approx(images.mean(), rel=1e-4)
        assert float(mrc.header.rms) == pytest.approx(images.std(), rel=1e-4)
        assert float(mrc.header.dmin) == pytest.approx(images.min(), rel=1e-3)
        assert b"seven" in mrc.header.label[0]


def test_a_stack_that_lacks_images_cannot_be_closed(tmp_path: Path) -> None:
    writer = MrcStackWriter(tmp_path / "s.mrcs", n_images=3, box_size_px=4, voxel_size_a=1.0)
    writer.append(np.zeros((2, 4, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="2 of 3"):
        writer.close()
    with pytest.raises(ValueError, match="does not fit"):
        writer.append(np.zeros((2, 4, 4), dtype=np.float32))
    writer.append(np.zeros((1, 4, 4), dtype=np.float32))
    writer.close()


def test_a_volume_round_trips_with_voxel_size_origin_and_space_group(tmp_path: Path) -> None:
    volume = np.random.default_rng(3).normal(size=(6, 6, 6))
    write_volume(tmp_path / "v.mrc", volume, 2.806, "a map")
    got, voxel = read_volume(tmp_path / "v.mrc")
    np.testing.assert_array_equal(got, volume.astype(np.float32))
    assert voxel == pytest.approx(2.806, rel=1e-6)
    assert mrcfile.validate(tmp_path / "v.mrc")
    with mrcfile.open(tmp_path / "v.mrc") as mrc:
        assert mrc.is_volume()
        assert int(mrc.header.ispg) == 1
        assert [int(mrc.header[name]) for name in ("nxstart", "nystart", "nzstart")] == [0, 0, 0]
        assert [float(mrc.header.origin[axis]) for axis in "xyz"] == [0, 0, 0]
        assert float(mrc.header.rms) == pytest.approx(volume.std(), rel=1e-4)
        assert mrc.header.label[0].startswith(b"cryodrgn_pipeline")
    with pytest.raises(ValueError, match="voxel size"):
        write_volume(tmp_path / "v.mrc", volume, 0.0)
