"""The linear subspace: kernels against torch, the solver against the exact operator, and what it finds."""

from __future__ import annotations

import json
from pathlib import Path

import blobs
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import TrainingError
from cryodrgn_pipeline.evaluate import latent_scores, read_truth
from cryodrgn_pipeline.fourier.slices import extract_slices, slice_coordinates, volume_grid
from cryodrgn_pipeline.fourier.transforms import HalfPlane
from cryodrgn_pipeline.fourier_images import FourierImages
from cryodrgn_pipeline.io.checkpoints import load_model, save_model
from cryodrgn_pipeline.io.runs import read_columns, read_latents
from cryodrgn_pipeline.models.basis import BasisModel
from cryodrgn_pipeline.models.linear import LinearModel, factors
from cryodrgn_pipeline.subspace import em, fit
from cryodrgn_pipeline.subspace import maps as final_maps
from cryodrgn_pipeline.subspace.em import accumulate, whitened
from cryodrgn_pipeline.subspace.fit import supported_components
from cryodrgn_pipeline.subspace.images import level_plane
from cryodrgn_pipeline.subspace.posterior import Posterior, posterior
from cryodrgn_pipeline.subspace.solve import Lattice, solve
from cryodrgn_pipeline.subspace.sums import (
    InnerProducts,
    NormalEquations,
    inner_products,
    pack,
    unpack,
)
from cryodrgn_pipeline.subspace.support import support_mask

BOX = 16


def fourier_images(
    count: int, plane: HalfPlane, volumes: torch.Tensor, weights: torch.Tensor
) -> FourierImages:
    """Noise-free slices of Σ weights · volumes with a made-up CTF; some of another pixel size."""
    rotation = blobs.rotations(count)
    scale = torch.where(torch.arange(count) % 3 == 0, 1.1, 1.0)
    where = slice_coordinates(plane, rotation, scale)
    transfer = torch.cos(0.05 * plane.radius**2 + torch.arange(count)[:, None])
    grids = [volume_grid(volume) for volume in volumes]
    slices = sum(weights[:, j, None] * extract_slices(grid, where) for j, grid in enumerate(grids))
    return FourierImages(
        plane=plane,
        coefficients=(transfer * slices).to(torch.complex64),
        ctf=transfer.float(),
        rotation=rotation,
        scale=scale,
        noise_group=torch.arange(count) % 2,
    )


@pytest.fixture(scope="module")
def case() -> tuple[FourierImages, torch.Tensor, torch.Tensor, torch.Tensor]:
    """400 images of a mean and a component, the maps, their factors `(B, 2)`, noise weights of two groups."""
    maps = torch.stack([blobs.density(BOX), blobs.density(BOX, blobs.CENTRES[::-1] * 0.8) * 0.3])
    weights = torch.stack(
        [torch.ones(400), torch.randn(400, generator=torch.Generator().manual_seed(1))], dim=1
    )
    plane = level_plane(BOX, BOX)
    noise = torch.stack([torch.ones(len(plane)), 1 / (1 + plane.radius)])
    noise[:, 0] /= 2
    return fourier_images(400, plane, maps, weights), maps, weights, noise


def test_packing_a_symmetric_matrix_loses_nothing() -> None:
    matrix = torch.randn(5, 4, 4)
    matrix = matrix + matrix.mT
    assert torch.equal(unpack(pack(matrix), 4), matrix)


def test_compiled_sums_equal_torch(case) -> None:
    images, _, weights, noise = case
    second = pack(weights[:, :, None] * weights[:, None])
    results = []
    for kernel in ("torch", "numba"):
        sums = NormalEquations(BOX, 2, kernel=kernel)
        sums.add(images, noise, weights, second)
        results.append(sums.complete(Lattice(BOX)))
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() < 1e-4 * one.abs().max()


def test_compiled_inner_products_equal_torch(case) -> None:
    images, maps, _, noise = case
    lattice = Lattice(BOX)
    one, other = (
        inner_products(lattice.columns(maps), lattice.size, images, noise, kernel=kernel)
        for kernel in ("torch", "numba")
    )
    for name in ("gram", "inner", "power"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a - b).abs().max() < 1e-4 * a.abs().max(), name


