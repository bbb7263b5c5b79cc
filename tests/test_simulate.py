"""Simulated sets: the truth is exact, and the files tell it as RELION and cryoSPARC would."""

from __future__ import annotations

import filecmp
import hashlib
import json
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.simulate import Settings, phantom_of, signal_spectra, simulate
from cryodrgn_pipeline.simulation.images import ctf_plane, noise_filter, slices, volume
from cryodrgn_pipeline.simulation.particles import draw_particles
from cryodrgn_pipeline.simulation.phantom import ARM, ARM_SUBUNIT, BODY, MOTIONS, SUBUNIT
from cryodrgn_pipeline.simulation.structure import coarse_grained, read_pdb, structure_phantom

D, PIXEL_A = 32, 6.0
SMALL = Settings(box_size=D, particles=130, pixel_size_a=PIXEL_A, states=3, snr=50.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "set"
    simulate(SMALL, folder)
    return folder


def density(motion: float, occupancy: float) -> np.ndarray:
    phantom = phantom_of(SMALL)
    position, weight = phantom.states(np.array([motion]), np.array([occupancy]))
    return volume(position[0], weight[0], sigma_a=phantom.sigma_a, box_size_px=D, pixel_size_a=PIXEL_A)


def projection(
    rotation: np.ndarray, shift_a: np.ndarray, motion: float = 0.3, occupancy: float = 1.0
) -> np.ndarray:
    phantom = phantom_of(SMALL)
    position, weight = phantom.states(np.array([motion]), np.array([occupancy]))
    placed = position @ rotation.T
    placed[..., :2] -= shift_a
    spectrum = slices(
        torch.from_numpy(placed).float(),
        torch.from_numpy(weight).float(),
        pixel_size_a=torch.tensor([PIXEL_A]),
        sigma_a=phantom.sigma_a,
        box_size_px=D,
    )
    return torch.fft.irfft2(spectrum[0], s=(D, D)).numpy()


def relion_matrix(rot: float, tilt: float, psi: float) -> np.ndarray:
    """RELION's Euler_angles2matrix, written out from its documentation."""
    a, b, g = np.deg2rad([rot, tilt, psi])
    ca, cb, cg, sa, sb, sg = np.cos(a), np.cos(b), np.cos(g), np.sin(a), np.sin(b), np.sin(g)
    cc, cs, sc, ss = cb * ca, cb * sa, sb * ca, sb * sa
    return np.array(
        [
            [cg * cc - sg * sa, cg * cs + sg * ca, -cg * sb],
            [-sg * cc - cg * sa, -sg * cs + cg * ca, sg * sb],
            [sc, ss, cb],
        ]
    )


def test_an_unrotated_image_is_the_volume_summed_along_z():
    summed = density(0.3, 1.0).sum(axis=0)
    np.testing.assert_allclose(projection(np.eye(3), np.zeros(2)), summed, atol=2e-5 * summed.max())


def test_a_quarter_turn_about_z_turns_the_image_from_x_to_y():
    turn = Rotation.from_euler("z", 90, degrees=True).as_matrix()  # x → y
    upright, turned = projection(np.eye(3), np.zeros(2)), projection(turn, np.zeros(2))
    # (x, y) → (−y, x) about the origin at D/2; index 0 (−D/2) has no partner
    expected = upright.T[1:, :0:-1]
    np.testing.assert_allclose(turned[1:, 1:], expected, atol=1e-4 * upright.max())


def test_a_view_from_the_side_sums_along_another_axis():
    turn = Rotation.from_euler("x", 90, degrees=True).as_matrix()  # y → z, z → −y
    summed = density(0.3, 1.0).sum(axis=1)
    expected = summed[:0:-1, 1:]
    np.testing.assert_allclose(projection(turn, np.zeros(2))[1:, 1:], expected, atol=1e-4 * summed.max())


def test_moving_the_content_by_plus_shift_centres_it():
    centred = projection(np.eye(3), np.zeros(2))
    shifted = projection(np.eye(3), np.array([3 * PIXEL_A, -2 * PIXEL_A]))
    np.testing.assert_allclose(np.roll(shifted, (-2, 3), axis=(0, 1)), centred, atol=1e-4 * centred.max())


def test_an_image_is_its_particles_projection_by_its_true_pose_through_its_ctf():
    particles, rows = draw_particles(SMALL), np.array([3, 70])
    spectra = signal_spectra(particles, rows, phantom_of(SMALL), SMALL)
    reported = particles.reported.take(rows)
    transfer = ctf_plane(reported.optics, reported.ctf, b_factor_a2=SMALL.b_factor_a2)
    for place, row in enumerate(rows):
        pose, shift = particles.poses.rotation[row], particles.poses.shift_a[row]
        clean = projection(pose, shift, particles.motion[row], particles.occupancy[row])
        expected = torch.fft.rfft2(torch.from_numpy(clean)) * transfer[place]
        torch.testing.assert_close(spectra[place], expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("motion", MOTIONS)
def test_only_the_arm_moves_and_only_the_subunit_comes_and_goes(motion):
    phantom = phantom_of(Settings(motion=motion, motion_range=30.0))
    position, weight = phantom.states(np.array([0.0, 1.0]), np.array([1.0, 0.0]))
    still = phantom.domain != ARM
    assert np.array_equal(position[0, still], position[1, still])
    assert np.array_equal(position[0], position[1]) == (motion == "none")
    assert np.all(weight[1, phantom.domain == SUBUNIT] == 0)
    assert np.array_equal(weight[0, phantom.domain != SUBUNIT], weight[1, phantom.domain != SUBUNIT])
    radius = np.linalg.norm(position, axis=-1).max()
    assert radius <= Settings().diameter_a / 2 * 1.001
    assert {BODY, ARM, SUBUNIT} == set(phantom.domain.tolist())


def test_a_hinge_keeps_the_arm_rigid_and_turns_it_by_its_range():
    phantom = phantom_of(Settings(motion_range=70.0))
    position, _ = phantom.states(np.array([0.0, 1.0]), np.ones(2))
    arm = position[:, phantom.domain == ARM] - phantom.pivot_a
    np.testing.assert_allclose(np.linalg.norm(arm[0], axis=1), np.linalg.norm(arm[1], axis=1))
    turn, _ = Rotation.align_vectors(arm[1], arm[0])
    assert np.rad2deg(turn.magnitude()) == pytest.approx(70.0)


def test_the_molecule_has_a_hand():
    position = phantom_of(Settings()).position_a
    about = position - position.mean(axis=0)
    _, axes = np.linalg.eigh(about.T @ about)
    along = about @ axes
    skew = (along**3).mean(axis=0) / (along**2).mean(axis=0) ** 1.5
    handedness = np.prod(skew) * np.linalg.det(axes)
    assert abs(handedness) > 1e-3  # a mirror image would have the opposite sign


def test_truth_is_band_limited(made):
    spectrum = np.abs(np.fft.fftshift(np.fft.fftn(mrcfile.read(made / "truth/volumes/state_000.mrc"))))
    k = np.arange(D) - D // 2
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2)
    assert spectrum[radius >= D / 2].max() < 1e-5 * spectrum.max()
    assert spectrum[(radius < D / 2) & (radius > D / 2 - 1)].max() > 1e-3 * spectrum.max()


def test_the_star_file_holds_the_true_poses_in_relions_convention(made):
    blocks = starfile.read(made / "particles.star")
    table, truth = blocks["particles"], pd.read_parquet(made / "truth/truth.parquet")
    assert list(table["rlnImageName"]) == list(truth["particle_id"])
    for row in range(0, len(table), 7):
        angles = [float(table[f"rlnAngle{name}"][row]) for name in ("Rot", "Tilt", "Psi")]
        true = truth.loc[row, [f"rotation_{i}{j}" for i in range(3) for j in range(3)]]
        np.testing.assert_allclose(relion_matrix(*angles).ravel(), true.to_numpy(float), atol=1e-7)
    np.testing.assert_allclose(table["rlnOriginXAngst"], truth["shift_x_a"], atol=1e-6)
    np.testing.assert_allclose(table["rlnOriginYAngst"], truth["shift_y_a"], atol=1e-6)
    assert np.abs(truth["shift_x_a"]).max() > 0.04 * D * PIXEL_A


def test_the_cs_file_holds_the_same_particles_and_its_passthrough_another_order(made):
    cs = np.load(made / "particles.cs")
    truth = pd.read_parquet(made / "truth/truth.parquet")
    assert np.array_equal(cs["uid"], truth["uid"])
    assert cs["uid"].min() > 2**53
    rotation = Rotation.from_rotvec(cs["alignments3D/pose"]).as_matrix().transpose(0, 2, 1)
    expected = truth[[f"rotation_{i}{j}" for i in range(3) for j in range(3)]].to_numpy().reshape(-1, 3, 3)
    np.testing.assert_allclose(rotation, expected, atol=1e-6)
    shift_a = cs["alignments3D/shift"] * cs["alignments3D/psize_A"][:, None]
    np.testing.assert_allclose(shift_a[:, 0], truth["shift_x_a"], atol=1e-5)
    assert not np.allclose(cs["alignments3D/psize_A"], cs["blob/psize_A"])
    names = [
        f"{index + 1:06d}@{path.decode()}"
        for index, path in zip(cs["blob/idx"].tolist(), cs["blob/path"].tolist(), strict=True)
    ]
    assert names == list(truth["particle_id"])
    extra = np.load(made / "particles_passthrough.cs")
    assert set(extra["uid"].tolist()) == set(cs["uid"].tolist())
    assert not np.array_equal(extra["uid"], cs["uid"])


def test_each_row_names_its_own_image(made):
    particles = draw_particles(SMALL)
    signal = torch.fft.irfft2(
        signal_spectra(particles, np.arange(SMALL.particles), phantom_of(SMALL), SMALL), s=(D, D)
    ).numpy()
    images = particles.reported.images
    stacks = [mrcfile.read(made / name) for name in images.stack_paths]
    assert len(stacks) == 2
    stored = np.stack([stacks[s][i] for s, i in zip(images.stack, images.index, strict=True)])
    for image, clean in zip(stored, signal, strict=True):
        assert np.corrcoef(image.ravel(), clean.ravel())[0, 1] > 0.9
    order = images.stack * 1000 + images.index
    assert np.any(np.diff(order) < 0)  # table order is not image order


@pytest.mark.parametrize("colour", [0.0, 3.0])
def test_the_signal_to_noise_ratio_is_the_one_asked_for(tmp_path, colour):
    settings = Settings(particles=256, snr=0.2, states=2, noise_colour=colour, stacks=1)
    simulate(settings, tmp_path / "set")
    scale = json.loads((tmp_path / "set/simulate.json").read_text())["grey_scale"]
    particles = draw_particles(settings)
    signal = scale * torch.fft.irfft2(
        signal_spectra(particles, np.arange(256), phantom_of(settings), settings), s=(D, D)
    )
    noise = (
        mrcfile.read(tmp_path / "set/stacks/stack_000.mrcs")[particles.reported.images.index] - signal.numpy()
    )
    ratio = float(signal.var(dim=(1, 2)).mean()) / noise.var(axis=(1, 2)).mean()
    assert ratio == pytest.approx(0.2, rel=0.03)


def test_coloured_noise_is_stronger_at_low_frequency_and_of_the_same_power():
    amplitude = noise_filter(64, 3.0)
    noise = torch.fft.irfft2(
        torch.fft.rfft2(torch.randn(200, 64, 64, generator=torch.Generator().manual_seed(1))) * amplitude
    )
    assert float(noise.var()) == pytest.approx(1.0, rel=0.03)
    assert float(amplitude[0, 1] / amplitude[0, 32]) == pytest.approx(2.0, rel=0.02)


def test_the_consensus_is_the_mean_of_the_states_by_their_share(made):
    folder = made / "truth/volumes"
    states = pd.read_csv(folder / "states.csv")
    weight = np.where(states["occupancy"] == 1, 0.6, 0.4) * np.where(states["motion"] == 0.5, 0.5, 0.25)
    mean = sum(w * mrcfile.read(folder / name) for w, name in zip(weight, states["path"], strict=True))
    consensus = mrcfile.read(made / "consensus.mrc")
    np.testing.assert_allclose(consensus, mean, atol=1e-5 * consensus.max())
    with mrcfile.open(made / "consensus.mrc") as mrc:
        assert float(mrc.voxel_size.x) == pytest.approx(PIXEL_A)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(made, tmp_path):
    simulate(SMALL, tmp_path / "again")
    files = sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file())
    assert len(files) > 8
    assert filecmp.cmpfiles(made, tmp_path / "again", files, shallow=False)[0] == files
    first = draw_particles(SMALL)
    other = draw_particles(Settings(**{**_as_dict(SMALL), "seed": 1}))
    assert not np.allclose(first.poses.rotation, other.poses.rotation)


