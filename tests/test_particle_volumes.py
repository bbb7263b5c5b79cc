"""Volumes from particles: kernels against torch, the posterior metric, a known answer, and the files."""

from __future__ import annotations

from pathlib import Path

import blobs
import mrcfile
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from cryodrgn_pipeline import particle_volumes
from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.evaluate import read_truth
from cryodrgn_pipeline.fourier.padded import Ball
from cryodrgn_pipeline.fourier.slices import (
    complete_splat,
    extract_slices,
    slice_coordinates,
    splat_slices,
    volume_grid,
)
from cryodrgn_pipeline.fourier_images import FourierImages
from cryodrgn_pipeline.io.checkpoints import load_model
from cryodrgn_pipeline.io.ids import write_ids
from cryodrgn_pipeline.io.runs import read_latents, write_z
from cryodrgn_pipeline.particle_volumes_maps import StateMap, fsc_of_halves, state_map
from cryodrgn_pipeline.particle_volumes_memory import sums_bytes, work_bytes
from cryodrgn_pipeline.particle_volumes_rings import Rings, rings_of, squared_distances
from cryodrgn_pipeline.particle_volumes_sums import (
    DATA,
    WEIGHT,
    KernelSums,
    TargetSums,
    image_values,
    packed_grids,
    predicted,
)
from cryodrgn_pipeline.particle_volumes_widths import band_weights
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.images import level_plane

BOX = 16


def images_of(count: int, volumes: torch.Tensor, state: torch.Tensor, noise: float = 0.0) -> FourierImages:
    """Slices of the volume that each image shows, with a made-up CTF; some of another pixel size."""
    plane = level_plane(BOX, BOX)
    rotation = blobs.rotations(count)
    scale = torch.where(torch.arange(count) % 3 == 0, 1.1, 1.0)
    where = slice_coordinates(plane, rotation, scale)
    transfer = torch.cos(0.05 * plane.radius**2 + torch.arange(count)[:, None]).float()
    slices = torch.stack([extract_slices(volume_grid(volume), where) for volume in volumes])
    seen = transfer * slices[state, torch.arange(count)]
    rng = torch.Generator().manual_seed(5)
    seen = seen + noise * torch.randn(count, len(plane), generator=rng, dtype=torch.complex64)
    return FourierImages(
        plane=plane,
        coefficients=seen.to(torch.complex64),
        ctf=transfer,
        rotation=rotation,
        scale=scale,
        noise_group=torch.zeros(count, dtype=torch.int64),
    )


@pytest.fixture(scope="module")
def two_states() -> tuple[torch.Tensor, torch.Tensor, FourierImages]:
    """Volumes `(2, D, D, D)` of which the first lacks a subunit, the state of 1200 images, the images."""
    whole = blobs.density(BOX)
    subunit = blobs.density(BOX, np.array([[0.0, 4.5, 2.0], *([[99.0, 0, 0]] * 3)]))
    volumes = torch.stack([whole, whole + subunit])
    state = torch.arange(1200) // 2 % 2
    return volumes, state, images_of(1200, volumes, state, noise=10.0)


def white(images: FourierImages, power: float) -> torch.Tensor:
    weight = torch.full((1, len(images.plane)), 1 / power)
    weight[:, 0] /= 2
    return weight


def sums_around(
    images: FourierImages, ring: np.ndarray, models: torch.Tensor, factors: torch.Tensor, kernel: str = "auto"
) -> TargetSums:
    ball = Ball(BOX)
    prediction = predicted(packed_grids(models, len(models), ball), ball, factors, images, kernel=kernel)
    values = image_values(images, white(images, 100.0), torch.ones(len(images)), prediction)
    sums = TargetSums(BOX, ring.shape[1], int(ring.max()) + 1, kernel=kernel)
    sums.add(images, values, torch.from_numpy(ring), torch.arange(len(images)) % 2)
    return sums


def state_of(sums: TargetSums, rings: Rings, target: int, model: torch.Tensor) -> StateMap:
    return state_map(sums.around(target, rings.weights(target)), model, with_halves=True)


