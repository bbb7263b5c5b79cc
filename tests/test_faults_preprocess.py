"""What goes wrong with images and disks gives a clear error, nothing half-made, a rerun that completes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from images_on_disk import import_folder, particle_set, smooth_images, write_stack

from cryodrgn_pipeline.errors import ConfigError, CryodrgnPipelineError, InputFormatError
from cryodrgn_pipeline.io.output_lock import sole_writer
from cryodrgn_pipeline.preprocess import PreprocessSettings, preprocess

SETTINGS = PreprocessSettings(box_size_px=16)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_stack(tmp_path / "a.mrcs", smooth_images(40, 32))


@pytest.fixture
def source(tmp_path: Path, images: Path) -> Path:
    return import_folder(tmp_path / "imported", particle_set([images], [0] * 40, list(range(40))))


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"a.mrcs", "imported"}


def test_a_stack_that_changed_since_the_import_is_refused_with_sizes_and_times(
    tmp_path: Path, images: Path, source: Path
) -> None:
    size = images.stat().st_size
    with images.open("r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(InputFormatError, match=rf"a\.mrcs: changed since.*{size} bytes.*{size - 100} bytes"):
        preprocess(source, tmp_path / "stack", SETTINGS)
    write_stack(images, smooth_images(40, 32, seed=9))
    os.utime(images, ns=(1, 1))
    with pytest.raises(InputFormatError, match="1970"):
        preprocess(source, tmp_path / "stack", SETTINGS)
    assert leftovers(tmp_path) == set()


def test_a_truncated_stack_is_refused_even_if_the_import_saw_it_so(tmp_path: Path, images: Path) -> None:
    with images.open("r+b") as file:
        file.truncate(images.stat().st_size - 100)
    source = import_folder(tmp_path / "imported", particle_set([images], [0] * 40, list(range(40))))
    with pytest.raises(InputFormatError, match="truncated"):
        preprocess(source, tmp_path / "stack", SETTINGS)
    assert leftovers(tmp_path) == set()


def test_a_missing_stack_is_named(tmp_path: Path, images: Path, source: Path) -> None:
    images.unlink()
    with pytest.raises(InputFormatError, match=r"a\.mrcs: no such image file"):
        preprocess(source, tmp_path / "stack", SETTINGS)


def test_a_wrong_box_is_named_with_both_sizes(tmp_path: Path, images: Path) -> None:
    particles = particle_set([images], [0] * 40, list(range(40)), box_size_px=48)
    source = import_folder(tmp_path / "imported", particles)
    with pytest.raises(InputFormatError, match=r"a\.mrcs: its images are 32 px .* 48 \(40 of 40"):
        preprocess(source, tmp_path / "stack", SETTINGS)


def test_an_image_number_beyond_the_stack_is_refused(tmp_path: Path, images: Path) -> None:
    source = import_folder(tmp_path / "imported", particle_set([images], [0, 0], [3, 40]))
    with pytest.raises(InputFormatError, match=r"image 41, but the file has 40"):
        preprocess(source, tmp_path / "stack", SETTINGS)


def test_pixels_that_are_not_numbers_are_refused_by_image_and_row(tmp_path: Path) -> None:
    path = write_stack(tmp_path / "a.mrcs", smooth_images(8, 32))
    with path.open("r+b") as file:
        file.seek(1024 + 5 * 32 * 32 * 4 + 400)
        file.write(np.float32(np.nan).tobytes())
    source = import_folder(tmp_path / "imported", particle_set([path], [0] * 3, [1, 5, 2]))
    with pytest.raises(InputFormatError, match=r"6@.*a\.mrcs \(row 2 of"):
        preprocess(source, tmp_path / "stack", SETTINGS)
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize(
    ("scale", "message"), [(1e6, "float16 ends at 65504"), (1e-9, "too faint for float16")]
)
def test_images_that_float16_cannot_hold_are_refused(tmp_path: Path, scale: float, message: str) -> None:
    path = write_stack(tmp_path / "a.mrcs", smooth_images(4, 32) * np.float32(scale))
    source = import_folder(tmp_path / "imported", particle_set([path], [0] * 4, [0, 1, 2, 3]))
    with pytest.raises(InputFormatError, match=message):
        preprocess(source, tmp_path / "stack", PreprocessSettings(box_size_px=16, dtype="float16"))


def test_a_larger_box_is_refused_with_the_numbers(tmp_path: Path, source: Path) -> None:
    with pytest.raises(InputFormatError, match=r"--box-size 34 .* 40 of 40 .* 32 px at 2 Å.* at most 32"):
        preprocess(source, tmp_path / "stack", PreprocessSettings(box_size_px=34))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box_size_px": 15}, "must be even"),
        ({"box_size_px": 16, "dtype": "int8"}, "--dtype"),
        ({"box_size_px": 16, "window_radius": 1.0}, "--window-radius"),
        ({"box_size_px": 16, "mask_radius_a": 0.0}, "--mask-radius-a"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreprocessSettings(**options)  # type: ignore[arg-type]


def test_an_import_without_images_is_refused_with_the_cure(tmp_path: Path, images: Path) -> None:
    particles = particle_set([images], [0] * 3, [0, 1, 2])
    source = import_folder(tmp_path / "imported", particles, metadata_only=True)
    with pytest.raises(InputFormatError, match=r"--metadata-only.*--datadir"):
        preprocess(source, tmp_path / "stack", SETTINGS)


def test_a_folder_that_is_no_stack_is_never_replaced(tmp_path: Path, source: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match=r"not this step's output, e\.g\. 'thesis\.tex'"):
        preprocess(source, tmp_path / "mine", SETTINGS)
    with pytest.raises(ConfigError, match="is a file where a folder"):
        preprocess(source, tmp_path / "mine" / "thesis.tex", SETTINGS)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_a_note_beside_a_finished_stack_is_no_trouble_until_the_stack_would_be_replaced(
    tmp_path: Path, source: Path
) -> None:
    stack = preprocess(source, tmp_path / "stack", SETTINGS)
    (stack.path / "note.txt").write_text("the good one")
    assert preprocess(source, stack.path, SETTINGS).fingerprint == stack.fingerprint
    with pytest.raises(ConfigError, match=r"note\.txt"):
        preprocess(source, stack.path, PreprocessSettings(box_size_px=12))
    assert (stack.path / "note.txt").exists()


def test_a_broken_stack_is_made_again(tmp_path: Path, source: Path) -> None:
    stack = preprocess(source, tmp_path / "stack", SETTINGS)
    wanted = stack.read(slice(None))
    with (stack.path / "images.mrcs").open("r+b") as file:
        file.truncate(2000)
    np.testing.assert_array_equal(preprocess(source, tmp_path / "stack", SETTINGS).read(slice(None)), wanted)


def test_two_runs_do_not_write_one_output(tmp_path: Path, source: Path) -> None:
    with (
        sole_writer(tmp_path / "stack"),
        pytest.raises(CryodrgnPipelineError, match="another process is writing"),
    ):
        preprocess(source, tmp_path / "stack", SETTINGS)
    assert len(preprocess(source, tmp_path / "stack", SETTINGS)) == 40


KILLED_AFTER_THREE_CHUNKS = """
import os, signal, sys
from pathlib import Path
from cryodrgn_pipeline.io.mrc import MrcStackWriter
from cryodrgn_pipeline.preprocess import PreprocessSettings, preprocess
append = MrcStackWriter.append
def append_then_die(self, images):
    append(self, images)
    self._file.flush()
    if self.written >= 12:
        os.kill(os.getpid(), signal.SIGKILL)
