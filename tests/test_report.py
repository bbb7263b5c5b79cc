"""The report: one page that opens offline and says what there is, with figures and ChimeraX scripts."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_run import (
    BOX,
    NASTY_ID,
    blob_map,
    make_consensus,
    make_import,
    make_latent,
    make_run,
    make_stack,
    make_volumes,
    write_map,
)
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.runs import read_z
from cryodrgn_pipeline.landscape.analysis import AnalysisSettings, analyze_run
from cryodrgn_pipeline.report.collect import gather
from cryodrgn_pipeline.report.ellipses import ellipse
from cryodrgn_pipeline.report.figures import axis_range
from cryodrgn_pipeline.report.montage import difference_colours, grey_range, read_views
from cryodrgn_pipeline.report.page import ReportRequest, write_report
from cryodrgn_pipeline.report.rows import shown_rows
from cryodrgn_pipeline.report.summary import training_verdict
from cryodrgn_pipeline.report.tables import nearest_particles

SECTIONS = ["summary", "check", "fsc", "training", "latent", "volumes", "files", "run", "notes"]


class Page(HTMLParser):
    """The parts of a page that a browser acts on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.resources: list[str] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "data", "poster", "action"):
                self.resources.append(value or "")
            assert not name.startswith("on")
            if name == "style":
                self.styles.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        {"script": self.scripts, "style": self.styles}.get(self._inside, self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> dict:
        found = next(script for script in self.scripts if script.startswith("const DATA = "))
        return json.loads(found.removeprefix("const DATA = ").removesuffix(";"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and everything beside it, reported on by the command line."""
    base = tmp_path_factory.mktemp("report")
    run = make_run(base / "run")
    analyze_run(run, AnalysisSettings(clusters=6, points=4))
    make_consensus(base / "consensus", verdict="contradicted")
    make_volumes(base / "maps" / "centers", read_z(run / "analysis" / "centers.csv"))
    make_volumes(base / "maps" / "pc1", read_z(run / "analysis" / "traversal_pc1.csv"))
    make_import(base / "import")
    make_stack(base / "stack_24")
    arguments = ["report", str(run), "--consensus", str(base / "consensus"), "--title", "A & <b>title</b>"]
    arguments += ["--volumes", str(base / "maps" / "centers"), "--volumes", str(base / "maps" / "pc1")]
    arguments += ["--import-dir", str(base / "import")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.stdout.strip() == str(run / "report.html")
    return base


@pytest.fixture(scope="module")
def page(full: Path) -> Page:
    return Page((full / "run" / "report.html").read_text(encoding="utf-8"))


def test_the_page_has_every_section_and_the_navigation_reaches_it(page: Page):
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert {link.removeprefix("#") for link in page.resources if link.startswith("#")} == set(SECTIONS)


def test_the_page_asks_nothing_of_any_server(page: Page):
    assert all(link.startswith(("#", "data:")) for link in page.resources)
    assert len(page.resources) > 15
    for style in page.styles:
        assert "@import" not in style
        assert not re.search(r"url\(\s*['\"]?(?!data:)", style)
    ours = [script for script in page.scripts if "plotly.js v" not in script[:300]]
    assert len(ours) == 2
    assert len(page.scripts) == 3
    assert not any("http" in script for script in ours)


def test_names_from_files_cannot_become_markup(full: Path, page: Page):
    text = (full / "run" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "A & <b>title</b>" in page.text
    assert "particles <b>.star" in page.text
    assert NASTY_ID in make_latent(full / "other")["particle_id"].tolist()


def test_a_hostile_particle_name_at_a_cluster_centre_is_shown_as_text(tmp_path: Path):
    run = tmp_path / "<script>run"
    make_latent(run, n=1)
    analyze_run(run)
    text = write_report(ReportRequest(run=run)).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<script>run" not in text
    assert NASTY_ID in Page(text).text
    assert Page(text).data["latent"]["run"] == str(run)


def test_the_first_screen_gives_the_headline_numbers(page: Page):
    start = page.text.partition("Convention check")[0]
    for words in (
        "particles 240",
        "box 24 px",
        "4.25 Å/px",
        "11.8 Å",
        "contradicted",
        "epochs 8",
        "3 in use",
    ):
        assert words in start


def test_the_convention_check_shows_each_test_with_its_remedy(page: Page):
    assert "half maps agree to 11.8 Å as read and to 24.9 Å with transposed rotations" in page.text
    remedy = "datasets: NAME: conventions: transpose_rotations: true (import --transpose-rotations)"
    assert page.text.count(remedy) == 2
    assert "rotation transpose" in page.text
    assert "not determinable" in page.text


def test_aberrations_that_nothing_applies_are_said(page: Page):
    assert "beam tilt is not applied: 240 particles, up to 0.31 (phase error below 3 Å)" in page.text


def test_the_plots_hold_the_runs_numbers(page: Page, full: Path):
    latent = page.data["latent"]
    analysed = pd.read_parquet(full / "run" / "analysis" / "particles.parquet")
    for name in ("pc_1", "umap_2", "cluster", "junk_score"):
        drawn = np.frombuffer(base64.b64decode(latent["columns"][name]), dtype="<f4")
        np.testing.assert_allclose(drawn, analysed[name], rtol=1e-6)
    assert sum(latent["sizes"]) == 240
    assert page.data["loss"]["reconstruction"][1]["name"] == "held-out particles"
    assert len(page.data["loss"]["reconstruction"][1]["y"]) == 8
    assert [curve["name"] for curve in page.data["fsc"]["curves"]] == ["masked", "unmasked"]


def test_volumes_along_a_path_are_named_and_their_changes_drawn(page: Page):
    assert "k-means cluster centres" in page.text
    assert "along principal component 1" in page.text
    assert "vol_003.mrc − vol_000.mrc" in page.text
    pictures = [link for link in page.resources if link.startswith("data:image/png")]
    assert len(pictures) == 1 + 6 + 4 + 3 + 4 + 1  # consensus, centres, path, changes, glance, its change


@pytest.mark.parametrize("name", ["latent_pca", "latent_umap", "loss", "fsc", "montage", "difference_pc1"])
def test_every_figure_is_a_png_beside_the_page(full: Path, name: str):
    with Image.open(full / "run" / "report" / f"{name}.png") as figure:
        assert min(figure.size) > 200
        assert len(np.unique(np.asarray(figure.convert("L")))) > 5


def test_chimerax_scripts_open_the_maps_by_paths_relative_to_themselves(full: Path):
    folder = full / "run" / "report"
    opened = {}
    for script in sorted(folder.glob("*.cxc")):
        lines = script.read_text(encoding="utf-8").splitlines()
        targets = [line.split()[1] for line in lines if line.startswith("open ")]
        assert all(not Path(target).is_absolute() for target in targets)
        opened[script.stem] = sorted(path.resolve() for target in targets for path in folder.glob(target))
    assert opened["consensus"] == [(full / "consensus" / "map.mrc").resolve()]
    assert opened["volumes_centers"] == sorted((full / "maps" / "centers").resolve().glob("*.mrc"))
    assert opened["volumes_pc1"] == sorted((full / "maps" / "pc1").resolve().glob("*.mrc"))
    path = (folder / "volumes_pc1.cxc").read_text(encoding="utf-8")
    assert "vol_*.mrc vseries true" in path
    assert "vseries play #1 loop true direction oscillate" in path


def test_the_files_listed_exist_relative_to_the_page(full: Path, page: Page):
    for name in ("latent.parquet", "analysis/traversal_graph.csv", "report/volumes_pc1.cxc", "../maps/pc1"):
        assert f" {name} " in page.text
        assert (full / "run" / name).exists()
    assert "model.safetensors" not in page.text


def test_a_run_with_nothing_but_latents_is_reported_with_sentences_for_the_rest(tmp_path: Path):
    make_latent(tmp_path / "bare", n=30)
    page = Page(write_report(ReportRequest(run=tmp_path / "bare")).read_text(encoding="utf-8"))
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    for sentence in (
        "No consensus was given to this report",
        "No FSC",
        "no loss curves",
        "No analysis in the run folder",
        "No volumes were given",
        "No manifest",
    ):
        assert sentence in page.text
    assert page.data == {}
    assert list((tmp_path / "bare" / "report").iterdir()) == []


def test_an_empty_run_folder_still_gives_a_page_and_no_folder_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert write_report(ReportRequest(run=tmp_path / "empty")).is_file()
    with pytest.raises(InputFormatError, match="no such run folder"):
        write_report(ReportRequest(run=tmp_path / "nowhere"))


def test_a_named_folder_without_its_files_is_refused_and_leaves_no_page(tmp_path: Path):
    make_latent(tmp_path / "run", n=30)
    with pytest.raises(InputFormatError, match=r"consensus\.json: no such file"):
        write_report(ReportRequest(run=tmp_path / "run", consensus=tmp_path))
    with pytest.raises(InputFormatError, match=r"volumes\.parquet: no such file"):
        write_report(ReportRequest(run=tmp_path / "run", volumes=(tmp_path,)))
    assert not (tmp_path / "run" / "report.html").exists()


def test_volumes_inside_the_run_are_found_unnamed(tmp_path: Path):
    make_latent(tmp_path, n=30)
    make_volumes(tmp_path / "volumes" / "mine", np.zeros((2, 3), dtype=np.float32))
    CliRunner().invoke(app, ["report", str(tmp_path)], catch_exceptions=False)
    assert "(mine, 2 maps)" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_an_analysis_older_than_the_training_is_refused(tmp_path: Path):
    make_latent(tmp_path, n=60)
    analyze_run(tmp_path, AnalysisSettings(clusters=3, umap=False))
    make_latent(tmp_path, n=50)
    with pytest.raises(InputFormatError, match="60 rows are not the 50 particles"):
        gather(tmp_path)


def test_views_are_central_slices_and_projections_with_y_upwards(tmp_path: Path):
    density = np.zeros((BOX, BOX, BOX), dtype=np.float32)
    density[BOX // 2, BOX - 2, 3] = 1.0  # on the central z slice, high y, low x
    write_map(tmp_path / "map.mrc", density)
    views = read_views(tmp_path / "map.mrc")
    assert np.argwhere(views.slices[0]).tolist() == [[1, 3]]
    assert not views.slices[1].any()
    assert np.argwhere(views.projections[0]).tolist() == [[1, 3]]
    assert np.argwhere(views.projections[1]).tolist() == [[BOX - 1 - BOX // 2, 3]]
    assert np.argwhere(views.projections[2]).tolist() == [[BOX - 1 - BOX // 2, BOX - 2]]
    assert views.pixel_size_a == pytest.approx(4.25)


def test_a_grey_scale_is_common_to_all_its_images():
    low, high = grey_range([np.zeros((50, 50)), np.linspace(0, 10, 2500).reshape(50, 50)])
    assert low == pytest.approx(0)
    assert 9.5 < high <= 10
    assert grey_range([np.ones((4, 4))]) == (1.0, 2.0)


def test_gained_density_is_red_and_lost_density_blue():
    change = blob_map(0.0)[BOX // 2] - blob_map(90.0)[BOX // 2]
    colours = difference_colours(change, float(np.abs(change).max())).astype(int)
    scale = colours.shape[0] / BOX
    gained = tuple(
        (np.array(np.unravel_index(change.argmax(), change.shape)) * scale + scale / 2).astype(int)
    )
    lost = tuple((np.array(np.unravel_index(change.argmin(), change.shape)) * scale + scale / 2).astype(int))
    assert colours[gained][0] > colours[gained][2] + 50
    assert colours[lost][2] > colours[lost][0] + 50


def test_particles_are_counted_by_their_nearest_map():
    counts, distance = nearest_particles(np.array([[0.0], [10.0]]), np.array([[1.0], [2.0], [3.0], [9.5]]))
    assert counts.tolist() == [3, 1]
    np.testing.assert_allclose(distance, [1.0, 0.5])


@pytest.mark.parametrize(
    ("losses", "tone", "words"),
    [
        ([2.0, 1.5, 1.2, 1.1, 1.05, 1.04, 1.04, 1.04, 1.04, 1.04], "good", "levelled off"),
        ([2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1], "open", "still fell"),
        ([2.0, 1.5, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "bad", "lowest in epoch 3"),
        ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "bad", "never fell"),
        ([2.0, 1.0], "open", "too few"),
    ],
)
def test_the_training_is_judged_by_its_held_out_loss(losses: list[float], tone: str, words: str):
    metrics = [{"epoch": i + 1, "held_out_reconstruction": loss} for i, loss in enumerate(losses)]
    found = training_verdict(metrics)
    assert found[0] == tone
    assert words in found[1]


def test_many_particles_are_drawn_as_a_random_part_in_source_order():
    rows = shown_rows(120_000)
    assert len(rows) == 50_000
    assert (np.diff(rows) > 0).all()
    assert rows.mean() == pytest.approx(60_000, rel=0.02)
    assert shown_rows(7).tolist() == list(range(7))


def test_a_few_far_particles_do_not_squeeze_the_axes():
    values = np.r_[np.random.default_rng(0).normal(0, 1, 1000), 500.0]
    low, high = axis_range(values)
    assert -5 < low < -2
    assert 2 < high < 5
    assert axis_range(np.zeros(5)) == (-1.0, 1.0)


def test_the_notebook_opens_a_run_decodes_a_volume_and_writes_ids(tmp_path: Path, monkeypatch):
    from cryodrgn_pipeline.io.checkpoints import MODEL_FILE, TrainedModel, save_model
    from cryodrgn_pipeline.models.vae import Vae, VaeConfig

    make_latent(tmp_path)
    analyze_run(tmp_path, AnalysisSettings(clusters=4, umap=False))
    small = {"encoder_width": 8, "encoder_layers": 1, "decoder_width": 8, "decoder_layers": 1}
    vae = Vae(VaeConfig(box_size_px=16, latent_dim=3, **small))
    save_model(tmp_path / MODEL_FILE, TrainedModel(vae=vae, scale=1.0, pixel_size_a=4.0))
    monkeypatch.setenv("CRYODRGN_RUN", str(tmp_path))
    notebook = Path(__file__).parents[1] / "notebooks" / "explore_run.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert read_views(tmp_path / "notebook" / "particle_0.mrc").box_size_px == 16
    written = (tmp_path / "notebook" / "chosen.txt").read_text().splitlines()
    assert written == [str(particle) for particle in names["chosen"]]
    assert 0 < len(written) < 240


def test_a_consistent_check_names_what_it_could_not_decide(tmp_path: Path):
    make_latent(tmp_path, n=30)
    consensus = make_consensus(tmp_path / "consensus")
    page = write_report(ReportRequest(run=tmp_path, consensus=consensus)).read_text(encoding="utf-8")
    assert (
        "Conventions: consistent. As read, the particles agree with their images. Not determinable: hand."
        in (Page(page).text)
    )


def make_subspace_run(run: Path, kept: int) -> Path:
    """A run as `train --method subspace` leaves it: 3 components tried, `kept` of them supported."""
    latent = make_latent(run)
    n = len(latent)
    for j in range(kept, 3):
        latent[f"z_{j}"] = np.zeros(n, dtype=np.float32)
        latent[f"std_{j}"] = np.zeros(n, dtype=np.float32)
    rng = np.random.default_rng(0)
    if kept > 1:
        latent["cov_1_0"] = np.full(n, 0.02, dtype=np.float32)
    latent["contrast"] = rng.normal(1, 0.05, n).astype(np.float32)
    latent["log_evidence"] = rng.normal(40, 4, n).astype(np.float32)
    latent.to_parquet(run / "latent.parquet", index=False)
    evidence = [60.0, 90.0, 100.0, 100.2]
    records = [
        {"epoch": i + 1, "reconstruction": 1 - i / 10, "evidence": value, "level_px": 24}
        for i, value in enumerate(evidence)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    manifest = {
        "method": "subspace",
        "n_particles": n,
        "components": kept,
        "settings": {"max_components": 3},
        "held_out_gain": [{"mean": 2.5 * (i < kept), "standard_error": 0.25} for i in range(3)],
        "contrast_spread": 0.05,
        "noise_images": 7,
        "training_seconds": 61,
        "device": "cpu",
    }
    (run / "run.json").write_text(json.dumps(manifest))
    analyze_run(run, AnalysisSettings(clusters=4, umap=False, points=3))
    return run


@pytest.mark.parametrize("default", [False, True])
def test_a_run_without_a_network_is_reported_in_its_own_words(tmp_path: Path, default: bool):
    run = make_subspace_run(tmp_path, kept=2)
    if default:
        manifest = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(manifest | {"method": "vae", "decoder": "kernel"}))
    page = Page(write_report(ReportRequest(run=run)).read_text(encoding="utf-8"))
    for words in (
        "iterations 4",
        "components 2 of 3",
        "2 of 3 components are supported by held-out images. The last one kept adds 2.50 ± 0.25 to the log "
        "evidence of an image, the next 0.00 ± 0.25.",
        "the log evidence has settled",
        "7 of 240 are likelier noise alone",
        "spreads by 5.0 %",
    ):
        assert words in page.text
    assert "epochs" not in page.text.partition("Convention check")[0]
    assert "plot-kld" not in page.ids
    assert page.data["loss"]["step"] == "iteration"
    assert sum(page.data["contrast"]["counts"]) == 240
    assert {"log_evidence", "contrast"} <= set(page.data["latent"]["columns"])
    assert "z_2" not in page.data["latent"]["axes"]  # idle
    with Image.open(run / "report" / "contrast.png") as figure:
        assert min(figure.size) > 200


def test_a_subspace_run_without_a_component_above_noise_says_so_first(tmp_path: Path):
    run = make_subspace_run(tmp_path, kept=0)
    make_volumes(run / "volumes" / "pc1", read_z(run / "analysis" / "traversal_pc1.csv"))
    request = ReportRequest(run=run, volumes=(run / "volumes" / "pc1",))
    page = Page(write_report(request).read_text(encoding="utf-8"))
    first = page.text.partition("Convention check")[0]
    assert "none of 3 is above noise" in first
    assert "all volumes are the mean map" in first
    assert "none above noise" in first
    assert "uncertainty" not in page.data["latent"]
    assert page.data["latent"]["axes"] == ["pc_1", "pc_2"]


def test_the_ellipse_of_a_particle_is_its_posterior_seen_in_the_plane_of_the_plot(tmp_path: Path):
    gathered = gather(make_subspace_run(tmp_path, kept=2))
    sure = gathered.uncertainty
    assert sure is not None
    whole = np.array([[0.04, 0.02], [0.02, 0.04]])
    np.testing.assert_allclose(sure.typical, whole, rtol=1e-5)
    np.testing.assert_allclose(sure.in_plane(sure.centers[0], "z_0", "z_1"), whole, rtol=1e-5)
    drawn = np.random.default_rng(0).multivariate_normal([0, 0], whole, 200_000)
    components = np.array(gathered.analysis["pc_components"])[:2, :2]
    seen = sure.in_plane(sure.typical, "pc_2", "pc_1")
    np.testing.assert_allclose(seen, np.cov((drawn @ components.T)[:, ::-1].T), rtol=0.05, atol=5e-4)
    width, height, angle_deg = ellipse(whole)
    assert (width, height) == pytest.approx((2 * 0.06**0.5, 2 * 0.02**0.5))
    assert angle_deg % 180 == pytest.approx(45)


def test_the_page_carries_the_ellipses_of_particles_only_while_it_stays_small(tmp_path: Path, monkeypatch):
    run = make_subspace_run(tmp_path, kept=2)
    page = Page(write_report(ReportRequest(run=run)).read_text(encoding="utf-8"))
    spread = page.data["latent"]["uncertainty"]
    np.testing.assert_allclose(spread["typical"], [0.04, 0.02, 0.04], rtol=1e-5)
    assert len(spread["centers"]) == len(page.data["latent"]["sizes"])
    assert len(base64.b64decode(spread["particles"])) == 240 * 3 * 4
    assert "red, that of the particle under the pointer" in page.text
    monkeypatch.setattr("cryodrgn_pipeline.report.plots.HOVERED_AT_MOST", 100)
    page = Page(write_report(ReportRequest(run=run)).read_text(encoding="utf-8"))
    assert page.data["latent"]["uncertainty"]["particles"] is None
    assert "under the pointer" not in page.text
    assert "A UMAP has no such ellipse" in page.text


def test_volumes_outside_the_region_of_particles_are_marked(tmp_path: Path):
    make_latent(tmp_path)
    folder = make_volumes(tmp_path / "volumes" / "mine", np.zeros((3, 3), dtype=np.float32))
    table = pd.read_parquet(folder / "volumes.parquet")
    table.assign(inside=[True, False, True], latent_density=[1.0, 1e-5, 2.0]).to_parquet(
        folder / "volumes.parquet"
    )
    page = Page(write_report(ReportRequest(run=tmp_path, volumes=(folder,))).read_text(encoding="utf-8"))
    assert "1 of 3 maps of “mine” lie outside the region of particles" in page.text
    marked = [word for word in page.words if "outside the region of particles" in word]
    assert len(marked) == 2  # the finding and the one caption
    assert "001 (outside)" in page.text
