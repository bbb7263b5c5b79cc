"""Pose offsets: their sign and unit, their part in the likelihood, and when they are used."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import blobs
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.evaluate import evaluate, latent_scores, read_truth, sample_points
from cryodrgn_pipeline.fourier.slices import extract_slices, slice_coordinates, volume_grid
from cryodrgn_pipeline.fourier_images import FourierImages
from cryodrgn_pipeline.io.runs import read_latents, write_z
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.images import level_plane
from cryodrgn_pipeline.subspace.poses import (
    SHIFTS,
    TURN_SPREAD_DEG,
    TURNS,
    PoseOffsets,
    marginalised,
    moves,
    read_pose_offsets,
)
from cryodrgn_pipeline.subspace.posterior import posterior
from cryodrgn_pipeline.subspace.solve import Lattice
from cryodrgn_pipeline.subspace.sums import InnerProducts, inner_products

BOX, COUNT = 32, 60


def moved_images(offset: torch.Tensor) -> tuple[FourierImages, torch.Tensor]:
    """Noise-free images of a particle that lies off the poses that they carry, and its map."""
    volume, plane = blobs.density(BOX), level_plane(BOX, BOX // 2)
    given = blobs.rotations(COUNT)
    true = given @ torch.from_numpy(Rotation.from_rotvec(offset[:, :3].numpy()).as_matrix()).float()
    scale = torch.where(torch.arange(COUNT) % 3 == 0, 1.1, 1.0)
    slices = extract_slices(volume_grid(volume), slice_coordinates(plane, true, scale))
    centre = (true[:, :2] @ offset[:, 3:, None].float())[..., 0] * scale[:, None]  # in boxes of the image
    phase = -2 * np.pi * (centre[:, :1] * plane.kx + centre[:, 1:] * plane.ky)
    images = FourierImages(
        plane=plane,
        coefficients=slices * torch.polar(torch.ones_like(phase), phase),
        ctf=torch.ones(COUNT, len(plane)),
        rotation=given,
        scale=scale,
        noise_group=torch.zeros(COUNT, dtype=torch.long),
    )
    return images, volume


@pytest.fixture(scope="module")
def offset() -> torch.Tensor:
    rng = torch.Generator().manual_seed(5)
    turn, shift = torch.randn(2, COUNT, 3, generator=rng, dtype=torch.float64)
    return torch.cat([np.deg2rad(1.5) * turn, 0.005 * shift], dim=1)


def left_of(images: FourierImages, volume: torch.Tensor) -> float:
    """The share of the images' power that slices of the map do not explain."""
    slices = extract_slices(
        volume_grid(volume), slice_coordinates(images.plane, images.rotation, images.scale)
    )
    return float((images.coefficients - slices).abs().square().sum() / slices.abs().square().sum())


def test_images_with_their_offsets_applied_are_slices_at_the_poses_they_carry(offset) -> None:
    images, volume = moved_images(offset)
    poses = PoseOffsets(offset=offset, shift_spread=1.0)
    assert left_of(images, volume) > 0.005
    assert left_of(poses.applied(images, slice(0, COUNT)), volume) < 1e-9


def test_images_ask_for_the_offsets_that_they_have(offset) -> None:
    images, volume = moved_images(offset)
    lattice, weight = Lattice(BOX), torch.ones(1, len(images.plane))
    columns = lattice.columns(torch.cat([volume[None], moves(volume)]))
    poses = PoseOffsets.start(COUNT)
    for _ in range(3):  # Gauss-Newton
        products = inner_products(columns, lattice.size, poses.applied(images, slice(0, COUNT)), weight)
        _, answer = marginalised(products, poses, slice(0, COUNT))
        nowhere = torch.zeros(COUNT, 0, dtype=torch.float64)
        poses = poses.after(poses.step(answer, nowhere, slice(0, COUNT)))
    assert left_of(poses.applied(images, slice(0, COUNT)), volume) < 1e-3 * left_of(images, volume)
    assert (poses.offset - offset)[:, :3].abs().max() < np.deg2rad(0.2)