def _as_dict(settings: Settings) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(settings)


def test_dark_on_light_images_say_so_in_the_cs_file(made, tmp_path):
    dark = Settings(**{**_as_dict(SMALL), "dark_on_light": True})
    simulate(dark, tmp_path / "dark")
    light = mrcfile.read(made / "stacks/stack_000.mrcs")
    np.testing.assert_array_equal(mrcfile.read(tmp_path / "dark/stacks/stack_000.mrcs"), -light)
    assert set(np.load(tmp_path / "dark/particles.cs")["blob/sign"].tolist()) == {-1.0}
    assert set(np.load(made / "particles.cs")["blob/sign"].tolist()) == {1.0}


def test_pose_errors_are_in_the_tables_and_not_in_the_truth():
    exact = draw_particles(Settings(particles=2000))
    blurred = draw_particles(Settings(particles=2000, pose_error_deg=4.0, shift_error_a=2.0))
    off = Rotation.from_matrix(
        blurred.reported.poses.rotation @ blurred.poses.rotation.transpose(0, 2, 1)
    ).magnitude()
    assert np.sqrt(np.mean(np.rad2deg(off) ** 2)) == pytest.approx(4.0, rel=0.1)
    assert np.std(blurred.reported.poses.shift_a - blurred.poses.shift_a) == pytest.approx(2.0, rel=0.1)
    np.testing.assert_array_equal(exact.poses.rotation, exact.reported.poses.rotation)


