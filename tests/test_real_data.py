"""Real particles through the whole job, verb by verb."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.mrc import read_header
from cryodrgn_pipeline.io.runs import read_latents


def invoke(command: str) -> Result:
    return CliRunner().invoke(app, command.split())


def test_five_real_particles_go_from_a_star_file_to_a_report(shared_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for command in (
        f"import {shared_data}/relion31.star -o {tmp_path}/import",
        f"preprocess {tmp_path}/import --box-size 64 -o {tmp_path}/stack",
        f"consensus {tmp_path}/stack -o {tmp_path}/consensus",
        f"train {tmp_path}/stack -o {run} --encoder image --decoder mlp --epochs 2 --latent-dim 2 "
        "--encoder-width 32 --decoder-width 32",
        f"analyze {run} --clusters 2",
        f"volumes {run} --kmeans 2 -o {run}/volumes",
        f"report {run} --consensus {tmp_path}/consensus --import-dir {tmp_path}/import",
    ):
        done = invoke(command)
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception}"
    check = json.loads((tmp_path / "consensus" / "consensus.json").read_text())["convention_check"]
    assert check["verdict"] == "not_determinable"
    assert len(read_latents(run)) == 5
    assert read_header(run / "volumes" / "vol_001.mrc").voxel_size_a == pytest.approx(2.806 * 256 / 64)
    assert "not determinable" in (run / "report.html").read_text()


@pytest.mark.parametrize("kind", ["star", "cs"])
def test_real_particles_without_poses_are_refused_where_poses_are_first_needed(
    shared_data: Path, tmp_path: Path, kind: str
) -> None:
    for command in (
        f"import {shared_data}/empiar_10076_7.{kind} -o {tmp_path}/import",
        f"preprocess {tmp_path}/import --box-size 64 -o {tmp_path}/stack",
    ):
        assert invoke(command).exit_code == 0
    for verb in ("consensus", "train"):
        done = invoke(f"{verb} {tmp_path}/stack -o {tmp_path}/{verb}")
        assert isinstance(done.exception, InputFormatError)
        assert done.exception.exit_code == 3
        assert "no poses" in str(done.exception)
        assert not (tmp_path / verb).exists()
