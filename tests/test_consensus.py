"""`consensus` writes maps that show the object, says how well, and stops where conventions are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import mrcfile
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cryodrgn_pipeline.consensus import consensus, read_reference
from cryodrgn_pipeline.conventions import Remedies
from cryodrgn_pipeline.errors import ConventionError, InputFormatError
from cryodrgn_pipeline.fourier.fsc import fsc
from cryodrgn_pipeline.importing import ImportOptions
from cryodrgn_pipeline.io.mrc import read_volume, write_volume
from cryodrgn_pipeline.stack import Stack
from tests.simulated_stack import PIXEL_SIZE_A, simulated, stack_of


@pytest.fixture(scope="module")
def simulated_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def stack(simulated_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    return stack_of(simulated_set, tmp_path_factory.mktemp("stack"))


@pytest.fixture(scope="module")
def done(stack: Stack, simulated_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("consensus") / "out"
    consensus(stack.path, output, reference=simulated_set / "consensus.mrc")
    return output


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def test_the_map_is_the_object_in_its_place_and_grey_scale(done: Path, simulated_set: Path) -> None:
    found, _ = read_volume(done / "map.mrc")
    truth, _ = read_volume(simulated_set / "consensus.mrc")
    assert correlation(found, truth) > 0.95
    slope = float((found * truth).sum() / (truth * truth).sum())
    assert slope == pytest.approx(1, abs=0.1)
    mask, _ = read_volume(done / "mask.mrc")
    assert abs(found[mask == 0].mean()) < 0.01 * found.max()


def test_maps_carry_voxel_size_origin_and_the_volume_flag(done: Path) -> None:
    for name in ("map", "half1", "half2"):
        with mrcfile.open(done / f"{name}.mrc") as mrc:
            assert mrc.voxel_size.x == pytest.approx(PIXEL_SIZE_A)
            assert int(mrc.header.ispg) == 1
            assert float(mrc.header.origin.x) == 0
            assert mrc.data.shape == (24, 24, 24)


def test_the_table_holds_the_fsc_of_the_half_maps_written(done: Path) -> None:
    table = pq.read_table(done / "fsc.parquet").to_pydict()
    halves = [torch.from_numpy(read_volume(done / f"half{half}.mrc")[0]) for half in (1, 2)]
    mask = torch.from_numpy(read_volume(done / "mask.mrc")[0])
    np.testing.assert_allclose(table["fsc_unmasked"][1:], fsc(*halves)[1:].numpy(), atol=1e-3)
    np.testing.assert_allclose(table["fsc_masked"][1:], fsc(*halves, mask)[1:].numpy(), atol=2e-2)
    assert table["frequency_per_a"][12] == pytest.approx(1 / (2 * PIXEL_SIZE_A))
    assert table["fsc_reference"][4] > 0.9


def test_the_summary_says_resolution_numbers_and_the_verdict_on_every_convention(done: Path) -> None:
    content = json.loads((done / "consensus.json").read_text())
    assert 2 * PIXEL_SIZE_A <= content["resolution_fsc0143_a"] < 20
    assert content["resolution_fsc05_a"] >= content["resolution_fsc0143_a"]
    assert content["n_particles"] == 300
    assert content["box_size_px"] == 24
    assert content["pixel_size_a"] == PIXEL_SIZE_A
    assert content["half_sets"] == "source"
    assert content["convention_check"]["verdict"] == "consistent"
    tests = {test["name"]: test for test in content["convention_check"]["tests"]}
    assert set(tests) == {"rotation", "shift_sign", "shift_unit", "contrast", "hand", "pixel_size"}
    assert tests["rotation"]["score_current"] > tests["rotation"]["score_alternative"]


@pytest.fixture(scope="module")
def wrong(simulated_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    options = ImportOptions(remedies=Remedies(negate_shifts=True))
    return stack_of(simulated_set, tmp_path_factory.mktemp("wrong"), options)


def test_a_contradiction_writes_everything_then_stops_with_the_line_that_mends_it(
    wrong: Stack, tmp_path: Path
) -> None:
    with pytest.raises(ConventionError, match="negate_shifts: false") as stopped:
        consensus(wrong.path, tmp_path / "out")
    assert stopped.value.exit_code == 3
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"map.mrc", "half1.mrc", "half2.mrc", "mask.mrc", "fsc.parquet", "consensus.json"}
    content = json.loads((tmp_path / "out" / "consensus.json").read_text())
    assert content["convention_check"]["verdict"] == "contradicted"


def test_a_warning_is_enough_where_asked(
    wrong: Stack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="cryodrgn_pipeline"):
        consensus(wrong.path, tmp_path / "out", check="warn")
    assert "opposite sign" in caplog.text


def test_without_the_check_nothing_is_tested(wrong: Stack, tmp_path: Path) -> None:
    content = consensus(wrong.path, tmp_path / "out", check="off")
    assert content["convention_check"] == {"verdict": "not_tested", "tests": []}


def test_a_mask_of_the_user_is_taken(stack: Stack, done: Path, tmp_path: Path) -> None:
    ones = tmp_path / "ones.mrc"
    write_volume(ones, np.ones((24, 24, 24), np.float32), PIXEL_SIZE_A)
    content = consensus(stack.path, tmp_path / "out", check="off", mask=ones)
    assert content["mask_volume_fraction"] == 1
    table = pq.read_table(tmp_path / "out" / "fsc.parquet").to_pydict()
    np.testing.assert_allclose(table["fsc_masked"], table["fsc_unmasked"], atol=1e-6)


def test_a_mask_in_the_box_of_the_original_images_is_resampled(stack: Stack, tmp_path: Path) -> None:
    for box in (24, 48):
        edges_a = (np.indices((box,) * 3) - box // 2) * (24 * PIXEL_SIZE_A / box)
        ball = np.clip(1.5 - np.sqrt((edges_a**2).sum(axis=0)) / (8 * PIXEL_SIZE_A), 0, 1)
        write_volume(tmp_path / f"{box}.mrc", ball.astype(np.float32), 24 * PIXEL_SIZE_A / box)
        consensus(stack.path, tmp_path / f"out{box}", check="off", mask=tmp_path / f"{box}.mrc")
    same, resampled = (read_volume(tmp_path / f"out{box}" / "mask.mrc")[0] for box in (24, 48))
    assert np.abs(resampled - same).max() < 0.05
    assert 0 <= resampled.min() < resampled.max() <= 1


def test_a_mask_of_an_odd_box_or_range_is_refused(stack: Stack, tmp_path: Path) -> None:
    other = tmp_path / "other.mrc"
    write_volume(other, np.ones((21, 21, 21), np.float32), PIXEL_SIZE_A)
    with pytest.raises(InputFormatError, match="21 x 21 x 21"):
        consensus(stack.path, tmp_path / "out", check="off", mask=other)
    for wrong_voxel in (7.0, np.nan):
        write_volume(other, np.ones((24, 24, 24), np.float32), PIXEL_SIZE_A)
        other.write_bytes(other.read_bytes()[:-4] + np.float32(wrong_voxel).tobytes())
        with pytest.raises(InputFormatError, match="between 0 and 1"):
            consensus(stack.path, tmp_path / "out", check="off", mask=other)


def test_references_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    path = tmp_path / "map.mrc"
    write_volume(path, np.zeros((8, 8, 8), np.float32), 2.0)
    with pytest.raises(InputFormatError, match="no density"):
        read_reference(path)
    write_volume(path, np.ones((8, 8, 6), np.float32), 2.0)
    with pytest.raises(InputFormatError, match="even cube"):
        read_reference(path)
    with mrcfile.new(
        path, np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32), overwrite=True
    ):
        pass
    with pytest.raises(InputFormatError, match="no voxel size"):
        read_reference(path)