def test_noise_free_images_are_explained_by_their_own_factors(case) -> None:
    images, maps, weights, noise = case
    lattice = Lattice(BOX)
    seen = inner_products(lattice.columns(maps), lattice.size, images, noise)
    a = weights.double()
    left = seen.power - 2 * (a * seen.inner).sum(1) + torch.einsum("bj,bjk,bk->b", a, seen.gram, a)
    assert (left / seen.power).abs().max() < 1e-3


@pytest.mark.parametrize("kernel", ["torch", "numba"])
def test_the_solver_recovers_maps_from_noise_free_slices(case, kernel: str) -> None:
    images, maps, weights, noise = case
    second = pack(weights[:, :, None] * weights[:, None])
    sums = NormalEquations(BOX, 2, kernel=kernel)
    sums.add(images, noise, weights, second)
    lattice = Lattice(BOX)
    lattice.mask = support_mask(maps[0])
    power = lattice.shell_power(maps) / lattice.mask_fraction
    power = power.clamp(min=1e-3 * float(power.max()))
    truth = maps * lattice.mask
    back, normal = sums.complete(lattice)
    diagonal = solve(lattice, back, normal.clone(), power, iterations=0, kernel=kernel)
    assert 0.5 < float((diagonal * truth).sum() / truth.square().sum()) < 2  # low frequencies come out strong
    found = solve(lattice, back, normal.clone(), power, iterations=6, kernel=kernel)
    error = float((found - truth).norm() / maps.norm())
    assert error < 0.2
    assert error < float((diagonal - truth).norm() / maps.norm()) / 4
    unpadded = NormalEquations(BOX, 2, exact=False, kernel=kernel)
    unpadded.add(images, noise, weights, second)
    assert unpadded.normal.numel() < normal.numel() / 6
    found = solve(lattice, *unpadded.complete(lattice), power, iterations=0, kernel=kernel)
    assert (found - diagonal).norm() < 0.1 * diagonal.norm()
    with pytest.raises(ValueError, match="iterations must be 0"):
        solve(lattice, *unpadded.complete(lattice), power, iterations=1, kernel=kernel)


def test_the_toeplitz_operator_is_slicing_and_splatting_back(case) -> None:
    images, maps, _, noise = case
    ones = torch.ones(len(images), 1)
    sums = NormalEquations(BOX, 1)
    sums.add(images, noise, ones, ones)
    lattice = Lattice(BOX)
    _, normal = sums.complete(lattice)
    operator = lattice.toeplitz(normal)[:, 0].reshape(lattice.shape)
    by_product = lattice.adjoint(lattice.spectra(maps[:1]) * operator)
    again = NormalEquations(BOX, 1)
    where = slice_coordinates(images.plane, images.rotation, images.scale)
    sliced = images.ctf * extract_slices(volume_grid(maps[0]), where)
    again.add(
        FourierImages(
            plane=images.plane,
            coefficients=sliced.to(torch.complex64),
            ctf=images.ctf,
            rotation=images.rotation,
            scale=images.scale,
            noise_group=images.noise_group,
        ),
        noise,
        ones,
        ones,
    )
    by_slices = again.complete(lattice)[0]
    assert (by_product - by_slices).norm() < 0.05 * by_slices.norm()


def test_the_posterior_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    root = torch.from_numpy(rng.normal(size=(7, 3, 3)))
    seen = InnerProducts(
        gram=root @ root.mT,
        inner=torch.from_numpy(rng.normal(size=(7, 3))),
        power=torch.full((7,), 9.0),
        gain=torch.zeros(7),
    )
    found = posterior(seen, 100, 0.0)
    precision = seen.gram[:, 1:, 1:] + torch.eye(2)
    expected = torch.linalg.solve(precision, seen.inner[:, 1:] - seen.gram[:, 1:, 0])
    assert torch.allclose(found.z, expected)
    assert torch.allclose(found.covariance, torch.linalg.inv(precision))
    # log p(y | z)/p(y | noise) + log p(z) − log q(z) is the same at any z: take z = 0
    log_q = 0.5 * (torch.logdet(precision) - torch.einsum("bj,bjk,bk->b", found.z, precision, found.z))
    at_zero = seen.inner[:, 0] - seen.gram[:, 0, 0] / 2 - log_q
    assert torch.allclose(found.evidence, at_zero)