MrcStackWriter.append = append_then_die
preprocess(Path(sys.argv[1]), Path(sys.argv[2]), PreprocessSettings(box_size_px=16), chunk_size=4)
"""


def test_kill_9_leaves_no_stack_and_the_rerun_completes_and_cleans_up(tmp_path: Path, source: Path) -> None:
    command = [sys.executable, "-c", KILLED_AFTER_THREE_CHUNKS, str(source), str(tmp_path / "stack")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    left = leftovers(tmp_path)
    assert "stack" not in left
    unfinished = [tmp_path / name for name in left if (tmp_path / name).is_dir()]
    assert (unfinished[0] / "images.mrcs").stat().st_size > 1024
    assert len(preprocess(source, tmp_path / "stack", SETTINGS)) == 40
    assert leftovers(tmp_path) == {"stack"}


def test_kill_9_leaves_an_older_stack_as_it_was(tmp_path: Path, source: Path) -> None:
    older = preprocess(source, tmp_path / "stack", PreprocessSettings(box_size_px=12)).fingerprint
    command = [sys.executable, "-c", KILLED_AFTER_THREE_CHUNKS, str(source), str(tmp_path / "stack")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    kept = preprocess(source, tmp_path / "stack", PreprocessSettings(box_size_px=12))
    assert kept.fingerprint == older


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tiny disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small_is_noticed_before_the_work(source: Path, tiny_disk: Path) -> None:
    with pytest.raises(CryodrgnPipelineError, match=r"needs .* GB, but .* GB are free"):
        preprocess(source, tiny_disk / "stack", PreprocessSettings(box_size_px=32))
    assert list(tiny_disk.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_leaves_nothing_behind(source: Path, tiny_disk: Path) -> None:
    (tiny_disk / "other").write_bytes(bytes(20000))
    with pytest.raises(CryodrgnPipelineError, match="disk or quota is full"):
        preprocess(source, tiny_disk / "stack", SETTINGS)
    assert [path.name for path in tiny_disk.iterdir()] == ["other"]
    (tiny_disk / "other").unlink()
    assert len(preprocess(source, tiny_disk / "stack", PreprocessSettings(box_size_px=8))) == 40


def test_the_command_line_says_it_in_one_line_and_exits_3(tmp_path: Path, source: Path, images: Path) -> None:
    command = [sys.executable, "-m", "cryodrgn_pipeline", "preprocess", str(source), "--box-size", "16"]

    def run(output: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, "-o", output], capture_output=True, text=True, check=False)

    done = run(str(tmp_path / "s"))
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "s"))
    images.unlink()
    failed = subprocess.run(
        [*command, "-o", str(tmp_path / "t")], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 3
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.strip().splitlines()) == 1
