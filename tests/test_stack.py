"""Stack: opens what belongs together, reads any rows, refuses what changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from images_on_disk import import_folder, particle_set, smooth_images, write_stack

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.preprocess import PreprocessSettings, preprocess
from cryodrgn_pipeline.stack import Stack


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    path = write_stack(tmp_path / "a.mrcs", smooth_images(12, 24))
    particles = particle_set([path], [0] * 12, list(range(12)), box_size_px=24)
    source = import_folder(tmp_path / "imported", particles)
    return preprocess(source, tmp_path / "stack", PreprocessSettings(box_size_px=16))


def test_rows_read_in_any_order_with_repeats_as_masks_of_numbers_or_slices(stack: Stack) -> None:
    everything = stack.read(slice(None))
    assert everything.shape == (12, 16, 16)
    rows = np.array([7, 7, 0, 11, 3])
    np.testing.assert_array_equal(stack.read(rows), everything[rows])
    np.testing.assert_array_equal(stack.read(slice(2, 9, 3)), everything[2:9:3])
    assert stack.read(np.array([], dtype=np.int64)).shape == (0, 16, 16)
    with pytest.raises(InputFormatError, match="has 12"):
        stack.read(np.array([12]))


def test_reading_gives_arrays_of_ones_own(stack: Stack) -> None:
    first = stack.read(np.array([0]))
    first += 1
    assert not np.array_equal(stack.read(np.array([0])), first)


def test_the_stack_tells_its_shape_noise_and_shifts(stack: Stack) -> None:
    assert len(stack) == 12
    assert stack.box_size_px == 16
    assert stack.pixel_size_a == 2.0 * 24 / 16
    assert stack.applied_shift_a.shape == (12, 2)
    assert {group: power.shape for group, power in stack.noise.items()} == {1: (9,)}
    assert all((power > 0).all() for power in stack.noise.values())


def test_the_fingerprint_is_of_the_content_and_not_of_the_run(stack: Stack) -> None:
    before = stack.fingerprint
    info = json.loads((stack.path / "stack.json").read_text())
    (stack.path / "stack.json").write_text(json.dumps({**info, "wall_time_s": 99.0}))
    assert Stack.open(stack.path).fingerprint == before
    (stack.path / "stack.json").write_text(json.dumps({**info, "import_fingerprint": "other"}))
    assert Stack.open(stack.path).fingerprint != before


def test_a_truncated_or_exchanged_file_is_refused(stack: Stack, tmp_path: Path) -> None:
    images = stack.path / "images.mrcs"
    whole = images.read_bytes()
    images.write_bytes(whole[:-4])
    with pytest.raises(InputFormatError, match="truncated"):
        Stack.open(stack.path)
    write_stack(images, smooth_images(11, 16))
    with pytest.raises(InputFormatError, match=r"12 images of 16 x 16 px .*has 11 of 16 x 16 px"):
        Stack.open(stack.path)


def test_what_is_no_stack_is_refused_with_the_verb_that_makes_one(stack: Stack, tmp_path: Path) -> None:
    with pytest.raises(InputFormatError, match="cryodrgn-pipeline preprocess"):
        Stack.open(tmp_path)
    (stack.path / "stack.json").write_text("{")
    with pytest.raises(InputFormatError, match=r"stack\.json: not JSON .* `cryodrgn-pipeline preprocess`"):
        Stack.open(stack.path)
    (stack.path / "stack.json").write_text("{}")
    with pytest.raises(InputFormatError, match="lacks n_particles"):
        Stack.open(stack.path)
