"""Scores with answers known beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.evaluate import (
    evaluate,
    fsc_auc,
    knn_r2,
    latent_r2,
    leakage,
    moving_mask,
    paired_gain,
    read_truth,
    sample_points,
    union_mask,
)
from cryodrgn_pipeline.headroom import headroom, kernel, reference_scores
from cryodrgn_pipeline.importing import ImportOptions, import_particles
from cryodrgn_pipeline.io.mrc import read_volume, write_volume
from cryodrgn_pipeline.io.runs import read_z
from cryodrgn_pipeline.preprocess import PreprocessSettings, preprocess
from cryodrgn_pipeline.simulate import Settings, simulate

D = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "set"
    simulate(Settings(box_size=D, particles=300, pixel_size_a=12.0, states=5, snr=1.0, junk=0.05), folder)
    return folder


def write_run(folder: Path, ids: np.ndarray, z: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"particle_id": ids} | {f"z_{j}": z[:, j].astype(np.float32) for j in range(z.shape[1])}
    pd.DataFrame(columns).to_parquet(folder / "latent.parquet")
    return folder


def true_run(made: Path, folder: Path, ids: str = "particle_id") -> Path:
    truth = pd.read_parquet(made / "truth/truth.parquet").iloc[::-1]  # joins go by id, not by row
    return write_run(folder, truth[ids].to_numpy(), truth[["motion", "occupancy"]].to_numpy())


def test_a_map_scores_the_ceiling_against_itself_whatever_its_scale():
    volume = np.random.default_rng(0).normal(size=(64, 64, 64))
    assert fsc_auc(volume, 3 * volume) == pytest.approx(31 / 64)
    assert fsc_auc(volume, -volume) == pytest.approx(31 / 64)


def test_a_map_that_is_right_up_to_a_shell_scores_up_to_there():
    volume = np.random.default_rng(1).normal(size=(32, 32, 32))
    k = np.fft.fftfreq(32, 1 / 32)
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2)
    low = np.fft.ifftn(np.fft.fftn(volume) * (radius < 8)).real
    # shells 0…8 are 1 and shells 9…15 are 0: eight whole steps and half a step down
    assert fsc_auc(volume, low) == pytest.approx(8.5 / 32)


def test_unrelated_maps_score_little():
    rng = np.random.default_rng(2)
    assert fsc_auc(*rng.normal(size=(2, 32, 32, 32))) < 0.12


def test_masks_find_the_particle_and_what_moves_in_it():
    states = np.zeros((2, D, D, D), dtype=np.float32)
    states[:, 4:8, 4:8, 4:8] = 1.0
    states[1, 10:12, 10:12, 10:12] = 1.0
    union, moving = union_mask(states), moving_mask(states)
    assert moving is not None
    assert union[5, 5, 5] == union[11, 11, 11] == moving[11, 11, 11] == 1
    assert moving[5, 5, 5] == 0
    assert union[0, 15, 15] == 0
    assert moving_mask(states[:1]) is None


def test_r2_is_one_for_a_coordinate_the_latent_holds_and_none_for_one_it_does_not():
    rng = np.random.default_rng(3)
    z = rng.uniform(size=(2000, 2))
    noise = rng.uniform(size=2000)
    scores = latent_r2(z, {"held": z[:, 0] ** 2, "not": noise, "constant": np.ones(2000)})
    assert scores["held"] > 0.99
    assert -0.1 < scores["not"] < 0.03
    assert "constant" not in scores


def test_a_defocus_that_does_not_vary_cannot_leak():
    rng = np.random.default_rng(5)
    z, view = rng.normal(size=(100, 2)), rng.normal(size=(100, 3))
    assert set(leakage(z, view, np.full(100, 15000.0))) == {"viewing_direction"}


def test_r2_is_the_share_of_the_variance_that_can_be_known():
    rng = np.random.default_rng(4)
    z = rng.uniform(size=(8000, 1))
    target = z[:, 0] + rng.normal(0, np.sqrt(1 / 12), size=8000)  # half the variance is noise
    assert knn_r2(z, target) == pytest.approx(0.5 - 0.5 / 20, abs=0.03)  # and 20 neighbours carry 1/20 of it


def test_too_few_particles_are_an_error_and_not_a_score():
    with pytest.raises(ConfigError, match="too few"):
        knn_r2(np.zeros((20, 1)), np.arange(20.0))


@pytest.mark.parametrize("ids", ["particle_id", "uid"])
def test_true_volumes_at_the_particles_z_score_the_ceiling(made, tmp_path, ids):
    run = true_run(made, tmp_path / "run", ids)
    _, z = sample_points(run, made, count=12)
    truth = read_truth(made)
    volumes = tmp_path / "volumes"
    volumes.mkdir()
    for number, state in enumerate(truth.nearest_state(z.astype(float))):
        write_volume(volumes / f"vol_{number:03d}.mrc", 2 * truth.volumes[state] + 1, 12.0)
    pd.DataFrame({"path": "-", "z_0": z[:, 0], "z_1": z[:, 1]}).to_parquet(volumes / "volumes.parquet")
    metrics = evaluate(volumes, made / "truth", run=run)
    ceiling = 7 / 16
    assert metrics["compared"] == "per image"
    assert metrics["fsc_auc"] == pytest.approx(dict.fromkeys(("unmasked", "union", "moving"), ceiling))
    assert metrics["latent"]["r2"]["motion"] > 0.95
    assert metrics["latent"]["leakage"]["viewing_direction"] < 0.1
    assert metrics["latent"]["particles"] < 300  # junk does not count


def test_the_moving_mask_tells_a_wrong_state_better_than_the_whole_map(made, tmp_path):
    truth = read_truth(made)
    for number in range(len(truth.volumes)):  # everything scored as the consensus
        density, pixel_a = read_volume(made / "consensus.mrc")
        write_volume(tmp_path / f"vol_{number:03d}.mrc", density, pixel_a)
    scores = evaluate(tmp_path, made)["fsc_auc"]
    assert scores["moving"] < scores["union"] < 7 / 16


def test_the_thousandth_volume_comes_after_the_one_before(made, tmp_path):
    truth = read_truth(made)
    rows = [int(np.flatnonzero(truth.nearest_state(truth.particle_states) == state)[0]) for state in (0, 4)]
    (tmp_path / "ids.txt").write_text("\n".join(truth.table["particle_id"][rows]) + "\n")
    for name, state in (("vol_999", 0), ("vol_1000", 4)):
        write_volume(tmp_path / f"{name}.mrc", truth.volumes[state], 12.0)
    assert evaluate(tmp_path, made, particles=tmp_path / "ids.txt")["fsc_auc"]["moving"] == pytest.approx(
        7 / 16
    )


def test_volumes_that_belong_to_no_known_state_are_refused(made, tmp_path):
    write_volume(tmp_path / "vol_000.mrc", np.ones((D, D, D)), 12.0)
    with pytest.raises(ConfigError, match="--particles"):
        evaluate(tmp_path, made)
    (tmp_path / "ids.txt").write_text("no_such_particle\n")
    with pytest.raises(InputFormatError, match="no_such_particle"):
        evaluate(tmp_path, made, particles=tmp_path / "ids.txt")


def test_volumes_of_another_box_are_refused(made, tmp_path):
    write_volume(tmp_path / "vol_000.mrc", np.ones((8, 8, 8)), 24.0)
    first = pd.read_parquet(made / "truth/truth.parquet")["particle_id"][0]
    (tmp_path / "ids.txt").write_text(f"{first}\n")
    with pytest.raises(InputFormatError, match="8 px"):
        evaluate(tmp_path, made, particles=tmp_path / "ids.txt")


def test_the_command_line_writes_metrics_and_points_to_draw(made, tmp_path):
    run = true_run(made, tmp_path / "run")
    arguments = ["evaluate", "--truth", str(made), "--run", str(run)]
    result = CliRunner().invoke(app, [*arguments, "--write-points", str(tmp_path / "z.csv")])
    assert result.exit_code == 0, result.output
    metrics = json.loads((run / "evaluation.json").read_text())
    assert metrics["latent"]["r2"]["occupancy"] > 0.95
    assert read_z(tmp_path / "z.csv").shape == (100, 2)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A set of four distinct species with little noise and some junk, and its stack."""
    folder = tmp_path_factory.mktemp("species")
    settings = Settings(box_size=D, particles=900, pixel_size_a=12.0, snr=1.0, species=4, junk=0.1)
    simulate(settings, folder / "set")
    import_particles(folder / "set/particles.star", folder / "import", ImportOptions())
    preprocess(folder / "import", folder / "stack", PreprocessSettings(box_size_px=D))
    return folder / "set", folder / "stack"


