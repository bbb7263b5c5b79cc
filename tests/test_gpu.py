"""What a GPU computes equals what the CPU does; run where torch sees one."""

from __future__ import annotations

import json
from pathlib import Path

import blobs
import numpy as np
import pytest
import torch
from test_subspace import BOX, fourier_images
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.fourier_images import FourierImages
from cryodrgn_pipeline.io.mrc import read_volume
from cryodrgn_pipeline.io.runs import read_columns
from cryodrgn_pipeline.subspace.images import level_plane
from cryodrgn_pipeline.subspace.solve import Lattice, solve
from cryodrgn_pipeline.subspace.sums import NormalEquations, inner_products, pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this torch sees no GPU")


def on_gpu(images: FourierImages) -> FourierImages:
    """The same images on the GPU."""
    names = ("coefficients", "ctf", "rotation", "scale", "noise_group")
    return FourierImages(plane=images.plane.to("cuda"), **{n: getattr(images, n).cuda() for n in names})


@pytest.fixture(scope="module")
def case() -> tuple[FourierImages, torch.Tensor, torch.Tensor, torch.Tensor]:
    """200 images of two maps, the maps, the factors `(B, 2)` and noise weights of two groups."""
    maps = torch.stack([blobs.density(BOX), blobs.density(BOX, blobs.CENTRES[::-1] * 0.8) * 0.3])
    factors = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    plane = level_plane(BOX, BOX)
    noise = torch.stack([torch.ones(len(plane)), 1 / (1 + plane.radius)])
    return fourier_images(200, plane, maps, factors), maps, factors, noise


@pytest.mark.parametrize("exact", [True, False])
def test_sums_and_maps_are_those_of_the_cpu(case, exact: bool) -> None:
    images, _, factors, noise = case
    second = pack(factors[:, :, None] * factors[:, None])
    found = []
    for device in ("cpu", "cuda"):
        given = on_gpu(images) if device == "cuda" else images
        sums = NormalEquations(BOX, 2, exact=exact, device=device)
        sums.add(given, noise.to(device), factors.to(device), second.to(device))
        lattice = Lattice(BOX, device=device)
        back, normal = sums.complete(lattice)
        power = torch.full((2, BOX // 2 + 1), 10.0, dtype=torch.float64)
        maps = solve(lattice, back, normal.clone(), power, iterations=4 if exact else 0)
        found.append((back.cpu(), normal.cpu(), maps))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 1e-3 * one.abs().max()


def test_inner_products_are_those_of_the_cpu(case) -> None:
    images, maps, _, noise = case
    one = inner_products(Lattice(BOX).columns(maps), 2 * BOX, images, noise)
    columns = Lattice(BOX, device="cuda").columns(maps)
    other = inner_products(columns, 2 * BOX, on_gpu(images), noise.cuda())
    for name in ("gram", "inner", "power"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a - b).abs().max() < 1e-4 * a.abs().max(), name


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 particles of 32 px in two motions, prepared."""
    folder = tmp_path_factory.mktemp("gpu")
    for command in (
        f"simulate -o {folder}/set --box-size 32 --pixel-size 6 --particles 1000 --snr 0.5 --states 8",
        f"import {folder}/set/particles.star -o {folder}/import",
        f"preprocess {folder}/import --box-size 32 -o {folder}/stack",
    ):
        done = CliRunner().invoke(app, command.split(), catch_exceptions=False)
        assert done.exit_code == 0, done.output
    return folder / "stack"


@pytest.mark.parametrize("options", [["--method", "subspace"], ["--decoder", "kernel"]])
def test_the_subspace_learnt_on_a_gpu_is_that_of_the_cpu(stack: Path, tmp_path: Path, options) -> None:
    tables = {}
    for device in ("cpu", "cuda"):
        run = tmp_path / device
        arguments = ["train", str(stack), "-o", str(run), "--device", device, "--latent-dim", "4", *options]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        tables[device] = read_columns(run / "latent.parquet", "run `train`")
        assert json.loads((run / "run.json").read_text())["device"] == device
    for name in (name for name in tables["cpu"] if name.startswith("z_")):
        one, other = tables["cpu"][name], tables["cuda"][name]
        if one.std() > 0:
            assert abs(np.corrcoef(one, other)[0, 1]) > 0.999, name


@pytest.fixture(scope="module", params=["kernel", "basis", "image-basis", "image-mlp", "mlp"])
def run(request, stack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, trained on the GPU."""
    *encoder, decoder = request.param.split("-")
    run = tmp_path_factory.mktemp("run") / request.param
    network = "--epochs 3 --batch-size 16 --learning-rate 1e-3 --encoder-width 64 --decoder-width 64"
    chosen = f"--encoder {encoder[0] if encoder else 'subspace'} --decoder {decoder}"
    verb(f"train {stack} -o {run} --device cuda --latent-dim 2 {chosen} {network}")
    return run


def verb(words: str) -> None:
    """Run a verb of ours that has to succeed."""
    done = CliRunner().invoke(app, words.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_models_learn_on_a_gpu(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["reconstruction"] for line in lines]
    assert losses[-1] < losses[0]


def test_volumes_drawn_on_a_gpu_are_those_of_the_cpu(run: Path, tmp_path: Path) -> None:
    for box, options in ((32, ""), (16, "--box-size 16")):
        for device in ("cpu", "cuda"):
            verb(f"volumes {run} --kmeans 2 --device {device} {options} -o {tmp_path}/{device}{box}")
        for name in ("vol_000.mrc", "vol_001.mrc"):
            one, other = (read_volume(tmp_path / f"{device}{box}" / name)[0] for device in ("cpu", "cuda"))
            assert one.shape == (box,) * 3
            assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.99


def test_a_gpu_places_particles_and_takes_volumes_from_them(run: Path, stack: Path, tmp_path: Path) -> None:
    verb(f"volumes {run} --kmeans 1 --source particles --device cuda -o {tmp_path}/volumes")
    assert (tmp_path / "volumes" / "vol_000.mrc").is_file()
    verb(f"encode {run} {stack} --device cuda -o {tmp_path}/placed")
    own, placed = (
        read_columns(folder / "latent.parquet", "run `train`") for folder in (run, tmp_path / "placed")
    )
    assert abs(np.corrcoef(own["z_0"], placed["z_0"])[0, 1]) > 0.9
