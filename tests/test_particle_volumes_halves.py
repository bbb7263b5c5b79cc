"""Half maps with nothing in common but the point they are made for, and what common models do to a FSC."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.fourier.fsc import fsc
from cryodrgn_pipeline.fourier.masks import soft_ball
from cryodrgn_pipeline.io.runs import read_columns, read_latents, write_columns, write_z
from cryodrgn_pipeline.particle_volumes_halves import located
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.run import SubspaceRequest

BOX = 16


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def prepared(folder: Path, options: str) -> None:
    run(*f"simulate -o {folder}/set --box-size {BOX} --pixel-size 12 {options}".split())
    run("import", folder / "set/particles.star", "-o", folder / "import")
    run("preprocess", folder / "import", "--box-size", BOX, "-o", folder / "stack")


def trained(folder: Path) -> None:
    run("train", folder / "stack", "--method", "subspace", "--latent-dim", 2, "-o", folder / "run")


def volumes(folder: Path, name: str, *words: object) -> Path:
    start = ["volumes", folder / "run", "--z", folder / "z.csv", "--source", "particles"]
    run(*start, *words, "-o", folder / name)
    return folder / name


def half_map(maps: Path, number: int, half: int) -> np.ndarray:
    with mrcfile.open(maps / f"halves/vol_{number:03d}_half{half}.mrc") as mrc:
        return mrc.data.copy()


def quick(monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    """Change the recipe of the subspaces that are learnt from here on."""
    usual = SubspaceRequest.settings
    monkeypatch.setattr(SubspaceRequest, "settings", lambda self: replace(usual(self), **settings))


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 particles with a hinge, their run, two points, and maps there with half maps of their own."""
    folder = tmp_path_factory.mktemp("halves")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch, pose_offsets=False)
        prepared(folder, "--particles 800 --snr 0.5 --seed 1")
        trained(folder)
        z = read_latents(folder / "run").z
        write_z(folder / "z.csv", z[np.argsort(z[:, 0])[[80, 720]]])
        volumes(folder, "maps", "--independent-halves")
    return folder


def test_independent_half_maps_are_marked_and_told_apart_in_the_table(moving: Path) -> None:
    table = pq.read_table(moving / "maps/volumes.parquet").to_pandas()
    assert table.fsc_independent.all()
    assert (table[["half1_components", "half2_components"]] >= 1).all(axis=None)
    assert table.n_effective.between(50, 800).all()
    assert (table.half1_kernel_width_0 > 0).all()
    assert "kernel_width_0" not in table
    assert (table.resolution_fsc0143_a < 60).all()
    for number in range(2):
        halves = [half_map(moving / "maps", number, half).ravel() for half in (1, 2)]
        assert 0.9 < np.corrcoef(*halves)[0, 1] < 0.9999


def test_the_map_itself_is_that_of_all_particles(moving: Path) -> None:
    for name in ("vol_000.mrc", "vol_001.mrc"):
        if not (moving / "shared").exists():
            volumes(moving, "shared")
        one, other = (mrcfile.read(moving / folder / name) for folder in ("maps", "shared"))
        assert np.abs(one - other).max() < 1e-5 * one.max()


def test_the_subspaces_of_the_halves_are_kept(moving: Path, monkeypatch, caplog) -> None:
    quick(monkeypatch, pose_offsets=False)
    caplog.set_level("INFO")
    before = (moving / "run/halves/half1/run.json").read_bytes()
    again = volumes(moving, "again", "--independent-halves")
    assert caplog.text.count("already trained") == 2
    assert (moving / "run/halves/half1/run.json").read_bytes() == before
    assert np.array_equal(half_map(again, 0, 1), half_map(moving / "maps", 0, 1))


def test_no_image_of_one_half_set_reaches_the_half_map_of_the_other(
    moving: Path, tmp_path: Path, monkeypatch
) -> None:
    quick(monkeypatch, pose_offsets=False)
    for name in ("stack", "run"):
        shutil.copytree(moving / name, tmp_path / name)
    shutil.copy(moving / "z.csv", tmp_path)
    shutil.rmtree(tmp_path / "run/halves")
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(manifest | {"stack": str(tmp_path / "stack")}))
    second = Stack.open(tmp_path / "stack").particles.half_set == 2
    with mrcfile.open(tmp_path / "stack/images.mrcs", "r+") as mrc:
        mrc.data[second] = np.random.default_rng(0).permutation(mrc.data[second])[:, ::-1]
    noise = read_columns(tmp_path / "stack/noise.parquet", "")
    noise |= {name: 4 * noise[name] for name in ("noise_power", "total_power", "half2_noise_power")}
    write_columns(tmp_path / "stack/noise.parquet", noise)
    changed = volumes(tmp_path, "maps", "--independent-halves")
    for number in range(2):
        first, second_map = (half_map(changed, number, half) for half in (1, 2))
        assert np.array_equal(first, half_map(moving / "maps", number, 1))
        assert np.abs(second_map - half_map(moving / "maps", number, 2)).max() > 0.1 * second_map.max()


def test_a_half_set_without_components_gives_the_map_of_all_its_particles(
    moving: Path, tmp_path: Path, monkeypatch, caplog
) -> None:
    usual = SubspaceRequest.settings
    monkeypatch.setattr(
        SubspaceRequest,
        "settings",
        lambda self: replace(
            usual(self), pose_offsets=False, max_components=0 if self.half_set == 0 else self.latent_dim
        ),
    )
    shutil.copytree(moving / "run", tmp_path / "run")
    shutil.copy(moving / "z.csv", tmp_path)
    maps = volumes(tmp_path, "maps", "--independent-halves")
    table = pq.read_table(maps / "volumes.parquet").to_pandas()
    assert (table.half1_components == 0).all()
    assert "support 0 and" in caplog.text
    assert np.array_equal(half_map(maps, 0, 1), half_map(maps, 1, 1))
    assert not np.array_equal(half_map(maps, 0, 2), half_map(maps, 1, 2))


