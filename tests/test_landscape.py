"""The latent's analysis: embeddings, clusters, junk scores and paths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from tiny_run import make_latent
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.io.runs import read_covariances, read_latents, read_metrics, read_z
from cryodrgn_pipeline.landscape.analysis import AnalysisSettings, analyze_run
from cryodrgn_pipeline.landscape.cluster import distinct_groups, kmeans_centers
from cryodrgn_pipeline.landscape.density import inside_region, latent_region
from cryodrgn_pipeline.landscape.embed import principal_components, umap_embedding
from cryodrgn_pipeline.landscape.outliers import junk_scores, robust_z_score
from cryodrgn_pipeline.landscape.traverse import direct_traversal, graph_traversal, pc_traversal, snap

FAST = AnalysisSettings(clusters=6, umap=False)


def blobs(n_each: int = 40) -> np.ndarray:
    """Three well separated blobs at x = 10, 0, 20, in that order of rows."""
    rng = np.random.default_rng(3)
    means = np.array([[10.0, 0, 0], [0, 0, 0], [20.0, 0, 0]])
    return np.concatenate([rng.normal(mean, 0.3, (n_each, 3)) for mean in means]).astype(np.float32)


def test_kmeans_finds_the_blobs_and_orders_them_along_the_main_axis():
    z = blobs()
    centers, labels, rows = kmeans_centers(z, 3, seed=0)
    np.testing.assert_array_equal(labels.reshape(3, 40), [[1] * 40, [0] * 40, [2] * 40])
    np.testing.assert_allclose(centers[:, 0], [0, 10, 20], atol=0.5)
    np.testing.assert_array_equal(z[rows], centers)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 30), dims=st.integers(1, 4), clusters=st.integers(1, 12), distinct=st.integers(1, 30),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_kmeans_center_is_a_member_of_its_own_cluster(n, dims, clusters, distinct, seed):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(distinct, dims)).astype(np.float32)[rng.integers(0, distinct, n)]
    centers, labels, rows = kmeans_centers(z, clusters, seed)
    assert 1 <= len(centers) <= min(clusters, n)
    assert sorted(set(labels.tolist())) == list(range(len(centers)))
    np.testing.assert_array_equal(labels[rows], np.arange(len(centers)))
    np.testing.assert_array_equal(z[rows], centers)


def test_kmeans_gives_the_same_result_twice():
    z = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    first, second = kmeans_centers(z, 10, seed=5), kmeans_centers(z, 10, seed=5)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_distinct_groups_are_found_with_their_number():
    rng = np.random.default_rng(8)
    means = rng.normal(size=(5, 4)) * [6, 6, 6, 0.01]
    truth = np.repeat(np.arange(5), [400, 300, 200, 100, 60])
    z = means[truth] + rng.normal(size=(len(truth), 4)) * [1, 0.5, 0.5, 0.01]
    junk = rng.normal(size=(200, 4)) * 8  # asked for a group, makes none
    labels = distinct_groups(np.concatenate([z, junk]), np.arange(1260) < 1060)
    assert labels is not None
    assert adjusted_rand_score(truth, labels[:1060]) > 0.99


def test_groups_have_no_finer_structure_than_particles_are_uncertain_by():
    rng = np.random.default_rng(10)
    truth = np.repeat(np.arange(4), 500)
    scatter = rng.choice([0.02, 0.2], size=(2000, 1)) * rng.normal(size=(2000, 3))  # a core and a halo each
    z = 3 * rng.normal(size=(4, 3))[truth] + scatter
    everyone = np.ones(2000, dtype=bool)
    labels = distinct_groups(z, everyone, std=np.full((2000, 3), 0.4))
    assert labels is not None
    assert adjusted_rand_score(truth, labels) > 0.99
    exact = distinct_groups(z, everyone)
    assert exact is None or len(np.unique(exact)) > 4


@pytest.mark.parametrize("shape", ["line", "cloud", "arc", "two states that each move", "one point"])
def test_a_continuum_is_not_taken_for_groups(shape):
    rng = np.random.default_rng(9)
    along = rng.uniform(-1, 1, size=2000)
    z = {
        "line": np.stack([5 * along, 0 * along, 0 * along], axis=1),
        "cloud": 3 * rng.normal(size=(2000, 3)),
        "arc": np.stack([5 * np.cos(2 * along), 5 * np.sin(2 * along), 0 * along], axis=1),
        "two states that each move": np.stack([8 * along, 4 * (rng.random(2000) < 0.5), 0 * along], axis=1),
        "one point": np.zeros((2000, 3)),
    }[shape]
    noise = 0.0 if shape == "one point" else 0.4
    assert distinct_groups(z + noise * rng.normal(size=z.shape), np.ones(2000, dtype=bool)) is None


def test_kmeans_refuses_a_latent_with_nan():
    z = blobs()
    z[7, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 120 rows"):
        kmeans_centers(z, 3)


def test_principal_components_rebuild_the_latent_and_order_its_variance():
    z = np.random.default_rng(0).normal(size=(200, 4)) * [1, 5, 0.2, 2]
    pca = principal_components(z)
    np.testing.assert_allclose(pca.mean + pca.scores @ pca.components, z, atol=1e-5)
    assert np.all(np.diff(pca.explained_variance_ratio) <= 0)
    assert pca.explained_variance_ratio.sum() == pytest.approx(1)
    assert np.abs(pca.components[0]).argmax() == 1


def test_a_collapsed_latent_is_analysed_without_a_division_by_zero():
    pca = principal_components(np.zeros((30, 3)))
    assert np.isfinite(pca.scores).all()
    assert not pca.explained_variance_ratio.any()
    assert umap_embedding(np.zeros((30, 3))) is None


def test_umap_keeps_blobs_apart_and_repeats_itself():
    z = blobs()
    umap = umap_embedding(z, seed=1)
    np.testing.assert_array_equal(umap, umap_embedding(z, seed=1))
    means = umap.reshape(3, 40, 2).mean(axis=1)
    spread = umap.reshape(3, 40, 2).std(axis=1).max()
    assert min(np.linalg.norm(means[i] - means[j]) for i, j in [(0, 1), (0, 2), (1, 2)]) > 2 * spread


def test_particles_beyond_the_umap_limit_are_placed_among_their_neighbours():
    z = blobs()
    umap = umap_embedding(z, seed=1, fit_at_most=60)
    centre = umap.reshape(3, 40, 2).mean(axis=1)
    nearest = np.linalg.norm(umap[:, None] - centre[None], axis=2).argmin(axis=1)
    assert (nearest.reshape(3, 40) == [[0], [1], [2]]).mean() == 1


def test_a_pc_traversal_runs_between_the_percentiles_and_leaves_other_components_alone():
    z = np.random.default_rng(0).normal(size=(5000, 3)) * [4, 1, 0.5]
    pca = principal_components(z)
    path = pc_traversal(pca, 1, latent_region(z), n=7)
    along = (path - pca.mean) @ pca.components.T
    np.testing.assert_allclose(along[[0, -1], 0], np.percentile(pca.scores[:, 0], [5, 95]), atol=1e-4)
    np.testing.assert_allclose(along[:, 1:], 0, atol=0.15)
    np.testing.assert_allclose(np.diff(along[:, 0], n=2), 0, atol=1e-4)


def arc(n: int = 3000) -> np.ndarray:
    """A half circle of radius 1 in the plane of z_0 and z_1, thickness 0.05, and an idle z_2."""
    rng = np.random.default_rng(5)
    angle = rng.uniform(0, np.pi, n)
    z = np.stack([np.cos(angle), np.sin(angle), np.zeros(n)], axis=1)
    z[:, :2] += rng.normal(0, 0.05, (n, 2))
    return z.astype(np.float32)


def test_a_pc_traversal_bends_with_the_particles():
    z = arc()
    region, pca = latent_region(z), principal_components(z)
    path = pc_traversal(pca, 1, region, n=9)
    assert len(path) == 9
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), 1, atol=0.05)
    assert region.inside(path).all()
    assert not region.inside(pca.mean[None])[0]  # where the straight line passes
    score = (path - pca.mean) @ pca.components[0]
    np.testing.assert_allclose(np.diff(score, n=2), 0, atol=1e-4)


def test_a_pc_traversal_across_two_branches_stays_on_one():
    z = arc()
    region = latent_region(z)
    path = pc_traversal(principal_components(z), 2, region, n=9)
    assert region.inside(path).all()
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), 1, atol=0.15)
    upright = path[np.abs(path[:, 0]) > 0.4]
    assert len(upright) >= 4
    assert len(set(np.sign(upright[:, 0]).tolist())) == 1


def test_a_pc_traversal_over_a_gap_has_no_point_in_it():
    z = np.concatenate([blobs(200), blobs(200) + np.float32([0, 0, 0.1])])
    region = latent_region(z)
    path = pc_traversal(principal_components(z), 1, region, n=12)
    assert region.inside(path).all()
    assert np.abs(path[:, :1] - [[0, 10, 20]]).min(axis=1).max() < 1.5
    assert len(np.unique(path, axis=0)) == len(path)


def test_a_pc_traversal_along_an_idle_coordinate_is_one_point():
    z = arc()
    path = pc_traversal(principal_components(z), 3, latent_region(z), n=9)
    assert path.shape == (1, 3)


@pytest.mark.parametrize("extra_idle_columns", [0, 5])
def test_the_region_holds_99_of_100_particles_whatever_idle_coordinates_there_are(extra_idle_columns):
    z = np.random.default_rng(2).normal(size=(4000, 3))
    z = np.pad(z, ((0, 0), (0, extra_idle_columns)))
    fresh = np.pad(np.random.default_rng(3).normal(size=(4000, 3)), ((0, 0), (0, extra_idle_columns)))
    inside, density = inside_region(z, fresh)
    assert inside.mean() == pytest.approx(0.99, abs=0.005)
    assert np.median(density) == pytest.approx(1, rel=0.2)
    far = np.zeros((3, 3 + extra_idle_columns))
    far[:, 0] = [0, 3, 9]
    inside, density = inside_region(z, far)
    assert inside.tolist() == [True, True, False]
    expected = np.exp(-0.5 * far[1, 0] ** 2)  # of a normal distribution, relative to its middle
    assert density[1] / density[0] == pytest.approx(expected, rel=0.9)
    assert density[2] < 1e-2 * density[1]


def test_a_far_state_with_many_particles_is_inside_and_a_lone_particle_is_not():
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(size=(3000, 2)), rng.normal([40, 0], 0.5, (60, 2)), [[0, 40.0]]])
    inside, _ = inside_region(z, np.array([[40.0, 0], [0, 40], [20, 0]]))
    assert inside.tolist() == [True, False, False]


def test_the_region_of_a_collapsed_latent_is_its_point():
    inside, density = inside_region(np.zeros((50, 4)), np.array([[0.0] * 4, [0, 0, 0, 1e-3]]))
    assert inside.tolist() == [True, False]
    assert np.isfinite(density).all()
    assert inside_region(np.ones((1, 2)), np.ones((1, 2)))[0].tolist() == [True]


def test_a_region_of_many_particles_is_that_of_a_random_part(monkeypatch):
    z = np.random.default_rng(2).normal(size=(8000, 3))
    whole = latent_region(z)
    monkeypatch.setattr("cryodrgn_pipeline.landscape.density.FIT_AT_MOST", 2000)
    part = latent_region(z)
    assert len(part.points) == 2000
    points = np.random.default_rng(4).normal(size=(2000, 3)) * 2
    assert (part.inside(points) == whole.inside(points)).mean() > 0.9


def test_far_out_particles_do_not_turn_the_first_component_towards_themselves():
    z = np.random.default_rng(0).normal(size=(1000, 3)) * [3, 1, 0.5]
    z[:8, 2] = 1000
    pca = principal_components(z)
    assert abs(pca.components[0, 0]) > 0.99
    assert np.abs(pca.scores[:8]).max() > 900
    np.testing.assert_allclose(pca.mean + pca.scores @ pca.components, z, atol=1e-3)


def test_snapped_points_are_particles():
    z = blobs()
    snapped, rows = snap(np.array([[0.1, 0, 0], [0.1, 0, 0], [19.0, 0, 0]]), z)
    np.testing.assert_array_equal(snapped, z[rows])
    assert len(rows) == 2


def test_a_direct_traversal_is_straight_and_passes_its_anchors():
    path = direct_traversal(np.array([[0.0, 0], [3, 0], [3, 1]]), n=5)
    np.testing.assert_allclose(path, [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]])


def test_a_graph_traversal_follows_the_data_where_a_straight_line_would_leave_them():
    angle = np.linspace(0, np.pi, 200)
    z = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    path, rows = graph_traversal(z, np.array([0, 199]), n=9)
    assert rows[0] == 0
    assert rows[-1] == 199
    assert np.all(np.diff(rows) > 0)
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), 1, atol=1e-5)
    straight = direct_traversal(z[[0, 199]], n=9)
    assert np.linalg.norm(straight, axis=1).min() < 0.2


def test_a_graph_traversal_prefers_the_dense_way_round_to_a_sparse_shortcut():
    angle = np.linspace(0, np.pi, 200)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    z = np.concatenate([ring, [[0.33, 0.0], [-0.33, 0.0]]]).astype(np.float32)
    _, rows = graph_traversal(z, np.array([0, 199]), n=20)
    assert rows.max() == 199
    assert len(rows) > 10


def test_a_graph_traversal_connects_separate_blobs():
    z = blobs()
    _, rows = graph_traversal(z, np.array([45, 100]), n=10)
    assert rows[0] == 45
    assert rows[-1] == 100


def test_a_graph_of_far_apart_blobs_has_no_more_edges_than_one_of_near_ones(monkeypatch):
    import sklearn.neighbors

    asked = []

    def counted(points, neighbours, **options):
        asked.append(neighbours)
        return kneighbors_graph(points, neighbours, **options)

    kneighbors_graph = sklearn.neighbors.kneighbors_graph
    monkeypatch.setattr(sklearn.neighbors, "kneighbors_graph", counted)
    rows = graph_traversal(blobs(), np.array([45, 100]), n=30)[1]
    assert asked == [10]
    assert [(row // 40) for row in rows[[0, -1]]] == [1, 2]
    assert 0 in rows // 40  # by way of the blob between them
    twins = np.repeat([[0.0, 0.0], [1.0, 0.0]], 30, axis=0)
    assert graph_traversal(twins, np.array([0, 59]))[0].tolist() == [[0, 0], [1, 0]]


def test_robust_scores_ignore_the_outliers_they_measure():
    values = np.r_[np.random.default_rng(0).normal(10, 2, 2000), [1e6] * 50]
    score = robust_z_score(values)
    assert np.abs(score[:2000]).max() < 5
    assert score[:2000].std() == pytest.approx(1, abs=0.1)
    assert score[2000:].min() > 1e4
    assert not robust_z_score(np.ones(5)).any()


def test_junk_is_flagged_by_loss_alone_by_norm_alone_and_when_the_loss_is_not_a_number():
    rng = np.random.default_rng(0)
    z, loss = rng.normal(size=(300, 4)), rng.normal(1, 0.1, 300)
    z[0] = 40.0
    loss[1] = 9.0
    loss[2] = np.nan
    junk = junk_scores(z, loss)
    assert np.flatnonzero(junk.flagged).tolist() == [0, 1, 2]
    assert np.flatnonzero(junk_scores(z, None).flagged).tolist() == [0]
    assert junk.score.min() >= 0


def evidence_of(rng: np.random.Generator, junk: np.ndarray) -> np.ndarray:
    """Log evidence as a subspace run leaves it: a factor of 3 among particles, about −10 for debris."""
    good = 40 * np.exp(rng.normal(0, 0.5, len(junk)))
    return np.where(junk, rng.normal(-12, 5, len(junk)), good).astype(np.float32)


def test_debris_is_flagged_by_its_evidence_where_loss_and_norm_say_nothing():
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=3000) < 0.1
    z, loss = rng.normal(size=(3000, 4)), rng.normal(1, 0.1, 3000)
    evidence = evidence_of(rng, truth)
    flagged = junk_scores(z, loss, log_evidence=evidence).flagged
    assert flagged[truth].mean() > 0.97
    assert flagged[~truth].mean() < 0.01
    assert junk_scores(z, loss).flagged.mean() < 0.01
    assert junk_scores(z, None, log_evidence=np.r_[evidence[:-1], np.nan]).flagged[-1]


def test_debris_about_z_0_makes_no_region_of_particles(tmp_path: Path):
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 1000)
    z = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    truth = np.arange(1000) < 100
    z[truth] = rng.normal(0, 0.05, (100, 2))
    table = {"particle_id": np.arange(1000), "z_0": z[:, 0], "z_1": z[:, 1]}
    pd.DataFrame(table | {"log_evidence": evidence_of(rng, truth)}).to_parquet(tmp_path / "latent.parquet")
    summary = analyze_run(tmp_path, AnalysisSettings(clusters=9, umap=False, points=7))
    centers = pd.read_parquet(tmp_path / "analysis" / "centers.parquet")
    middle = np.hypot(centers["z_0"], centers["z_1"]) < 0.5
    assert middle.sum() >= 1
    assert (centers["inside"] == ~middle).all()
    assert "evidence_score" in pd.read_parquet(tmp_path / "analysis" / "particles.parquet")
    straight = read_z(tmp_path / "analysis" / "traversal_direct.csv")
    assert 3 in summary["outside_region"]["direct"]  # the chord's middle
    assert np.linalg.norm(straight[3]) < 0.5
    assert "graph" not in summary["outside_region"]
    assert not {"pc1", "pc2"} & set(summary["outside_region"])


def test_paths_are_not_laid_to_a_cluster_of_outliers(tmp_path: Path):
    latent = make_latent(tmp_path)
    analyze_run(tmp_path, AnalysisSettings(clusters=6, umap=False))
    centers = pd.read_parquet(tmp_path / "analysis" / "centers.parquet").set_index("particle_id")
    outliers = centers.index.isin(latent["particle_id"][-5:])
    assert outliers.sum() == 1
    assert not centers["inside"][outliers].any()
    for name in ("direct", "graph"):
        assert read_z(tmp_path / "analysis" / f"traversal_{name}.csv")[:, 2].max() < 5


def test_a_run_that_kept_no_component_is_analysed(tmp_path: Path):
    columns = {f"{name}_{j}": np.zeros(60, np.float32) for name in ("z", "std") for j in range(3)}
    rng = np.random.default_rng(0)
    columns["log_evidence"] = evidence_of(rng, np.zeros(60, dtype=bool))
    pd.DataFrame({"particle_id": np.arange(60)} | columns).to_parquet(tmp_path / "latent.parquet")
    summary = analyze_run(tmp_path)
    assert summary["n_clusters"] == 1
    assert summary["outside_region"] == {}
    for name in ("pc1", "pc2", "direct", "graph"):
        assert read_z(tmp_path / "analysis" / f"traversal_{name}.csv").tolist() == [[0, 0, 0]]


def test_covariances_are_read_whole_with_or_without_their_off_diagonal(tmp_path: Path):
    columns = {"particle_id": [1, 2], "z_0": [0.0, 1], "z_1": [0.0, 1], "std_0": [1.0, 2], "std_1": [3.0, 4]}
    pd.DataFrame(columns).to_parquet(tmp_path / "latent.parquet")
    np.testing.assert_allclose(read_covariances(tmp_path), [np.diag([1, 9]), np.diag([4, 16])])
    pd.DataFrame(columns | {"cov_1_0": [0.5, -2.0]}).to_parquet(tmp_path / "latent.parquet")
    np.testing.assert_allclose(read_covariances(tmp_path, np.array([1])), [[[4, -2], [-2, 16]]])
    pd.DataFrame({"particle_id": [1], "z_0": [0.0]}).to_parquet(tmp_path / "latent.parquet")
    assert read_covariances(tmp_path) is None


@pytest.mark.parametrize("ids", ["star", "cs"])
def test_analyze_writes_the_tables_of_the_contract(tmp_path: Path, ids: str):
    latent = make_latent(tmp_path / "run", ids=ids)
    result = CliRunner().invoke(
        app, ["analyze", str(tmp_path / "run"), "--clusters", "6", "--pcs", "2", "--points", "5"],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.stdout.strip() == str(tmp_path / "run" / "analysis")
    folder = tmp_path / "run" / "analysis"
    table = pd.read_parquet(folder / "particles.parquet")
    assert table["particle_id"].tolist() == latent["particle_id"].tolist()
    assert {"cluster", "junk_score", "junk", "pc_1", "pc_2", "pc_3", "umap_1", "umap_2"} <= set(table.columns)
    assert np.flatnonzero(table["junk"]).tolist() == list(range(235, 240))
    centers = pd.read_parquet(folder / "centers.parquet")
    assert centers["n"].sum() == 240
    at_center = latent.set_index("particle_id").loc[centers["particle_id"], ["z_0", "z_1", "z_2"]]
    np.testing.assert_array_equal(at_center.to_numpy(), centers[["z_0", "z_1", "z_2"]].to_numpy())
    np.testing.assert_allclose(read_z(folder / "centers.csv"), at_center.to_numpy(), rtol=1e-6)
    assert (folder / "centers.csv").read_text().splitlines()[0] == "z_0,z_1,z_2"
    for name in ("pc1", "pc2", "direct"):
        assert read_z(folder / f"traversal_{name}.csv").shape == (5, 3)
    assert json.loads((folder / "analysis.json").read_text())["n_junk"] == 5


def test_analyze_repeats_itself_to_the_byte(tmp_path: Path):
    make_latent(tmp_path / "run")
    written = []
    for _ in range(2):
        analyze_run(tmp_path / "run", AnalysisSettings(clusters=5))
        files = sorted((tmp_path / "run" / "analysis").iterdir())
        written.append({path.name: path.read_bytes() for path in files})
    assert written[0] == written[1]


def test_analyze_again_with_fewer_components_leaves_no_stale_traversal_and_keeps_the_users_files(tmp_path):
    make_latent(tmp_path)
    analyze_run(tmp_path, AnalysisSettings(clusters=4, umap=False, pcs=3))
    (tmp_path / "analysis" / "mine.txt").write_text("1\n")
    analyze_run(tmp_path, AnalysisSettings(clusters=4, umap=False, pcs=1))
    names = {path.name for path in (tmp_path / "analysis").iterdir()}
    assert "traversal_pc3.csv" not in names
    assert {"traversal_pc1.csv", "mine.txt"} <= names


def test_a_run_of_five_particles_is_analysed_without_umap(tmp_path: Path):
    make_latent(tmp_path, n=5)
    summary = analyze_run(tmp_path, AnalysisSettings())
    assert summary["n_clusters"] <= 5
    assert summary["umap"] is False


def test_one_particle_alone_is_analysed(tmp_path: Path):
    make_latent(tmp_path, n=1)
    assert analyze_run(tmp_path)["n_clusters"] == 1


def test_paths_pass_the_clusters_asked_for(tmp_path: Path):
    make_latent(tmp_path)
    analyze_run(tmp_path, AnalysisSettings(clusters=6, umap=False, through=(4, 1), points=6))
    centers = read_z(tmp_path / "analysis" / "centers.csv")
    for name in ("direct", "graph"):
        path = read_z(tmp_path / "analysis" / f"traversal_{name}.csv")
        np.testing.assert_allclose(path[[0, -1]], centers[[4, 1]], rtol=1e-6)
    with pytest.raises(ConfigError, match="no cluster 6; there are 0 to 5"):
        analyze_run(tmp_path, AnalysisSettings(clusters=6, umap=False, through=(0, 6)))


def test_a_umap_of_too_few_particles_is_refused():
    with pytest.raises(ConfigError, match="--umap-max 3: at least 20"):
        AnalysisSettings(umap_fit_at_most=3)


def test_a_missing_latent_table_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(InputFormatError, match=r"latent\.parquet: no such file; train"):
        analyze_run(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.assign(z_1=np.nan), "not finite in 240 of 240 rows"),
        (lambda t: t.assign(particle_id="same"), "repeats in 239 of 240 rows"),
        (lambda t: t.drop(columns=["z_0", "z_1", "z_2"]), "columns particle_id and z_0"),
        (lambda t: t.iloc[:0], "no rows"),
    ],
)
def test_a_damaged_latent_table_is_refused_with_what_is_wrong(tmp_path: Path, damage, message: str):
    damage(make_latent(tmp_path)).to_parquet(tmp_path / "latent.parquet", index=False)
    with pytest.raises(InputFormatError, match=message):
        read_latents(tmp_path)


def test_a_truncated_latent_table_is_refused(tmp_path: Path):
    make_latent(tmp_path)
    whole = (tmp_path / "latent.parquet").read_bytes()
    (tmp_path / "latent.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputFormatError, match="not a readable Parquet table"):
        read_latents(tmp_path)


def test_metrics_survive_a_line_cut_short_and_count_a_repeated_epoch_once(tmp_path: Path):
    lines = [{"kind": "epoch", "epoch": e, "loss": loss} for e, loss in [(1, 3.0), (2, 2.0), (2, 2.5)]]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "epo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [record["loss"] for record in read_metrics(tmp_path)] == [3.0, 2.5]