def test_contrast_is_found_where_images_are_fainter_or_stronger() -> None:
    scale = torch.tensor([0.7, 1.0, 1.3], dtype=torch.float64)
    gram = torch.diag(torch.tensor([400.0, 30.0], dtype=torch.float64)).expand(3, 2, 2)
    z = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    factors_of = torch.stack([scale, scale * z], dim=1)
    seen = InnerProducts(
        gram=gram,
        inner=(gram @ factors_of[..., None])[..., 0],
        power=torch.full((3,), 1e3),
        gain=torch.zeros(3),
    )
    found = posterior(seen, 100, 0.3)
    assert (found.scale - scale).abs().max() < 0.05
    assert (found.z[:, 0] - z).abs().max() < 0.15


def test_whitening_keeps_every_images_volume() -> None:
    rng = torch.Generator().manual_seed(2)
    where = Posterior(
        z=torch.randn(50, 3, generator=rng, dtype=torch.float64) * 2 + 1,
        covariance=torch.eye(3, dtype=torch.float64).expand(50, 3, 3) * 0.2,
        scale=torch.ones(50), scale_variance=torch.zeros(50), evidence=torch.zeros(50), loss=torch.ones(50),
    )  # fmt: skip
    maps = torch.randn(4, 6, 6, 6, generator=rng)
    turned, moved = whitened(where, maps, torch.ones(50, dtype=torch.bool))
    before = maps[0] + torch.tensordot(where.z.float(), maps[1:], dims=1)
    after = moved[0] + torch.tensordot(turned.z.float(), moved[1:], dims=1)
    assert (before - after).abs().max() < 1e-4
    moment = turned.z.T @ turned.z / 50 + turned.covariance.mean(0)
    assert (moment - torch.eye(3)).abs().max() < 1e-6
    powers = moved[1:].flatten(1).norm(dim=1)
    assert (powers[:-1] >= powers[1:]).all()


def test_components_that_new_images_do_not_support_are_not_kept() -> None:
    rng = np.random.default_rng(3)
    n = 4000
    gram = torch.diag(torch.tensor([100.0, 5.0, 5.0], dtype=torch.float64)).expand(n, 3, 3)
    z = torch.from_numpy(rng.normal(size=(n, 1)))
    a = torch.cat([torch.ones(n, 1), z, torch.zeros(n, 1)], dim=1)  # the second component is made up
    noise = torch.from_numpy(rng.normal(size=(n, 3))) * torch.tensor([100.0, 5.0, 5.0]).sqrt()
    seen = InnerProducts(
        gram=gram,
        inner=(gram @ a[..., None])[..., 0] + noise,
        power=torch.full((n,), 100.0),
        gain=torch.zeros(n),
    )
    kept, gains = supported_components(seen, 100, 0.0, torch.arange(n) % 2 == 0)
    assert kept == 1
    assert gains[0][0] > 0 > gains[1][0]


