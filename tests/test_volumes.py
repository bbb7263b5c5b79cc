"""Decoded volumes: the right grey scale, voxel size and origin, wherever the latents come from."""

import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.io.checkpoints import TrainedModel, load_model
from cryodrgn_pipeline.io.ids import write_ids
from cryodrgn_pipeline.io.runs import read_latents
from cryodrgn_pipeline.models.vae import Vae, VaeConfig
from cryodrgn_pipeline.volumes import MapOptions, decode_volume, decode_volumes, latents_for

BOX, PIXEL_A, SCALE = 32, 3.0, 7.0
CENTRE_PX, SIGMA_PX = (4.0, -3.0, 2.0), 2.5  # (x, y, z)


class BlobDecoder(torch.nn.Module):
    """The exact transform of a Gaussian of peak height 1 + z_0, in units of the normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.device_of = torch.nn.Parameter(torch.zeros(1))

    def forward(self, coordinates: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        width = (2 * torch.pi * SIGMA_PX**2) ** 1.5 * torch.exp(
            -2 * torch.pi**2 * SIGMA_PX**2 * (coordinates**2).sum(-1)
        )
        phase = torch.exp(-2j * torch.pi * (coordinates @ torch.tensor(CENTRE_PX)))
        return (1 + z[:, :1]) * width * phase / SCALE


@pytest.fixture
def model() -> TrainedModel:
    vae = Vae(VaeConfig(box_size_px=BOX, latent_dim=2, encoder_width=4, decoder_width=4))
    vae.decoder = BlobDecoder()
    return TrainedModel(vae=vae, scale=SCALE, pixel_size_a=PIXEL_A)


def blob(box_size_px: int, voxel_size_a: float) -> np.ndarray:
    x = (np.arange(box_size_px) - box_size_px // 2) * voxel_size_a / PIXEL_A
    cx, cy, cz = CENTRE_PX
    square = (x[:, None, None] - cz) ** 2 + (x[None, :, None] - cy) ** 2 + (x[None, None, :] - cx) ** 2
    return np.exp(-square / (2 * SIGMA_PX**2))


def test_a_decoded_map_has_the_density_that_the_coefficients_say(model):
    density, voxel_size_a = decode_volume(model, np.zeros(2), MapOptions())
    assert voxel_size_a == PIXEL_A
    np.testing.assert_allclose(density, blob(BOX, PIXEL_A), atol=5e-3)
    twice, _ = decode_volume(model, np.array([1.0, 0.0]), MapOptions())
    np.testing.assert_allclose(twice, 2 * density, atol=1e-5)


def test_a_coarser_decode_has_the_same_density_at_larger_voxels(model):
    density, voxel_size_a = decode_volume(model, np.zeros(2), MapOptions(box_size_px=24))
    assert voxel_size_a == pytest.approx(PIXEL_A * BOX / 24)
    np.testing.assert_allclose(density, blob(24, voxel_size_a), atol=5e-3)


def test_a_flipped_map_is_mirrored_and_a_cropped_one_keeps_its_centre(model):
    density, _ = decode_volume(model, np.zeros(2), MapOptions())
    flipped, _ = decode_volume(model, np.zeros(2), MapOptions(flip_hand=True, crop_px=20))
    peak = np.unravel_index(int(flipped.argmax()), flipped.shape)
    assert peak == (10 - 2, 10 - 3, 10 + 4)
    assert flipped.max() == pytest.approx(float(density.max()))


def test_a_low_pass_lowers_the_peak_and_keeps_the_mass(model):
    density, _ = decode_volume(model, np.zeros(2), MapOptions())
    smooth, _ = decode_volume(model, np.zeros(2), MapOptions(low_pass_a=30.0))
    assert smooth.max() < 0.9 * density.max()
    assert float(smooth.sum()) == pytest.approx(float(density.sum()), rel=1e-4)


@pytest.fixture(scope="module")
def run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes") / "run"
    words = (
        f"train {tiny_set}/stack -o {folder} --encoder image --decoder mlp --epochs 2 --latent-dim 2 "
        "--encoder-width 16 --decoder-width 16"
    )
    done = CliRunner().invoke(app, words.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder


def volumes(*words: object):
    return CliRunner().invoke(app, ["volumes", *[str(word) for word in words]])


def test_volumes_at_given_latents_come_in_order_with_honest_headers(run, tmp_path):
    (tmp_path / "z.csv").write_text("z_0,z_1\n0,0\n1.5,-1\n0,0\n")
    done = volumes(run, "--z", tmp_path / "z.csv", "-o", tmp_path / "maps")
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert names == ["vol_000.mrc", "vol_001.mrc", "vol_002.mrc", "volumes.parquet"]
    table = pq.read_table(tmp_path / "maps" / "volumes.parquet").to_pandas()
    assert table.path.tolist() == names[:3]
    assert table[["z_0", "z_1"]].to_numpy().tolist() == [[0, 0], [1.5, -1], [0, 0]]
    maps = []
    for name in names[:3]:
        with mrcfile.open(tmp_path / "maps" / name) as mrc:
            assert mrc.is_volume()
            assert mrc.voxel_size.x == pytest.approx(12.0)
            assert mrc.header.origin.x == mrc.header.nxstart == 0
            maps.append(mrc.data.copy())
    assert np.array_equal(maps[0], maps[2])
    assert not np.array_equal(maps[0], maps[1])


def test_volumes_where_no_particles_are_are_marked_and_said(run, tmp_path, caplog):
    particle = read_latents(run).z[5]
    z = np.stack([particle, particle + 50]).astype(np.float32)
    decode_volumes(run, z, tmp_path / "maps", MapOptions(), torch.device("cpu"))
    table = pq.read_table(tmp_path / "maps" / "volumes.parquet").to_pandas()
    assert table["inside"].tolist() == [True, False]
    assert table["latent_density"][0] > 100 * table["latent_density"][1]
    assert "outside the region of particles, drawn without data: volumes 001" in caplog.text


def test_without_latents_nothing_is_claimed_about_where_particles_are(run, tmp_path, caplog):
    shutil.copy(run / "model.safetensors", tmp_path)
    decode_volumes(tmp_path, np.zeros((1, 2)), tmp_path / "maps", MapOptions(), torch.device("cpu"))
    names = pq.read_schema(tmp_path / "maps" / "volumes.parquet").names
    assert names == ["path", "z_0", "z_1"]
    assert "no latent.parquet" in caplog.text


def test_latents_come_from_clusters_components_and_ids(run, tmp_path):
    latents = read_latents(run)
    ways = {"z_table": None, "kmeans": None, "ids": None, "pc": None, "n": 5, "seed": 0}
    centers = latents_for(run, **ways | {"kmeans": 4})
    assert centers.shape == (4, 2)
    assert all((latents.z == center).all(axis=1).any() for center in centers)
    assert latents_for(run, **ways | {"pc": 2}).shape == (5, 2)
    write_ids(tmp_path / "ids.txt", latents.particle_id[[3, 8]])
    mean = latents_for(run, **ways | {"ids": tmp_path / "ids.txt"})
    np.testing.assert_allclose(mean, latents.z[[3, 8]].mean(0, keepdims=True), rtol=1e-6)
    with pytest.raises(ConfigError, match="exactly one"):
        latents_for(run, **ways | {"pc": 1, "kmeans": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n0,0\n", "header z_0,z_1"),
        ("z_0,z_1\n0,zero\n", "numbers a row"),
        ("z_0,z_1\n0,nan\n", "finite numbers expected"),
        ("z_0,z_1,z_2\n0,0,0\n", "expects rows of 2"),
        ("z_0,z_1\n", "at least one row"),
    ],
)
def test_a_table_of_latents_that_does_not_fit_is_refused_and_nothing_is_written(
    run, tmp_path, content, message
):
    (tmp_path / "z.csv").write_text(content)
    done = volumes(run, "--z", tmp_path / "z.csv", "-o", tmp_path / "maps")
    assert isinstance(done.exception, InputFormatError)
    assert message in str(done.exception)
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    "options",
    [
        MapOptions(box_size_px=17),
        MapOptions(box_size_px=64),
        MapOptions(crop_px=20),
        MapOptions(low_pass_a=5.0),
    ],
)
def test_maps_that_cannot_be_made_are_refused_by_option(run, tmp_path, options):
    with pytest.raises(ConfigError, match=r"expected an even number|finer than"):
        decode_volumes(run, np.zeros((1, 2)), tmp_path / "maps", options, torch.device("cpu"))


def test_a_folder_with_other_files_is_left_alone(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = volumes(run, "--kmeans", 2, "-o", tmp_path)
    assert isinstance(done.exception, ConfigError)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_run_without_weights_says_how_to_get_them(tmp_path):
    with pytest.raises(InputFormatError, match="--resume"):
        load_model(tmp_path)


def test_a_damaged_weights_file_is_refused(run, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:200])
    with pytest.raises(InputFormatError, match="not a readable safetensors file"):
        load_model(tmp_path)