def test_dealt_half_sets_are_not_called_independent(
    moving: Path, tmp_path: Path, monkeypatch, caplog
) -> None:
    quick(monkeypatch, pose_offsets=False)
    for name in ("import", "run"):
        shutil.copytree(moving / name, tmp_path / name)
    shutil.copy(moving / "z.csv", tmp_path)
    particles = read_columns(tmp_path / "import/particles.parquet", "")
    del particles["half_set"]
    write_columns(tmp_path / "import/particles.parquet", particles)
    run("preprocess", tmp_path / "import", "--box-size", BOX, "-o", tmp_path / "stack")
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(manifest | {"stack": str(tmp_path / "stack")}))
    maps = volumes(tmp_path, "maps", "--independent-halves")
    assert not pq.read_table(maps / "volumes.parquet")["fsc_independent"].to_numpy().any()
    assert "names no half sets" in caplog.text


def test_a_model_of_both_half_sets_makes_them_agree_on_noise(tmp_path: Path, monkeypatch) -> None:
    """The negative control: images of noise alone, and components that no held-out image has to support."""
    quick(monkeypatch, pose_offsets=False, held_out_fraction=0.0)
    prepared(tmp_path, "--particles 1000 --snr 0.0005 --motion none --occupancy 1 --seed 2")
    with mrcfile.open(tmp_path / "stack/images.mrcs", "r+") as mrc:
        mrc.data[:] = np.random.default_rng(0).normal(size=mrc.data.shape) * mrc.data.std()
    trained(tmp_path)
    spread = read_latents(tmp_path / "run").z.std(0)
    write_z(tmp_path / "z.csv", np.array([[2 * spread[0], 0], [-2 * spread[0], 0], [0, 2 * spread[1]]]))
    ball, agreement, resolution_a = soft_ball(BOX, 0.4 * BOX), {}, {}
    for name, words in (("shared", ()), ("own", ("--independent-halves",))):
        maps = volumes(tmp_path, name, *words)
        curves = []
        for number in range(3):
            halves = [torch.from_numpy(half_map(maps, number, half)) for half in (1, 2)]
            curves.append(fsc(*halves, ball)[2:6])  # the mask correlates shell 1
        agreement[name] = float(torch.stack(curves).mean())
        resolution_a[name] = pq.read_table(maps / "volumes.parquet")["resolution_fsc0143_a"].to_numpy()
    assert agreement["shared"] > 0.3
    assert resolution_a["shared"].max() < 55
    assert abs(agreement["own"]) < 0.1
    assert np.nanmin(np.append(resolution_a["own"], 12 * BOX)) > 65


def test_targets_are_found_in_another_latent_space_of_the_same_particles(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2000, 3)).astype(np.float32)
    z[:, 2] = 0  # a coordinate without signal
    turn = rng.normal(size=(2, 2))

    def other(points: np.ndarray) -> np.ndarray:
        return points[:, :2] @ turn + 0.2 * points[:, :1] ** 2

    ids, some = np.array([f"p{row}" for row in range(2000)]), np.arange(1999, -1, -2)
    theirs = other(z[some]) + 0.3 * rng.normal(size=(len(some), 2))
    for name, columns in (
        ("run", {"particle_id": ids, **{f"z_{j}": z[:, j] for j in range(3)}}),
        ("own", {"particle_id": ids[some], **{f"z_{j}": theirs[:, j] for j in range(2)}}),
    ):
        (tmp_path / name).mkdir()
        write_columns(tmp_path / name / "latent.parquet", columns)
    targets = np.array([[0.0, 0, 0], [1.5, -1, 0], [-0.5, 1, 0]])
    found = located(tmp_path / "run", tmp_path / "own", targets)
    assert np.abs(found - other(targets)).max() < 0.25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--source", "decoder"), "a decoder reads no images"),
        (("--source", "particles", "--ids"), "chosen with both half sets"),
    ],
)
def test_what_cannot_be_independent_is_refused(moving: Path, tmp_path: Path, words, message) -> None:
    points = (*words, moving / "run/halves/half1.txt") if "--ids" in words else (*words, "--kmeans", 2)
    start = ["volumes", moving / "run", "-o", tmp_path / "maps", "--independent-halves"]
    done = CliRunner().invoke(app, [str(word) for word in (*start, *points)])
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)


def test_a_stack_without_noise_of_its_half_sets_is_refused(moving: Path, tmp_path: Path) -> None:
    shutil.copytree(moving / "stack", tmp_path / "stack")
    noise = read_columns(tmp_path / "stack/noise.parquet", "")
    del noise["half1_noise_power"]
    write_columns(tmp_path / "stack/noise.parquet", noise)
    with pytest.raises(InputFormatError, match="preprocess"):
        Stack.open(tmp_path / "stack").with_half_noise(0)


def test_each_half_sets_noise_is_that_of_its_own_images(moving: Path) -> None:
    stack = Stack.open(moving / "stack")
    halves = [stack.with_half_noise(half).noise for half in (0, 1)]
    for group, power in stack.noise.items():
        one, two = (half[group] for half in halves)
        assert not np.array_equal(one, two)
        assert np.allclose((one + two) / 2, power, rtol=0.05)
