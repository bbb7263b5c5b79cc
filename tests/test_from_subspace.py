"""Models that start from the default one, and new images in trained models: by the product's own commands."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import mrcfile
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from blobs import rotations
from safetensors.torch import load_file
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import ConfigError, InputFormatError, Interrupted
from cryodrgn_pipeline.fourier.slices import extract_slices, slice_coordinates, volume_grid
from cryodrgn_pipeline.fourier.transforms import half_plane_coefficients
from cryodrgn_pipeline.fourier_images import FourierImages
from cryodrgn_pipeline.io.checkpoints import TrainedModel, load_model, save_model
from cryodrgn_pipeline.models.basis import BasisConfig, BasisModel, BasisVae
from cryodrgn_pipeline.models.from_subspace import ImageBasisVae, ResidualVae
from cryodrgn_pipeline.models.vae import Vae, VaeConfig
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.basis import Seen
from cryodrgn_pipeline.subspace.poses import PoseOffsets
from cryodrgn_pipeline.training.batch import Placed
from cryodrgn_pipeline.training.data import TrainingData
from cryodrgn_pipeline.training.loop import Trainer

BOX, PIXEL_A = 16, 5.0
SMALL = (
    "--encoder-width 24 --decoder-width 16 --encoder-layers 1 --decoder-layers 1 --coordinate-fraction 0.5"
)
KINDS = {
    "linear": "--method subspace",
    "kernel": "",
    "basis": "--decoder basis",
    "residual": f"--encoder subspace --decoder mlp --epochs 2 {SMALL}",
    "image_basis": f"--encoder image --decoder basis --epochs 2 {SMALL}",
    "mlp": f"--encoder image --decoder mlp --epochs 2 {SMALL}",
}


def run(command: str) -> str:
    done = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """The network in the span of the maps need not be good here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cryodrgn_pipeline.subspace.basis.FEWEST_STEPS", 150)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 600 particles of 20 px, its stack, and the stack of ten times as bright images."""
    folder = tmp_path_factory.mktemp("starts")
    run(f"simulate -o {folder}/set --box-size 20 --pixel-size 9.6 --particles 600 --snr 0.45")
    run(f"import {folder}/set/particles.star -o {folder}/import")
    run(f"preprocess {folder}/import --box-size 20 -o {folder}/stack")
    for path in folder.glob("set/**/*.mrcs"):
        with mrcfile.open(path, "r+") as file:
            file.set_data(file.data * np.float32(10))
    run(f"import {folder}/set/particles.star -o {folder}/import10")
    run(f"preprocess {folder}/import10 --box-size 20 -o {folder}/stack10")
    return folder