def test_uniform_views_cover_the_sphere_and_preferred_views_do_not():
    views = {
        kind: draw_particles(Settings(particles=4000, orientations=kind)).poses.rotation[:, 2]
        for kind in ("uniform", "preferred")
    }
    assert np.abs(views["uniform"].T @ views["uniform"] / 4000 - np.eye(3) / 3).max() < 0.03
    assert (views["preferred"][:, 2] ** 2).mean() > 0.5


def test_optics_groups_may_differ_in_pixel_size(tmp_path):
    simulate(Settings(particles=110, states=2, pixel_size_spread=0.02, optics_groups=3), tmp_path / "mixed")
    optics = starfile.read(tmp_path / "mixed/particles.star")["optics"]
    np.testing.assert_allclose(optics["rlnImagePixelSize"], [6.0, 6.06, 6.12])


def test_junk_and_contrast_are_what_was_asked_for():
    particles = draw_particles(Settings(particles=4000, junk=0.1, contrast_spread=0.2))
    assert particles.junk.mean() == pytest.approx(0.1, abs=0.02)
    assert particles.contrast.std() == pytest.approx(0.2, abs=0.02)
    settings = Settings(particles=8, junk=1.0)
    drawn = draw_particles(settings)
    clean = draw_particles(Settings(particles=8))
    rows = np.arange(8)
    phantom = phantom_of(settings)
    debris, good = (signal_spectra(p, rows, phantom, settings) for p in (drawn, clean))
    assert not torch.allclose(debris, good)