def dealt(images: FourierImages, targets: int, rings: int, seed: int) -> np.ndarray:
    """Rings at random; one image in five stands in none."""
    rng = np.random.default_rng(seed)
    ring = rng.integers(0, rings, (len(images), targets))
    ring[rng.uniform(size=len(images)) < 0.2] = -1
    return ring


def test_compiled_sums_and_predictions_equal_torch(two_states) -> None:
    volumes, _, images = two_states
    ring = dealt(images, targets=3, rings=3, seed=0)
    factors = torch.from_numpy(np.random.default_rng(0).normal(size=(len(images), 2))).float()
    factors[::2, 0] = 0
    ball = Ball(BOX)
    grids = packed_grids(volumes, len(volumes), ball)
    slices = [predicted(grids, ball, factors, images, kernel=kernel) for kernel in ("torch", "numba")]
    assert (slices[0] - slices[1]).abs().max() < 1e-4 * slices[0].abs().max()
    one, other = (sums_around(images, ring, volumes, factors, kernel).sums for kernel in ("torch", "numba"))
    assert (one - other).abs().amax((0, 1)).le(1e-4 * one.abs().amax((0, 1))).all()
    assert one.abs().amax((0, 1)).gt(0).all()


def test_the_ball_holds_all_that_a_splat_on_the_whole_grid_holds(two_states) -> None:
    _, _, images = two_states
    inside = images.scale <= 1  # the others reach beyond |k| = D/2, where no map has anything
    ring = np.where(inside.numpy(), 0, -1)[:, None]
    sums = sums_around(images, ring, torch.zeros(1, BOX, BOX, BOX), torch.ones(len(images), 1))
    where = slice_coordinates(images.plane, images.rotation, images.scale)
    values = image_values(images, white(images, 100.0), torch.ones(len(images)), None)
    for half in (0, 1):
        rows = inside & (torch.arange(len(images)) % 2 == half)
        pairs = torch.complex(values[rows][..., DATA], values[rows][..., DATA + 1])
        found = sums.around(0, torch.ones(1, 1))
        for seen, splatted in (
            (found.numerator((half,), 0, DATA), pairs),
            (found.weight((half,), 0), values[rows][..., WEIGHT]),
        ):
            whole = complete_splat(splat_slices(splatted, where[rows], 2 * BOX))
            assert (seen - whole).abs().max() < 1e-4 * whole.abs().max()


def test_kernels_weigh_rings_though_all_images_are_summed_up_together(two_states) -> None:
    volumes, _, images = two_states
    ring = dealt(images, targets=2, rings=3, seed=6)
    factors = torch.ones(len(images), 1)
    together = sums_around(images, ring, volumes[:1], factors)
    kernels = torch.tensor([[1, 0, 0], [1, 0.7, 0], [1, 0.8, 0.3]], dtype=torch.float64)
    for width, kernel in enumerate(kernels):
        expected = 0.0
        for number, weight in enumerate(kernel.tolist()):
            only = np.where(ring[:, [1]] == number, 0, -1)
            alone = sums_around(images, only, volumes[:1], factors).around(0, torch.ones(1, 1))
            expected = expected + weight * alone.numerator((0, 1), 0, DATA)
        found = together.around(1, kernels).numerator((0, 1), width, DATA)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_one_pass_for_several_targets_equals_a_pass_for_each(two_states) -> None:
    volumes, _, images = two_states
    ring = dealt(images, targets=3, rings=2, seed=1)
    factors, kernels = torch.ones(len(images), 1), torch.eye(2)
    together = sums_around(images, ring, volumes[:1], factors)

    def cells(sums: KernelSums) -> list[torch.Tensor]:
        return [cell for half in sums.halves for cell in half]

    for target in range(3):
        alone = sums_around(images, ring[:, [target]], volumes[:1], factors)
        both = zip(cells(together.around(target, kernels)), cells(alone.around(0, kernels)), strict=True)
        assert all(torch.equal(one, other) for one, other in both)