class Runs(dict[str, Path]):
    """A run of each kind of model, trained when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        run(f"train {self.folder}/stack {KINDS[name]} --latent-dim 4 --device cpu -o {self.folder}/{name}")
        self[name] = self.folder / name
        return self[name]


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    return Runs(folder)


def table(path: Path):
    return pq.read_table(path / "latent.parquet").to_pandas()


def z_of(path: Path) -> np.ndarray:
    return table(path)[[f"z_{j}" for j in range(4)]].to_numpy()


def small_model() -> BasisModel:
    rng = torch.Generator().manual_seed(3)
    maps = torch.randn(3, BOX, BOX, BOX, generator=rng)
    turn = torch.tensor([[1.0, 0.2, -0.1], [0.0, 0.7, 0.3], [0.0, -0.4, 0.9]])
    vae = BasisVae(BasisConfig(components=2, latent_dim=3))
    return BasisModel(vae=vae, maps=maps, turn=turn, pixel_size_a=PIXEL_A)


@pytest.mark.parametrize("domain", ["fourier", "hartley"])
def test_before_it_learns_the_residual_model_is_the_default_model(domain: str) -> None:
    start, scale = small_model(), 7.0
    config = VaeConfig(
        box_size_px=BOX, latent_dim=3, decoder_width=8, domain=domain, encoder="subspace", mask_radius=0.9
    )
    vae, z = ResidualVae(config, start, scale), torch.randn(4, 3)
    plane, rotation = config.plane(), rotations(4)
    coordinates = slice_coordinates(plane, rotation)
    ctf = torch.rand(4, len(plane)) - 0.5
    drawn = vae.decode_slices(coordinates / BOX, z, ctf)
    for row in range(4):
        grid = volume_grid(start.density(z[row], BOX))
        expected = extract_slices(grid, coordinates[row : row + 1])[0] * ctf[row] / scale
        torch.testing.assert_close(drawn[row], expected, atol=1e-4, rtol=1e-4)
    features = torch.rand(4, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(vae.encode(features), start.vae.encode(features), strict=True)
    )
    whole = TrainedModel(vae=vae, scale=scale, pixel_size_a=PIXEL_A)
    torch.testing.assert_close(whole.density(z[0], BOX), start.density(z[0], BOX), atol=1e-5, rtol=1e-5)
    torch.nn.init.ones_(vae.decoder.last.bias)
    assert (vae.decode_slices(coordinates / BOX, z, ctf) - drawn).abs().max() > 0.1
    assert (whole.density(z[0], BOX) - start.density(z[0], BOX)).abs().max() > 0.1


def test_corrected_poses_change_batches_as_they_changed_the_images_of_the_subspace(tiny_set: Path) -> None:
    stack = Stack.open(tiny_set / "stack")
    rows, generator = np.arange(5, 25), torch.Generator().manual_seed(0)
    poses = PoseOffsets(offset=0.05 * torch.randn(20, 6, generator=generator).double(), shift_spread=0.05)
    contrast = torch.linspace(0.5, 1.5, 20)
    placed = Placed(features=torch.zeros(20, 1), contrast=contrast, poses=poses)
    model = VaeConfig(box_size_px=16)
    cpu = torch.device("cpu")
    data = TrainingData(stack, rows, model, in_memory=False, device=cpu, placed=placed)
    plain = TrainingData(stack, rows, model, in_memory=False, device=cpu).batch(rows)
    batch = data.batch(rows)
    given = FourierImages(
        plane=model.plane(),
        coefficients=half_plane_coefficients(torch.from_numpy(stack.read(rows)), model.plane()) / data.scale,
        ctf=plain.ctf,
        rotation=plain.rotation,
        scale=plain.magnification,
        noise_group=torch.zeros(20),
    )
    expected = poses.applied(given, slice(0, 20))
    torch.testing.assert_close(batch.coefficients, expected.coefficients, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.rotation, expected.rotation)
    torch.testing.assert_close(batch.ctf, plain.ctf * contrast[:, None])
    assert (batch.coefficients - plain.coefficients).abs().max() > 0.1


def test_the_loss_of_inner_products_is_that_of_the_slices() -> None:
    rng = torch.Generator().manual_seed(1)
    slices, image = torch.randn(5, 3, 40, generator=rng), torch.randn(5, 40, generator=rng)
    seen = Seen(
        features=torch.zeros(5, 1),
        gram=slices @ slices.transpose(1, 2),
        inner=(slices @ image[..., None])[..., 0],
        power=(image**2).sum(1),
        known=torch.zeros(5),
        coefficients=40,
    )
    factors = torch.randn(2, 3, generator=rng)
    rows = torch.tensor([4, 1])
    left = image[rows] - (factors[:, None] @ slices[rows])[:, 0]
    torch.testing.assert_close(seen.loss(factors, rows), (left**2).mean(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["residual", "image_basis"])
def test_what_starts_from_the_subspace_trains_and_draws_and_is_analysed(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    latents, default = table(runs[name]), table(runs["basis"])
    assert set(latents.columns) == set(default.columns)
    assert np.isfinite(latents.drop(columns="particle_id")).all(axis=None)
    assert latents.held_out.equals(default.held_out)
    manifest = json.loads((runs[name] / "run.json").read_text())
    assert manifest["epochs"] == 2
    assert manifest["beta"] == 2
    assert manifest["components"] > 0
    encoder, decoder = KINDS[name].split()[1:4:2]
    assert (manifest["encoder"], manifest["decoder"]) == (encoder, decoder)
    losses = [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()]
    if name == "image_basis":  # the other starts where it would end
        assert losses[1]["reconstruction"] < losses[0]["reconstruction"]
    run(f"analyze {runs[name]} --no-umap --clusters 3")
    run(f"report {runs[name]}")
    assert len(run(f"volumes {runs[name]} --kmeans 2 -o {tmp_path}/volumes").split()) == 2
    run(f"volumes {runs[name]} --kmeans 2 --source particles -o {tmp_path}/from_particles")


def test_the_residual_model_goes_on_from_the_latent_of_the_default_model(runs: Runs) -> None:
    start, after = z_of(runs["basis"]), z_of(runs["residual"])
    for j in range(2):
        assert np.corrcoef(start[:, j], after[:, j])[0, 1] > 0.9
    kept = load_model(runs["residual"])
    assert isinstance(kept, TrainedModel)
    assert isinstance(kept.vae, ResidualVae)
    assert kept.vae.decoder.last.weight.abs().max() > 0  # it learnt


@pytest.mark.parametrize("name", ["residual", "image_basis"])
def test_an_interrupted_training_resumes_to_the_same_weights_without_a_new_subspace(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    take_step, steps = Trainer._step, []
    options = f"{KINDS[name]} --latent-dim 4 --device cpu"
    command = f"train {runs[name].parent}/stack {options} -o {tmp_path}/run --resume"

    def step_then_signal(self, batch):
        steps.append(batch)
        if len(steps) == 45:  # in the middle of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step_then_signal)
        with pytest.raises(Interrupted) as stopped:
            CliRunner().invoke(app, command.split())
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "run.json").exists()
    monkeypatch.setattr("cryodrgn_pipeline.training.start.learn", None)
    run(command)
    one, other = (load_file(path / "model.safetensors") for path in (runs[name], tmp_path / "run"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    run(command)
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_of_a_rigid_set_every_combination_is_the_mean_map_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(
        f"simulate -o {tmp_path}/set --box-size 16 --pixel-size 12 --particles 300 --snr 0.3 --motion none "
        "--occupancy 1"
    )
    run(f"import {tmp_path}/set/particles.star -o {tmp_path}/import")
    run(f"preprocess {tmp_path}/import --box-size 16 -o {tmp_path}/stack")
    for name in ("residual", "image_basis"):
        caplog.clear()
        command = f"train {tmp_path}/stack {KINDS[name]} -o {tmp_path}/{name} --resume"
        run(command)
        assert "the model is the mean map, z is 0" in caplog.text
        manifest = json.loads((tmp_path / name / "run.json").read_text())
        assert (manifest["epochs"], manifest["components"]) == (0, 0)
        assert (table(tmp_path / name)[["z_0", "std_0"]] == 0).all(axis=None)
        run(f"volumes {tmp_path}/{name} --kmeans 1 -o {tmp_path}/volumes")
        before = (tmp_path / name / "run.json").stat().st_mtime_ns
        run(command)
        assert (tmp_path / name / "run.json").stat().st_mtime_ns == before
        run(f"encode {tmp_path}/{name} {tmp_path}/stack -o {tmp_path}/{name}_again")
        assert (table(tmp_path / f"{name}_again").z_0 == 0).all()


@pytest.mark.parametrize("name", KINDS)
def test_the_same_images_encoded_anew_lie_where_training_left_them(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    folder = runs[name].parent
    run(f"encode {runs[name]} {folder}/stack -o {tmp_path}/again")
    trained, again = table(runs[name]), table(tmp_path / "again")
    assert set(again.columns) == set(trained.columns)
    assert again.particle_id.equals(trained.particle_id)
    assert again.held_out.all()
    z, found = z_of(runs[name]), z_of(tmp_path / "again")
    std = trained[[f"std_{j}" for j in range(4)]].to_numpy()
    moved = np.abs(found - z)[std > 0] / std[std > 0]
    # images that are landmarks were not asked about themselves; most of these few are
    assert np.median(moved) < (0.1 if name == "kernel" else 0.02)
    assert name == "kernel" or moved.max() < 0.2
    np.testing.assert_allclose(again.loss, trained.loss, rtol=0.05 if name == "kernel" else 0.02)
    manifest = json.loads((tmp_path / "again" / "run.json").read_text())
    assert manifest["grey_scale"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_a_change_of_grey_scale_leaves_new_images_where_they_were(
    runs: Runs, tmp_path: Path, name: str
) -> None:
    folder = runs[name].parent
    for stack in ("stack", "stack10"):
        run(f"encode {runs[name]} {folder}/{stack} -o {tmp_path}/{stack}")
    one, ten = table(tmp_path / "stack"), table(tmp_path / "stack10")
    np.testing.assert_allclose(z_of(tmp_path / "stack10"), z_of(tmp_path / "stack"), atol=1e-4)
    np.testing.assert_allclose(ten.loss, one.loss, rtol=1e-3)
    grey = [
        json.loads((tmp_path / stack / "run.json").read_text())["grey_scale"]
        for stack in ("stack", "stack10")
    ]
    assert grey[1] / grey[0] == pytest.approx(10, rel=1e-4)


def test_an_encoded_folder_is_a_run_for_the_verbs_that_follow(runs: Runs, tmp_path: Path) -> None:
    folder, ids = runs["basis"].parent, tmp_path / "ids.txt"
    chosen = table(runs["basis"]).particle_id[100:400]
    ids.write_text("\n".join(chosen) + "\n")
    run(f"encode {runs['basis']} {folder}/stack10 --subset {ids} -o {tmp_path}/new")
    assert table(tmp_path / "new").particle_id.tolist() == chosen.tolist()
    run(f"analyze {tmp_path}/new --no-umap --clusters 3")
    run(f"report {tmp_path}/new")
    run(f"volumes {tmp_path}/new --kmeans 2 --source particles -o {tmp_path}/volumes")


def test_what_cannot_be_encoded_is_refused_with_the_cure(runs: Runs, tmp_path: Path) -> None:
    def refused(error: type[Exception], command: str) -> str:
        done = CliRunner().invoke(app, command.split())
        assert isinstance(done.exception, error)
        return str(done.exception)

    default, folder = runs["basis"], runs["basis"].parent
    run(f"preprocess {folder}/import10 --box-size 12 -o {tmp_path}/small")
    said = refused(InputFormatError, f"encode {default} {tmp_path}/small -o {tmp_path}/a")
    assert "preprocess --box-size 20" in said
    assert "choose another folder" in refused(ConfigError, f"encode {default} {folder}/stack -o {default}")
    save_model(tmp_path / "old.safetensors", small_model())
    run(f"preprocess {folder}/import10 --box-size {BOX} -o {tmp_path}/fitting")
    said = refused(InputFormatError, f"encode {tmp_path}/old.safetensors {tmp_path}/fitting -o {tmp_path}/b")
    assert "train again" in said
    vae = Vae(VaeConfig(box_size_px=BOX, encoder_width=4, decoder_width=4))
    save_model(tmp_path / "older.safetensors", TrainedModel(vae=vae, scale=1.0, pixel_size_a=PIXEL_A))
    said = refused(
        InputFormatError, f"encode {tmp_path}/older.safetensors {tmp_path}/fitting -o {tmp_path}/b"
    )
    assert "train again" in said
    assert not (tmp_path / "b" / "latent.parquet").exists()


def test_images_that_show_the_negative_of_the_particle_are_refused(runs: Runs, tmp_path: Path) -> None:
    folder = runs["basis"].parent
    run(f"import {folder}/set/particles.star --set contrast_sign=-1 -o {tmp_path}/import")
    run(f"preprocess {tmp_path}/import --box-size 20 -o {tmp_path}/stack")
    for name in ("basis", "mlp"):
        done = CliRunner().invoke(app, f"encode {runs[name]} {tmp_path}/stack -o {tmp_path}/new".split())
        assert isinstance(done.exception, InputFormatError)
        assert "do not show the particle" in str(done.exception)


def test_a_model_with_an_image_encoder_is_stored_whole(tmp_path: Path) -> None:
    start = small_model()
    vae = ImageBasisVae(VaeConfig(box_size_px=BOX, latent_dim=3, encoder_width=4, decoder="basis"), start.vae)
    save_model(
        tmp_path / "model.safetensors",
        BasisModel(vae=vae, maps=start.maps, turn=start.turn, pixel_size_a=5.0),
    )
    again, z = load_model(tmp_path), torch.randn(3)
    assert isinstance(again, BasisModel)
    assert isinstance(again.vae, ImageBasisVae)
    torch.testing.assert_close(again.density(z, BOX), start.density(z, BOX))
    seen = torch.randn(2, len(vae.config.encoder_plane()), dtype=torch.complex64)
    assert all(torch.equal(a, b) for a, b in zip(again.vae.encode(seen), vae.encode(seen), strict=True))