def test_the_command_line_writes_the_set_and_names_it(tmp_path):
    out = tmp_path / "set"
    arguments = ["simulate", "-o", str(out), "--particles", "60", "--states", "2", "--motion", "none"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert str(out / "particles.star") in result.output
    states = pd.read_csv(out / "truth/volumes/states.csv")
    assert sorted(states["occupancy"]) == [0, 1]


@pytest.mark.parametrize(
    ("option", "value"), [("--box-size", "33"), ("--snr", "0"), ("--motion", "dance"), ("--occupancy", "1.2")]
)
def test_settings_that_make_no_sense_are_refused(tmp_path, option, value):
    result = CliRunner().invoke(app, ["simulate", "-o", str(tmp_path / "set"), option, value])
    assert isinstance(result.exception, ConfigError)
    assert value in str(result.exception)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("words", "cure"), [("--junk 1", "lower --junk"), ("--motion slide --motion-range 500", "--motion-range")]
)
def test_a_set_that_cannot_be_made_says_what_to_change(tmp_path, words, cure):
    result = CliRunner().invoke(app, ["simulate", "-o", str(tmp_path / "set"), *words.split()])
    assert isinstance(result.exception, ConfigError)
    assert cure in str(result.exception)


def test_a_folder_with_the_users_own_files_is_not_replaced(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ConfigError, match=r"mine\.txt"):
        simulate(Settings(particles=4, states=2, box_size=8), tmp_path)
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize("form", ["star", "cs"])
def test_import_finds_the_true_poses_defoci_and_images_in_either_form(made, tmp_path, form):
    arguments = ["import", str(made / f"particles.{form}"), "-o", str(tmp_path / "imported")]
    if form == "cs":
        arguments += ["--passthrough", str(made / "particles_passthrough.cs")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = pd.read_parquet(tmp_path / "imported/particles.parquet")
    truth = pd.read_parquet(made / "truth/truth.parquet")
    ids = "particle_id" if form == "star" else "uid"
    assert list(found["particle_id"]) == list(truth[ids])
    rotation = [f"rotation_{i}{j}" for i in range(3) for j in range(3)]
    np.testing.assert_allclose(found[rotation], truth[rotation], atol=1e-6)
    for column in ("shift_x_a", "shift_y_a"):
        np.testing.assert_allclose(found[column], truth[column], atol=1e-5)
    for column in ("defocus_u_a", "defocus_v_a", "defocus_angle_deg"):
        np.testing.assert_allclose(found[column], truth[column], rtol=1e-6)
    particles = draw_particles(SMALL).reported
    np.testing.assert_array_equal(found["image_index"], particles.images.index)
    np.testing.assert_array_equal(found["half_set"], particles.half_set)
    np.testing.assert_array_equal(found["micrograph"], particles.micrograph)


def pdb_line(serial: int, chain: str, residue: int, at: tuple[float, ...], atom: str = "CA") -> str:
    x, y, z = at
    return (
        f"ATOM  {serial:5d}  {atom:<3} ALA {chain}{residue:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 20.00"
        f"          {atom[0]:>2}"
    )


@pytest.fixture
def rod(tmp_path: Path) -> Path:
    """A rod along x, chain A from −60 to 18 Å and B from 20 to 60 Å, and chain C, a stub along y."""
    places = [("A" if x < 20 else "B", (float(x), 0.0, 0.1 * (x % 7))) for x in range(-60, 61, 2)]
    places += [("C", (-50.0, float(y), 0.0)) for y in range(4, 30, 2)]
    lines = [
        pdb_line(3 * n + k, chain, n + 1, (at[0], at[1] + k, at[2]), atom)
        for n, (chain, at) in enumerate(places)
        for k, atom in enumerate(("N", "CA", "H"))
    ]
    path = tmp_path / "rod.pdb"
    path.write_text("\n".join([*lines, "ENDMDL", pdb_line(1, "Z", 1, (0, 0, 0))]) + "\n")
    return path


def test_a_pdb_file_is_read_as_its_heavy_atoms_of_the_first_model(rod):
    atoms = read_pdb(rod)
    assert len(atoms) == 2 * (61 + 13)
    assert set(atoms.chain) == {"A", "B", "C"}
    assert atoms.weight[:2].tolist() == [7, 6]
    residues = coarse_grained(atoms)
    assert len(residues) == 61 + 13
    np.testing.assert_allclose(residues.weight, 13)
    np.testing.assert_allclose(residues.position_a[0], [-60, 6 / 13, 0.1 * (-60 % 7)], atol=1e-3)


def test_chains_of_a_structure_swing_rigidly_and_come_and_go(rod):
    phantom = structure_phantom(
        read_pdb(rod), sigma_a=2.0, box_a=200, motion_range=60, hinge_chain="B", absent_chain="C"
    )
    position, weight = phantom.states(np.array([0.0, 0.5, 1.0]), np.array([1.0, 1.0, 0.0]))
    moved = np.linalg.norm(position[2] - position[0], axis=1)
    arm, still = moved[phantom.domain == ARM], moved[phantom.domain != ARM]
    assert len(arm) == 21
    assert still.max() == 0
    assert arm.max() == pytest.approx(2 * np.sin(np.deg2rad(30)) * 40, rel=0.2)  # a lever of 40 Å
    assert set(weight[2, phantom.domain == SUBUNIT]) == {0.0}
    assert (phantom.domain == SUBUNIT).sum() == 13
    np.testing.assert_allclose(np.average(position[1], axis=0, weights=weight[1]), 0, atol=1e-9)


def test_without_chains_half_of_the_longest_axis_moves_and_one_end_of_the_second_is_absent(rod):
    phantom = structure_phantom(read_pdb(rod), sigma_a=2.0, box_a=300, motion_range=60)
    moves = np.isin(phantom.domain, (ARM, ARM_SUBUNIT))
    assert moves.sum() == 37
    x = phantom.position_a[:, 0]
    assert x[moves].min() > x[~moves].max() or x[moves].max() < x[~moves].min()
    absent = np.isin(phantom.domain, (SUBUNIT, ARM_SUBUNIT))
    assert 0.1 < phantom.weight[absent].sum() / phantom.weight.sum() <= 0.2
    gone = phantom.states(np.array([0.5]), np.array([0.0]))[1][0]
    assert np.array_equal(gone == 0, absent)


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        ("--hinge-chain Q", "its chains are A, B, C"),
        ("--absent-chain A,B,C", "choose a part"),
        ("--hinge-chain A:x-3", "A:1385-1760"),
        ("--motion twist", "--motion none"),
        ("--pixel-size 3", "raise --box-size or --pixel-size"),
        ("--particle-diameter 90", "leave the particle diameter away"),
        ("--species 3", "leave the structure away"),
    ],
)
def test_a_structure_that_cannot_be_used_says_what_to_change(tmp_path, rod, words, cure):
    arguments = ["simulate", "-o", str(tmp_path / "set"), "--structure", str(rod), *words.split()]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert cure in str(result.exception)