def test_distances_are_in_the_metric_of_each_particles_posterior() -> None:
    rng = np.random.default_rng(2)
    z = np.concatenate([rng.normal(size=(500, 2)), np.zeros((500, 1))], axis=1)  # the third says nothing
    covariance = np.zeros((500, 3, 3))
    covariance[:, :2, :2] = [[0.5, 0.3], [0.3, 0.4]]
    covariance[1, :2, :2] *= 100
    target = np.array([[0.7, -0.2, 0.0], [0.0, 0.0, 5.0]])
    found = squared_distances(z, covariance, target)
    metric = covariance[0, :2, :2] + 0.01 * np.cov(z[:, :2].T)
    away = z[0, :2] - target[0, :2]
    assert found[0, 0] == pytest.approx(away @ np.linalg.inv(metric) @ away)
    nearer = (z[1, :2] - target[0, :2]) @ np.linalg.inv(covariance[0, :2, :2]) @ (z[1, :2] - target[0, :2])
    assert found[1, 0] < nearer / 50  # a particle that may be anywhere is near everything
    assert (squared_distances(np.zeros((5, 2)), np.zeros((5, 2, 2)), np.ones((1, 2))) == 0).all()


def test_rings_hold_particles_by_distance_and_kernels_fall_off() -> None:
    squared = np.random.default_rng(3).permutation(1000)[:, None].astype(float)
    rings = rings_of(squared, (0.02, 0.1, 1.0))
    assert rings.size[0].tolist() == [50, 50, 900]  # the first has no fewer than 50
    assert (squared[rings.ring[:, 0] == 1, 0] >= 50).all()
    assert rings.edge[0] ** 2 == pytest.approx([49, 99, 999])
    weights = rings.weights(0)
    assert (weights[:, 0] == 1).all()
    assert weights[1, 2] == 0
    assert weights[2, 1] > weights[2, 2] > 0
    effective = rings.n_effective(0)
    assert effective[0] == pytest.approx(50)
    assert 50 < effective[1] < 100
    some = rings_of(np.where(squared < 200, 0.0, np.inf), (1.0,))
    assert some.size.tolist() == [[200]]
    assert (some.ring[squared >= 200] == -1).all()


def test_bands_share_every_shell_among_them() -> None:
    for smooth in (True, False):
        weights = band_weights(32, smooth=smooth)
        assert torch.allclose(weights.sum(0), torch.ones(17, dtype=torch.float64))
        assert weights.min() >= 0


def test_the_map_of_a_state_has_no_density_of_the_other_states_subunit(two_states) -> None:
    volumes, state, images = two_states
    average = volumes.mean(0)  # a model that knows no states
    z = torch.stack([state.double() * 4, torch.zeros(len(state))], 1).numpy()
    z += 0.1 * np.random.default_rng(4).normal(size=z.shape)
    covariance = np.tile(0.05 * np.eye(2), (len(z), 1, 1))
    rings = rings_of(squared_distances(z, covariance, np.array([[0.0, 0], [4, 0]])))
    ones = torch.ones(len(state), 1)
    sums = sums_around(images, rings.ring, average[None], ones)
    subunit = volumes[1] - volumes[0]

    def occupancy(density: torch.Tensor) -> float:
        return float(((density - volumes[0]) * subunit).sum() / subunit.square().sum())

    found = [state_of(sums, rings, i, average) for i in range(2)]
    assert abs(occupancy(found[0].density)) < 0.15
    assert abs(occupancy(found[1].density) - 1) < 0.15
    assert abs(occupancy(sum(found[0].halves) / 2)) < 0.15
    assert found[0].residual_share > 0.01
    assert fsc_of_halves(found[0].halves)[1:5].min() > 0.9


