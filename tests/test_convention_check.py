"""The convention check finds each error and each pair of errors, and raises no alarm on good data."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cryodrgn_pipeline.convention_check import (
    ConventionCheck,
    check_conventions,
    gather,
    run_tests,
    shells_to_compare,
    shift_factors,
)
from cryodrgn_pipeline.convention_scores import Evidence, Hypothesis, Score, advantage
from cryodrgn_pipeline.convention_verdicts import Source
from cryodrgn_pipeline.io.mrc import read_volume
from cryodrgn_pipeline.stack import Stack
from tests.simulated_stack import PIXEL_SIZE_A, simulated, stack_of

SOURCE = Source(pixel_size_a=PIXEL_SIZE_A)
Reference = tuple[torch.Tensor, float]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stack, Reference]:
    folder = tmp_path_factory.mktemp("check")
    path = simulated(folder)
    volume, voxel_a = read_volume(path / "consensus.mrc")
    return stack_of(path, folder), (torch.from_numpy(volume), voxel_a)


@pytest.fixture(scope="module")
def evidence(made: tuple[Stack, Reference]) -> Evidence:
    stack, _ = made
    return gather(stack, np.arange(len(stack)), np.random.default_rng(0))


@pytest.fixture(scope="module")
def reference(made: tuple[Stack, Reference]) -> Reference:
    return made[1]


def spoilt(evidence: Evidence, **changes: float | bool) -> Evidence:
    """The evidence as an import under other conventions would have made it."""
    hypothesis = Hypothesis(**changes)  # type: ignore[arg-type]
    factor = hypothesis.shift_factor * (-1 if hypothesis.negate else 1)
    return replace(evidence, images=evidence.under(hypothesis), shift_a=evidence.shift_a * factor)


def dark(evidence: Evidence) -> Evidence:
    return replace(evidence, images=replace(evidence.images, coefficients=-evidence.images.coefficients))


def remedies(check: ConventionCheck) -> dict[str, str | None]:
    return {test.name: test.remedy for test in check.tests if test.verdict == "contradicted"}


def verdicts(check: ConventionCheck) -> dict[str, str]:
    return {test.name: test.verdict for test in check.tests}


def test_good_data_are_consistent_and_what_needs_a_reference_is_not_determinable(evidence: Evidence) -> None:
    check = run_tests(evidence, SOURCE, None)
    assert verdicts(check) == {
        "rotation": "consistent",
        "shift_sign": "consistent",
        "shift_unit": "consistent",
        "contrast": "consistent",
        "hand": "not_determinable",
        "pixel_size": "not_determinable",
    }
    assert check.verdict == "consistent"
    assert all(test.remedy is None for test in check.tests)
    assert "--reference" in check.tests[4].statement


def test_with_a_reference_every_convention_is_judged(evidence: Evidence, reference: Reference) -> None:
    assert set(verdicts(run_tests(evidence, SOURCE, reference)).values()) == {"consistent"}


def test_transposed_rotations_are_named(evidence: Evidence) -> None:
    check = run_tests(spoilt(evidence, transpose=True), SOURCE, None)
    assert remedies(check) == {"rotation": "transpose_rotations: true"}
    assert check.verdict == "contradicted"
    assert "transpose_rotations: true" in check.message()
    assert "--transpose-rotations" in check.message()
    assert "conventions:" in check.message()


def test_negated_shifts_are_named(evidence: Evidence) -> None:
    assert remedies(run_tests(spoilt(evidence, negate=True), SOURCE, None)) == {
        "shift_sign": "negate_shifts: true"
    }


@pytest.mark.parametrize("factor", [PIXEL_SIZE_A, 1 / PIXEL_SIZE_A])
def test_shifts_in_the_wrong_unit_are_named(evidence: Evidence, factor: float) -> None:
    check = run_tests(spoilt(evidence, shift_factor=1 / factor), SOURCE, None)
    assert remedies(check) == {"shift_unit": f"shift_scale: {factor:.6g}"}


def test_dark_particles_are_named_with_the_sign_opposite_to_the_one_in_use(evidence: Evidence) -> None:
    check = run_tests(dark(evidence), SOURCE, None)
    assert remedies(check) == {"contrast": "contrast_sign: -1"}
    assert "--set contrast_sign=-1" in check.message()
    inverted = run_tests(dark(evidence), replace(SOURCE, contrast_sign=-1.0), None)
    assert remedies(inverted) == {"contrast": "contrast_sign: 1"}


def test_where_contrast_signs_differ_no_line_can_mend_them_and_none_is_offered(evidence: Evidence) -> None:
    check = run_tests(dark(evidence), replace(SOURCE, contrast_sign=None), None)
    assert remedies(check) == {"contrast": None}
    assert "contrast signs differ" in check.message()
    assert "config.yaml" not in check.message()
    assert "import again" not in check.message()


def test_two_errors_at_once_are_both_named(evidence: Evidence, reference: Reference) -> None:
    check = run_tests(spoilt(evidence, transpose=True, negate=True), SOURCE, reference)
    assert remedies(check) == {"rotation": "transpose_rotations: true", "shift_sign": "negate_shifts: true"}
    check = run_tests(dark(spoilt(evidence, transpose=True)), SOURCE, None)
    assert remedies(check) == {"rotation": "transpose_rotations: true", "contrast": "contrast_sign: -1"}


def test_a_mirrored_hand_shows_against_the_reference_only(evidence: Evidence, reference: Reference) -> None:
    mirrored = spoilt(evidence, mirror=True)
    assert remedies(run_tests(mirrored, SOURCE, reference)) == {"hand": "mirror_hand: true"}
    assert run_tests(mirrored, SOURCE, None).verdict == "consistent"


def test_another_pixel_size_shows_against_the_reference(evidence: Evidence, reference: Reference) -> None:
    volume, voxel_a = reference
    check = run_tests(evidence, SOURCE, (volume, voxel_a * 1.06))
    assert list(remedies(check)) == ["pixel_size"]
    line = remedies(check)["pixel_size"]
    assert line is not None
    assert float(line.removeprefix("pixel_size_a: ")) == pytest.approx(PIXEL_SIZE_A * 1.06, rel=0.01)


def test_remedies_are_relative_to_what_the_import_did_already(evidence: Evidence) -> None:
    source = replace(SOURCE, transpose_rotations=True, shift_scale=2.0)
    check = run_tests(spoilt(evidence, transpose=True, shift_factor=1 / PIXEL_SIZE_A), source, None)
    assert remedies(check) == {
        "rotation": "transpose_rotations: false",
        "shift_unit": f"shift_scale: {2 * PIXEL_SIZE_A:.6g}",
    }


def test_a_reference_in_another_frame_judges_nothing(evidence: Evidence, reference: Reference) -> None:
    volume, voxel_a = reference
    check = run_tests(evidence, SOURCE, (torch.roll(volume, (5, -6, 5), (0, 1, 2)), voxel_a))
    assert verdicts(check)["hand"] == "not_determinable"
    assert verdicts(check)["rotation"] == "consistent"
    assert "under no convention" in check.tests[4].statement


def test_particles_without_shifts_do_not_tell_their_sign(evidence: Evidence) -> None:
    found = verdicts(run_tests(spoilt(evidence, shift_factor=0.0), SOURCE, None))
    assert found["shift_sign"] == found["shift_unit"] == "not_determinable"
    assert found["rotation"] == "consistent"


def test_small_random_shifts_are_errors_and_no_contradiction(evidence: Evidence) -> None:
    error = 4.0 * torch.randn(len(evidence), 2, generator=torch.Generator().manual_seed(0))
    centred = replace(evidence, shift_a=error)  # the images are centred; nothing of `error` is applied yet
    moved = replace(centred, images=centred.under(Hypothesis(shift_factor=2.0)))  # 2 e − e: now it is
    check = run_tests(moved, SOURCE, None)
    assert verdicts(check)["shift_sign"] == verdicts(check)["shift_unit"] == "not_determinable"
    assert "errors more than shifts" in check.tests[1].statement


def test_large_shifts_of_centred_images_are_to_be_left_out(evidence: Evidence) -> None:
    stale = 15.0 * torch.randn(len(evidence), 2, generator=torch.Generator().manual_seed(0))
    centred = replace(evidence, shift_a=stale)
    check = run_tests(replace(centred, images=centred.under(Hypothesis(shift_factor=2.0))), SOURCE, None)
    assert remedies(check) == {"shift_sign": "shift_x_a: 0\nshift_y_a: 0"}
    assert "--set shift_x_a=0 --set shift_y_a=0" in check.message()
    assert "    shift_y_a: 0" in check.message()


def test_noise_alone_determines_nothing(evidence: Evidence) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = evidence.images.coefficients.shape
    noise = torch.randn(shape, dtype=torch.complex64, generator=generator)
    check = run_tests(replace(evidence, images=replace(evidence.images, coefficients=noise)), SOURCE, None)
    assert check.verdict == "not_determinable"
    assert set(verdicts(check).values()) == {"not_determinable"}


def test_views_from_one_side_only_do_not_tell_rotations_from_their_transposes(evidence: Evidence) -> None:
    same = torch.eye(3).expand(len(evidence), 3, 3).contiguous()
    check = run_tests(replace(evidence, images=replace(evidence.images, rotation=same)), SOURCE, None)
    assert verdicts(check)["rotation"] == "not_determinable"


def test_few_particles_are_not_determinable(
    made: tuple[Stack, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, _ = made
    monkeypatch.setattr(Stack, "__len__", lambda self: 5)
    check = check_conventions(stack)
    assert check.verdict == "not_determinable"
    assert all("5 particles are too few" in test.statement for test in check.tests)


def test_units_near_one_angstrom_are_not_tried_and_binning_is() -> None:
    assert shift_factors(1.02) == (2.0, 0.5)
    assert shift_factors(2.0) == (2.0, 0.5)
    assert shift_factors(4.0) == (4.0, 0.25, 2.0, 0.5)


def test_compared_shells_reach_fifteen_angstrom_within_bounds() -> None:
    assert shells_to_compare(128, 300.0) == 20
    assert shells_to_compare(128, 60.0) == 8
    assert shells_to_compare(256, 900.0) == 24
    assert shells_to_compare(16, 300.0) == 7


def test_an_advantage_is_counted_in_standard_errors_of_the_paired_votes() -> None:
    votes = np.random.default_rng(0).normal(5, 3, size=400)
    better = votes + np.random.default_rng(1).normal(0.1, 0.2, size=400)
    current, other = Score(votes=votes, mean_fsc=0.1), Score(votes=better, mean_fsc=0.2)
    assert advantage(other, current) == pytest.approx(10, abs=2)
    assert advantage(current, current) == 0


def test_the_stack_says_what_the_import_put_in_force(made: tuple[Stack, Reference]) -> None:
    stack, _ = made
    assert Source.of(stack) == SOURCE