def test_a_damaged_structure_is_refused_with_its_line(tmp_path, rod):
    broken = tmp_path / "broken.pdb"
    broken.write_text(rod.read_text().replace("  N   ALA A   2", "  N   ALA A  x2"))
    with pytest.raises(InputFormatError, match="line 4"):
        read_pdb(broken)
    with pytest.raises(InputFormatError, match="no ATOM"):
        read_pdb(Path(__file__))


def test_a_set_of_a_structure_has_images_and_truth_of_it(tmp_path, rod):
    arguments = ["simulate", "-o", str(tmp_path / "set"), "--structure", str(rod), "--particles", "40"]
    arguments += ["--hinge-chain", "B", "--absent-chain", "C", "--states", "3", "--snr", "20"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "set/simulate.json").read_text())
    assert told["structure_sha256"] == hashlib.sha256(rod.read_bytes()).hexdigest()
    with_chain, without = (mrcfile.read(tmp_path / f"set/truth/volumes/state_00{k}.mrc") for k in (1, 4))
    gone = with_chain - without
    assert gone.sum() / with_chain.sum() == pytest.approx(13 / 74, rel=0.02)


def test_a_mixture_has_distinct_species_with_a_common_core():
    mixture = phantom_of(Settings(species=12))
    there = mixture.weight > 0
    what = [
        (tuple(mask), tuple(place[mask].ravel()))
        for mask, place in zip(there, mixture.position_a, strict=True)
    ]
    assert len(set(what)) == 12
    still = np.ptp(mixture.position_a, axis=0).max(axis=1) == 0
    common = there.all(axis=0) & still
    assert 0.25 < common.mean() < 0.6
    assert np.linalg.norm(mixture.position_a, axis=-1).max() <= Settings().diameter_a / 2 * 1.001
    volumes = [
        volume(place, weight, sigma_a=mixture.sigma_a, box_size_px=D, pixel_size_a=PIXEL_A).ravel()
        for place, weight in zip(mixture.position_a, mixture.weight, strict=True)
    ]
    alike = np.corrcoef(volumes)[np.triu_indices(12, 1)]
    assert alike.max() < 0.99
    assert alike.min() > 0.3


