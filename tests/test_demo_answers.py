"""The demonstration's settings find its known answers, on a smaller set; so does the MLP decoder."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.demo import DEMO_SETTINGS, DEMO_SIMULATION
from cryodrgn_pipeline.evaluate import latent_scores, read_truth


def invoke(*words: object) -> None:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def options_of(settings: dict[str, object]) -> list[object]:
    return [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", value)]


VAE = {
    "encoder": "image",
    "decoder": "mlp",
    "latent_dim": 4,
    "epochs": 11,
    "learning_rate": 1e-3,
    "encoder_width": 256,
    "decoder_width": 128,
    "encoder_mask_radius": 0.5,
    "coordinate_fraction": 0.25,
}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of images as noisy as the demo's."""
    folder = tmp_path_factory.mktemp("answers")
    simulation = DEMO_SIMULATION | {"--particles": 4000}
    assert simulation["--snr"] <= 0.3
    invoke("simulate", *[word for option in simulation.items() for word in option], "-o", folder / "data")
    invoke("import", folder / "data" / "particles.star", "-o", folder / "import")
    box = DEMO_SETTINGS["preprocess"]["box_size_px"]
    invoke("preprocess", folder / "import", "--box-size", box, "-o", folder / "stack")
    return folder


def test_the_demo_finds_motion_and_occupancy(noisy: Path) -> None:
    invoke("train", noisy / "stack", "-o", noisy / "demo")
    r2 = latent_scores(noisy / "demo", read_truth(noisy / "data"))["r2"]
    assert min(r2.values()) >= 0.9, r2


def test_the_coordinate_network_finds_the_motion(noisy: Path) -> None:
    invoke("train", noisy / "stack", *options_of(VAE), "-o", noisy / "vae")
    r2 = latent_scores(noisy / "vae", read_truth(noisy / "data"))["r2"]
    assert r2["motion"] >= 0.7, r2