def test_where_the_model_is_right_its_map_stays_nearly_as_it_is(two_states) -> None:
    volumes, state, images = two_states
    rings = rings_of(state[:, None].double().numpy())
    right = torch.nn.functional.one_hot(state).float()
    found = state_of(sums_around(images, rings.ring, volumes, right), rings, 0, volumes[0])
    assert found.residual_share < 2e-3


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subspace of 600 particles of 16 px, with a stack of their full box of 24 px beside its own."""
    folder = tmp_path_factory.mktemp("particle_volumes")
    run(
        *f"simulate -o {folder}/set --box-size 24 --pixel-size 8 --particles 600 --snr 0.5".split(),
    )
    run("import", folder / "set/particles.star", "-o", folder / "import")
    for box in (16, 24):
        run("preprocess", folder / "import", "--box-size", box, "-o", folder / f"stack_{box}")
    run("train", folder / "stack_16", "--method", "subspace", "-o", folder / "run")
    latents = read_latents(folder / "run")
    write_z(folder / "z.csv", latents.z[[5, 50, 500]])
    return folder


def volumes(trained: Path, output: Path, *words: object):
    start = ["volumes", trained / "run", "-o", output, "--source", "particles"]
    return CliRunner().invoke(app, [str(word) for word in (*start, *words)])


@pytest.fixture(scope="module")
def plain(trained: Path) -> Path:
    """Volumes at three particles, from the run's own stack."""
    done = volumes(trained, trained / "plain", "--z", trained / "z.csv")
    assert done.exit_code == 0, done.output
    return trained / "plain"


@pytest.fixture(scope="module")
def full(trained: Path) -> Path:
    """The same from the stack of the full box."""
    words = ("--z", trained / "z.csv", "--stack", trained / "stack_24")
    done = volumes(trained, trained / "full", *words)
    assert done.exit_code == 0, done.output
    return trained / "full"


def read(path: Path) -> tuple[np.ndarray, float]:
    with mrcfile.open(path) as mrc:
        return mrc.data.copy(), float(mrc.voxel_size.x)


def test_volumes_come_with_half_maps_and_what_they_are_worth(plain: Path) -> None:
    table = pq.read_table(plain / "volumes.parquet").to_pandas()
    assert table.path.tolist() == ["vol_000.mrc", "vol_001.mrc", "vol_002.mrc"]
    assert sorted(p.name for p in plain.glob("*.mrc")) == table.path.tolist()
    assert len(list((plain / "halves").iterdir())) == 6
    assert not table.fsc_independent.any()
    assert table.n_effective.between(50, 600).all()
    assert (table.resolution_fsc05_a >= table.resolution_fsc0143_a).all()
    assert table.resolution_fsc0143_a.between(24, 60).all()
    assert (table.kernel_width_0 > 0).all()
    for row in table.itertuples():
        for path in (row.path, row.half1_path, row.half2_path):
            density, voxel_a = read(plain / path)
            assert density.shape == (16, 16, 16)
            assert voxel_a == pytest.approx(12.0)
            grid = np.arange(16) - 8
            radius = np.sqrt(grid[:, None, None] ** 2 + grid[:, None] ** 2 + grid**2)
            assert abs(density[(radius > 7) & (radius < 8)].mean()) < 0.01 * density.max()


def test_a_stack_of_the_full_box_gives_maps_of_the_full_box(trained: Path, full: Path) -> None:
    truth = read_truth(trained / "set")
    rows = truth.rows_of(read_latents(trained / "run").particle_id[[5, 50, 500]])
    states = truth.nearest_state(truth.particle_states[rows])
    for number, state in enumerate(states):
        density, voxel_a = read(full / f"vol_{number:03d}.mrc")
        assert density.shape == (24, 24, 24)
        assert voxel_a == pytest.approx(8.0)
        assert np.corrcoef(density.ravel(), truth.volumes[state].ravel())[0, 1] > 0.93


def test_a_models_map_has_the_grey_scale_of_the_images_of_another_box(trained: Path, full: Path) -> None:
    z = read_latents(trained / "run").z[[5]]
    model, stack = load_model(trained / "run"), Stack.open(trained / "stack_24")
    drawn = particle_volumes.ModelOnStack(model=model, targets=z, stack=stack).map_at(0)
    halves = [read(full / f"halves/vol_000_half{half}.mrc")[0] for half in (1, 2)]
    seen = torch.from_numpy(sum(halves)) / 2
    assert float((seen * drawn).sum() / drawn.square().sum()) == pytest.approx(1, abs=0.15)


