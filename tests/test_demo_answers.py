"""The demonstration's settings find its known answers, on a smaller set of the same kind."""

from pathlib import Path

from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.demo import DEMO_SETTINGS, DEMO_SIMULATION
from cryodrgn_pipeline.evaluate import latent_scores, read_truth


def invoke(*words: object) -> None:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def options_of(settings: dict[str, object]) -> list[object]:
    return [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", value)]


def test_the_motion_is_found_from_images_as_noisy_as_the_demos(tmp_path: Path) -> None:
    simulation = DEMO_SIMULATION | {"--particles": 4000}
    assert simulation["--snr"] <= 0.3
    invoke("simulate", *[word for option in simulation.items() for word in option], "-o", tmp_path / "data")
    invoke("import", tmp_path / "data" / "particles.star", "-o", tmp_path / "import")
    box = DEMO_SETTINGS["preprocess"]["box_size_px"]
    invoke("preprocess", tmp_path / "import", "--box-size", box, "-o", tmp_path / "stack")
    invoke("train", tmp_path / "stack", *options_of(DEMO_SETTINGS["train"]), "-o", tmp_path / "run")
    r2 = latent_scores(tmp_path / "run", read_truth(tmp_path / "data"))["r2"]
    assert r2["motion"] >= 0.7, r2