def test_the_oracle_beats_the_consensus_where_states_differ(stacked):
    made, stack = stacked
    truth = read_truth(made)
    states = np.array([0, 1, 2, 3, 3])
    known = reference_scores(stack, truth, states)
    assert known["oracle"]["moving"] > known["consensus"]["moving"] + 0.03
    assert known["oracle"]["moving"] <= 7 / 16
    assert known["bandwidth"] < 0.3  # species are not neighbours of each other
    assert known["oracle_by_bandwidth"]["0"] == pytest.approx(known["oracle"]["moving"], abs=0.01)


def test_headroom_of_the_truth_is_one_or_more_and_of_the_consensus_none(stacked, tmp_path):
    made, stack = stacked
    truth = read_truth(made)
    for number, density in enumerate(truth.volumes):
        write_volume(tmp_path / f"vol_{number:03d}.mrc", density, 12.0)
    arguments = ["evaluate", str(tmp_path), "--truth", str(made), "--stack", str(stack)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "headroom" in result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["headroom"] >= 1
    assert headroom(metrics["references"]["consensus"]["moving"], 0.2, 0.1) is None
    assert headroom(0.3, 0.2, 0.4) == pytest.approx(0.5)


def test_a_stack_of_another_box_has_no_headroom(stacked, made):
    with pytest.raises(InputFormatError, match="not all in truth"):
        reference_scores(stacked[1], read_truth(made), np.array([0]))
    small = read_truth(stacked[0])
    cropped = type(small)(
        volumes=small.volumes[:, :8, :8, :8],
        coordinates=small.coordinates,
        states=small.states,
        particle_states=small.particle_states,
        table=small.table,
    )
    with pytest.raises(InputFormatError, match="--box-size 8"):
        reference_scores(stacked[1], cropped, np.array([0]))


def test_the_kernel_keeps_its_own_state_and_forgets_the_far_ones():
    distance = np.array([0.0, 0.05, 1.0])
    np.testing.assert_array_equal(kernel(distance, 0.0), [1, 0, 0])
    near = kernel(distance, 0.1)
    assert near[0] == 1
    assert near[1] == pytest.approx(np.exp(-0.125))
    assert near[2] == 0


def test_species_are_equal_or_different_but_never_close(stacked):
    truth = read_truth(stacked[0])
    np.testing.assert_array_equal(truth.distance(truth.states), 1 - np.eye(4))
    assert np.array_equal(truth.nearest_state(truth.particle_states), truth.table["species"])


def test_clusters_are_scored_against_the_species_without_junk(stacked, tmp_path):
    made = stacked[0]
    table = pd.read_parquet(made / "truth/truth.parquet").sample(frac=1, random_state=0)
    rng = np.random.default_rng(0)
    z = rng.normal(0, 0.05, (len(table), 2)) + np.stack([table["species"] % 2, table["species"] // 2], axis=1)
    run = write_run(tmp_path / "run", table["particle_id"].to_numpy(), z)
    assert "ari" not in evaluate(None, made, run=run)["latent"]  # not analysed
    (run / "analysis").mkdir()
    cluster = np.where(table["junk"], 0, 7 - table["species"])  # other names, and nonsense for junk
    for found, expected in ((cluster, 1.0), (rng.permutation(cluster), 0.0)):
        score = expected * table["junk"] + rng.random(len(table))
        columns = {"particle_id": table["particle_id"], "cluster": found, "junk_score": score}
        pd.DataFrame(columns).to_parquet(run / "analysis/particles.parquet")
        scores = evaluate(None, made, run=run)["latent"]
        assert scores["ari"]["species"] == pytest.approx(expected, abs=0.02)
        assert scores["r2"]["species"] > 0.97
        assert scores["junk_roc_auc"] == pytest.approx(0.5 + expected / 2, abs=0.15)


def test_the_interval_of_a_paired_gain_excludes_nothing_gained():
    rng = np.random.default_rng(6)
    base = rng.uniform(0.1, 0.4, size=100)
    mean, low, high = paired_gain(base + 0.03 + rng.normal(0, 0.02, size=100), base)
    assert low < mean < high
    assert 0 < low < 0.03 < high + 0.005
    assert high - low == pytest.approx(2 * 1.96 * 0.02 / 10, rel=0.3)
    _, low, high = paired_gain(base, rng.permutation(base))
    assert low < 0 < high
    with pytest.raises(ValueError, match="equal length"):
        paired_gain([], [])