def test_a_linear_model_is_stored_and_draws_its_maps(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(4)
    smooth = torch.stack([blobs.density(BOX, blobs.CENTRES * s) for s in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)])
    spread = torch.tensor([1.0, 0.5])
    model = LinearModel(maps=smooth, spread=spread, latent_dim=4, curved=2, pixel_size_a=3.0)
    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path)
    z = torch.randn(4, generator=rng)
    expected = torch.tensordot(factors((z[:2] / spread)[None], 2)[0], smooth, dims=1)
    assert torch.allclose(again.density(z, BOX), expected)
    assert again.latent_dim == 4
    assert again.pixel_size_a == 3.0
    coarse = again.density(z, BOX // 2)
    assert float(coarse.sum()) == pytest.approx(float(expected.sum()) / 8, rel=0.05)  # the same density


def run(command: str) -> str:
    done = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subspace of 1500 particles of 32 px, by the command line."""
    folder = tmp_path_factory.mktemp("subspace")
    run(
        f"simulate -o {folder}/set --box-size 32 --pixel-size 6 --particles 1500 --snr 0.3 "
        "--contrast-spread 0.1"
    )
    run(f"import {folder}/set/particles.star -o {folder}/import")
    run(f"preprocess {folder}/import --box-size 32 -o {folder}/stack")
    run(f"train {folder}/stack --method subspace -o {folder}/run")
    return folder


def test_the_subspace_finds_motion_and_occupancy(learnt: Path) -> None:
    scores = latent_scores(learnt / "run", read_truth(learnt / "set"))
    assert scores["r2"]["motion"] > 0.9
    assert scores["r2"]["occupancy"] > 0.9
    assert max(scores["leakage"].values()) < 0.05


def test_images_that_did_not_make_the_coarse_maps_are_placed_all_the_same(
    learnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "COARSE_IMAGES", 900)
    run(f"train {learnt}/stack --method subspace -o {learnt}/some")
    scores = latent_scores(learnt / "some", read_truth(learnt / "set"))
    assert scores["particles"] == 1500
    assert scores["r2"]["motion"] > 0.9
    assert scores["r2"]["occupancy"] > 0.9


def test_few_images_teach_subspace_and_maps_and_all_are_placed(
    learnt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed: dict[str, list[int]] = {"em": [], "maps": []}
    for module in (em, final_maps):
        counts = summed[module.__name__.rpartition(".")[2]]

        def counted(images, *arguments, counts=counts, **options):
            counts.append(len(images))
            return accumulate(images, *arguments, **options)

        monkeypatch.setattr(module, "accumulate", counted)
    run(f"train {learnt}/stack --method subspace --learn-from 900 -o {learnt}/few")
    assert set(summed["em"]) == {900}
    assert summed["maps"] == [900]
    scores = latent_scores(learnt / "few", read_truth(learnt / "set"))
    assert scores["particles"] == 1500
    assert scores["r2"]["motion"] > 0.9
    assert scores["r2"]["occupancy"] > 0.9


def test_latents_come_with_their_posterior(learnt: Path) -> None:
    latents = read_latents(learnt / "run")
    manifest = json.loads((learnt / "run" / "run.json").read_text())
    kept = manifest["components"]
    assert latents.z.shape == (1500, 8)
    assert 2 <= kept < 8
    assert (latents.z[:, kept:] == 0).all()
    assert (latents.std[:, kept:] == 0).all()
    assert (latents.std[:, :kept] < 1).all()
    assert (latents.std[:, :kept] > 0).all()
    columns = read_columns(learnt / "run" / "latent.parquet", "")
    assert np.abs(columns["cov_1_0"]).max() < 1
    spread = float(np.std(columns["contrast"]))
    truth = read_truth(learnt / "set")
    true = truth.table["contrast"][truth.rows_of(latents.particle_id)]
    assert np.corrcoef(columns["contrast"], true)[0, 1] > 0.5
    assert 0.03 < spread < 0.15
    assert not manifest["pose_offsets"]["corrected"]  # they are right
    assert not [name for name in columns if name.startswith("pose_")]


def test_volumes_of_the_subspace_are_those_of_the_truth(learnt: Path) -> None:
    run(f"evaluate --run {learnt}/run --truth {learnt}/set --write-points {learnt}/z.csv")
    run(f"volumes {learnt}/run --z {learnt}/z.csv -o {learnt}/volumes")
    run(f"evaluate {learnt}/volumes --run {learnt}/run --truth {learnt}/set")
    scores = json.loads((learnt / "volumes" / "metrics.json").read_text())
    assert scores["fsc_auc"]["moving"] > 0.85 * scores["ceiling"]


def test_a_finished_subspace_is_left_as_it_is(learnt: Path) -> None:
    before = (learnt / "run" / "latent.parquet").stat().st_mtime_ns
    run(f"train {learnt}/stack --method subspace -o {learnt}/run --resume")
    assert (learnt / "run" / "latent.parquet").stat().st_mtime_ns == before
    run(f"train {learnt}/stack --method subspace -o {learnt}/run --seed 1")
    assert (learnt / "run" / "latent.parquet").stat().st_mtime_ns > before


@pytest.fixture(scope="module")
def nonlinear(learnt: Path) -> dict[str, Path]:
    """The nonlinear models of the same particles."""
    for decoder in ("kernel", "basis"):
        run(f"train {learnt}/stack --decoder {decoder} -o {learnt}/{decoder}")
    return {decoder: learnt / decoder for decoder in ("kernel", "basis")}


@pytest.mark.parametrize("decoder", ["kernel", "basis"])
def test_a_nonlinear_model_draws_better_and_does_not_lose_what_the_subspace_found(
    learnt: Path, nonlinear: dict[str, Path], decoder: str
) -> None:
    truth = read_truth(learnt / "set")
    scores = latent_scores(nonlinear[decoder], truth)
    assert min(scores["r2"].values()) > 0.9
    assert max(scores["leakage"].values()) < 0.05
    for name in ("run", decoder):
        run(f"evaluate --run {learnt}/{name} --truth {learnt}/set --write-points {learnt}/{name}.csv")
        run(f"volumes {learnt}/{name} --z {learnt}/{name}.csv -o {learnt}/{name}_volumes")
        run(f"evaluate {learnt}/{name}_volumes --run {learnt}/{name} --truth {learnt}/set")
    linear, curved = (
        json.loads((learnt / f"{name}_volumes" / "metrics.json").read_text())["fsc_auc"]["moving"]
        for name in ("run", decoder)
    )
    assert curved > linear


def test_held_out_particles_only_measure(nonlinear: dict[str, Path]) -> None:
    latents = read_latents(nonlinear["basis"])
    assert latents.held_out is not None
    assert latents.held_out.sum() == 75  # 5 % of 1500
    assert latents.z.shape == (1500, 8)
    assert (latents.std > 0).all()
    last = json.loads((nonlinear["basis"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["held_out_reconstruction"] == pytest.approx(last["reconstruction"], rel=0.05)
    assert last["kld"] > 1


def test_factors_turned_to_their_axes_draw_the_same_volumes(nonlinear: dict[str, Path]) -> None:
    model = load_model(nonlinear["basis"])
    assert isinstance(model, BasisModel)
    z = torch.from_numpy(read_latents(nonlinear["basis"]).z)
    weights = model.factors(z)
    assert torch.allclose(weights[:, 0], torch.ones(len(z)))
    assert weights[:, 1:].mean(0).abs().max() < 0.1
    assert (weights[:, 1:].var(0) - 1).abs().max() < 0.3


def test_of_a_rigid_set_no_component_is_kept(tmp_path: Path) -> None:
    run(
        f"simulate -o {tmp_path}/set --box-size 24 --pixel-size 8 --particles 1000 --snr 0.3 --motion none "
        "--occupancy 1"
    )
    run(f"import {tmp_path}/set/particles.star -o {tmp_path}/import")
    run(f"preprocess {tmp_path}/import --box-size 24 -o {tmp_path}/stack")
    for method in ("subspace", "vae"):
        run(f"train {tmp_path}/stack --method {method} -o {tmp_path}/{method}")
        assert json.loads((tmp_path / method / "run.json").read_text())["components"] == 0
        assert (read_latents(tmp_path / method).z == 0).all()
    run(f"analyze {tmp_path}/vae --no-umap")
    run(f"volumes {tmp_path}/vae --z {tmp_path}/vae/analysis/centers.csv -o {tmp_path}/volumes")


def test_where_every_image_looks_like_noise_the_stack_is_named_and_a_cure(
    learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cryodrgn_pipeline.subspace.posterior.NOISE_LIKELIER", 1e9)
    command = ["train", str(learnt / "stack"), "--method", "subspace", "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, TrainingError)
    assert str(learnt / "stack") in str(done.exception)
    assert "check poses" in str(done.exception)
    assert not (tmp_path / "run" / "latent.parquet").exists()