def test_a_mixture_is_written_with_the_species_of_every_particle(tmp_path):
    result = CliRunner().invoke(app, ["simulate", "-o", str(tmp_path), "--particles", "90", "--species", "4"])
    assert result.exit_code == 0, result.output
    truth = pd.read_parquet(tmp_path / "truth/truth.parquet")
    assert set(truth["species"]) == {0, 1, 2, 3}
    assert not {"motion", "occupancy", "motion_deg"} & set(truth)
    states = pd.read_csv(tmp_path / "truth/volumes/states.csv")
    assert list(states["species"]) == [0, 1, 2, 3]
    volumes = [mrcfile.read(tmp_path / "truth/volumes" / path) for path in states["path"]]
    consensus = mrcfile.read(tmp_path / "consensus.mrc")
    np.testing.assert_allclose(consensus, np.mean(volumes, axis=0), atol=1e-5 * consensus.max())


@pytest.mark.parametrize("kind", [{}, {"species": 3}])
def test_every_fault_of_a_real_set_can_be_simulated_at_once(tmp_path, kind):
    faults = {"junk": 0.3, "contrast_spread": 0.25, "noise_colour": 3.0, "pose_error_deg": 3.0}
    settings = Settings(particles=200, snr=5.0, states=2, shift_error_a=6.0, **faults, **kind)
    simulate(settings, tmp_path / "set")
    particles, phantom = draw_particles(settings), phantom_of(settings)
    told = json.loads((tmp_path / "set/simulate.json").read_text())
    truth = pd.read_parquet(tmp_path / "set/truth/truth.parquet")
    assert told["junk_particles"] == truth["junk"].sum() == particles.junk.sum() > 30
    assert truth["contrast"].std() == pytest.approx(0.25, abs=0.05)
    signal = told["grey_scale"] * torch.fft.irfft2(
        signal_spectra(particles, np.arange(200), phantom, settings), s=(D, D)
    )
    images, stacks = particles.reported.images, []
    for name in images.stack_paths:
        stacks.append(mrcfile.read(tmp_path / "set" / name))
    stored = np.stack([stacks[s][i] for s, i in zip(images.stack, images.index, strict=True)])
    noise = stored - signal.numpy()
    assert noise.var() == pytest.approx(1.0, rel=0.03)
    good = ~particles.junk
    assert float(signal[good].var(dim=(1, 2)).mean()) == pytest.approx(5.0, rel=0.1)
    power = (np.abs(np.fft.rfft2(noise)) ** 2).mean(axis=0)
    assert power[0, 1] / power[8:24, 16].mean() == pytest.approx(4.0, rel=0.25)