def test_integrating_offsets_out_is_the_evidence_of_six_more_components(offset) -> None:
    """Scaled to variance 1 the moves are components like any other; those have a closed form of their own."""
    rng = torch.Generator().manual_seed(6)
    root = torch.randn(9, 8, 20, generator=rng, dtype=torch.float64)
    products = InnerProducts(
        gram=root @ root.mT,
        inner=torch.randn(9, 8, generator=rng, dtype=torch.float64) * 4,
        power=torch.full((9,), 50.0, dtype=torch.float64),
        gain=torch.zeros(9, dtype=torch.float64),
    )
    poses = PoseOffsets(offset=torch.zeros(9, 6, dtype=torch.float64), shift_spread=0.7)
    seen, _ = marginalised(products, poses, slice(0, 9))
    size = torch.tensor([1, 1] + [np.deg2rad(TURN_SPREAD_DEG)] * 3 + [0.7] * 3, dtype=torch.float64)
    scaled = replace(products, gram=products.gram * size[:, None] * size, inner=products.inner * size)
    one, other = posterior(seen, 100, 0.0), posterior(scaled, 100, 0.0)
    assert torch.allclose(one.evidence, other.evidence)
    assert torch.allclose(one.z, other.z[:, :1])
    assert torch.allclose(one.covariance, other.covariance[:, :1, :1])


def test_an_offset_that_is_known_already_is_not_counted_twice(offset) -> None:
    """Corrected images ask for no further step: the prior holds the whole offset, not the rest alone."""
    images, volume = moved_images(torch.zeros_like(offset))
    lattice, weight = Lattice(BOX), torch.full((1, len(images.plane)), 1e-9)  # these say next to nothing
    columns = lattice.columns(torch.cat([volume[None], moves(volume)]))
    poses = PoseOffsets(offset=offset, shift_spread=0.1)
    products = inner_products(columns, lattice.size, images, weight)
    _, answer = marginalised(products, poses, slice(0, COUNT))
    after = poses.step(answer, torch.zeros(COUNT, 0, dtype=torch.float64), slice(0, COUNT))
    assert after.offset.abs().max() < 1e-3 * offset.abs().max()  # back to the prior


def run(command: str) -> None:
    done = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subspace of 1500 particles whose poses are off by 3° and a pixel."""
    folder = tmp_path_factory.mktemp("poses")
    run(
        f"simulate -o {folder}/set --box-size 32 --pixel-size 6 --particles 1500 --snr 0.3 --pose-error 3 "
        "--shift-error 6"
    )
    run(f"import {folder}/set/particles.star -o {folder}/import")
    run(f"preprocess {folder}/import --box-size 32 -o {folder}/stack")
    run(f"train {folder}/stack --method subspace -o {folder}/run")
    return folder


def test_wrong_poses_are_found_and_corrected(learnt: Path) -> None:
    manifest = json.loads((learnt / "run" / "run.json").read_text())["pose_offsets"]
    assert manifest["corrected"]
    assert 4 < manifest["shift_spread_a"] < 8
    truth, given = read_truth(learnt / "set"), Stack.open(learnt / "stack").particles.poses
    latents, offsets = read_latents(learnt / "run"), read_pose_offsets(learnt / "run", 32 * 6.0)
    assert given is not None
    assert offsets is not None
    rows = truth.rows_of(latents.particle_id)
    names = [f"rotation_{i}{j}" for i in range(3) for j in range(3)]
    true = np.stack([truth.table[name][rows] for name in names], axis=1).reshape(-1, 3, 3)
    corrected = given.rotation @ Rotation.from_rotvec(offsets.offset[:, :3].numpy()).as_matrix()
    before, after = (angles_deg(rotation, true) for rotation in (given.rotation, corrected))
    assert 2.5 < before < 3.5
    assert after < 0.95 * before


def angles_deg(rotation: np.ndarray, other: np.ndarray) -> float:
    """Root mean square angle between two sets of rotations, apart from what all have in common."""
    between = Rotation.from_matrix(other.transpose(0, 2, 1) @ rotation)
    common = between.mean()
    return float(np.rad2deg(np.sqrt(np.mean((common.inv() * between).magnitude() ** 2))))


def test_wrong_poses_do_not_become_components(learnt: Path) -> None:
    scores = latent_scores(learnt / "run", read_truth(learnt / "set"))
    assert scores["r2"]["motion"] > 0.85
    assert scores["r2"]["occupancy"] > 0.6


def test_volumes_from_particles_are_made_at_the_corrected_poses(learnt: Path) -> None:
    as_given = learnt / "as_given"
    shutil.copytree(learnt / "run", as_given)
    table = pd.read_parquet(as_given / "latent.parquet")
    table.drop(columns=[*TURNS, *SHIFTS]).to_parquet(as_given / "latent.parquet")
    scores = []
    for folder in (learnt / "run", as_given):
        ids, z = sample_points(folder, learnt / "set", count=4)
        write_z(folder / "z.csv", z)
        (folder / "ids.txt").write_text("\n".join(map(str, ids)) + "\n")
        run(f"volumes {folder} --z {folder}/z.csv --source particles -o {folder}/maps")
        scored = evaluate(folder / "maps", learnt / "set", run=folder, particles=folder / "ids.txt")
        scores.append(scored["fsc_auc"]["union"])
    assert scores[0] > scores[1] + 0.005