def test_many_targets_in_several_passes_give_the_same_maps(trained, plain, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    kept = load_model(trained / "run").maps.nbytes
    one_target = kept + work_bytes(BOX) + sums_bytes(BOX, 1, 3, with_model=True)
    words = ("--z", trained / "z.csv", "--memory-gb", 1.01 * one_target / 2**30)
    assert volumes(trained, tmp_path / "many", *words).exit_code == 0
    assert "passes: 3" in caplog.text
    for number in range(3):
        one, many = (read(folder / f"vol_{number:03d}.mrc")[0] for folder in (plain, tmp_path / "many"))
        assert np.abs(one - many).max() < 1e-4 * one.max()


def test_ids_take_these_particles_alike(trained: Path, tmp_path: Path) -> None:
    ids = read_latents(trained / "run").particle_id
    write_ids(tmp_path / "ids.txt", ids[100:300])
    assert volumes(trained, tmp_path / "maps", "--ids", tmp_path / "ids.txt").exit_code == 0
    table = pq.read_table(tmp_path / "maps/volumes.parquet").to_pandas()
    assert table.n_effective.tolist() == [200]
    write_ids(tmp_path / "ids.txt", ids[:1])
    done = volumes(trained, tmp_path / "none", "--ids", tmp_path / "ids.txt")
    assert isinstance(done.exception, InputFormatError)
    assert "one half set" in str(done.exception)
    assert not (tmp_path / "none").exists()


def test_filter_hand_and_crop_are_those_of_decoded_maps(trained: Path, plain: Path, tmp_path: Path) -> None:
    changed = ("--low-pass-a", 40, "--flip-hand", "--crop-px", 12)
    assert volumes(trained, tmp_path / "changed", "--z", trained / "z.csv", *changed).exit_code == 0
    half, mirrored = (
        read(folder / "halves/vol_000_half1.mrc")[0] for folder in (plain, tmp_path / "changed")
    )
    assert mirrored.shape == (12, 12, 12)
    flipped = np.roll(half[::-1], 1, 0)[2:14, 2:14, 2:14]
    assert np.abs(mirrored - flipped).max() < 1e-4 * half.max()
    sharp, smooth = (read(folder / "vol_000.mrc")[0] for folder in (plain, tmp_path / "changed"))
    assert smooth.max() < sharp.max()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--box-size", 8), "--crop-px"),
        (("--crop-px", 18), "up to the map's 16 px"),
        (("--low-pass-a", 5), "finer than"),
    ],
)
def test_what_does_not_fit_particles_is_refused(trained: Path, tmp_path: Path, words, message) -> None:
    done = volumes(trained, tmp_path / "maps", "--z", trained / "z.csv", *words)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
    assert not (tmp_path / "maps").exists()


def test_a_decoder_reads_no_stack(trained: Path, tmp_path: Path) -> None:
    words = [
        "volumes",
        trained / "run",
        "--z",
        trained / "z.csv",
        "-o",
        tmp_path / "maps",
        "--stack",
        tmp_path,
    ]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(done.exception, ConfigError)


def test_a_stack_that_is_missing_or_of_others_is_refused(
    trained: Path, tiny_set: Path, tmp_path: Path
) -> None:
    for stack, message in ((tmp_path / "gone", "--stack"), (tiny_set / "stack", "not in this stack")):
        done = volumes(trained, tmp_path / "maps", "--z", trained / "z.csv", "--stack", stack)
        assert isinstance(done.exception, InputFormatError)
        assert message in str(done.exception)


def test_a_decoder_predicts_particles_at_the_nearest_target(tiny_set: Path, tmp_path: Path) -> None:
    run(
        *f"train {tiny_set}/stack -o {tmp_path}/run --encoder image --decoder mlp --epochs 2".split(),
        *["--latent-dim", "2", "--encoder-width", "16", "--decoder-width", "16"],
    )
    run("volumes", tmp_path / "run", "--kmeans", 2, "--source", "particles", "-o", tmp_path / "maps")
    assert len(list((tmp_path / "maps").glob("vol_*.mrc"))) == 2
