"""Training: what it learns from, what it leaves behind, and that an interruption changes nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from images_on_disk import particle_set
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation

from cryodrgn_pipeline.devices import choose_device
from cryodrgn_pipeline.errors import (
    ConfigError,
    CryodrgnPipelineError,
    InputFormatError,
    Interrupted,
    TrainingError,
)
from cryodrgn_pipeline.fourier.ctf import ctf
from cryodrgn_pipeline.fourier.rotate import in_plane_angle, turned_half_plane
from cryodrgn_pipeline.fourier.transforms import centred_fft, half_plane, half_plane_coefficients
from cryodrgn_pipeline.io.ids import write_ids
from cryodrgn_pipeline.models.vae import Vae, VaeConfig
from cryodrgn_pipeline.particles import Ctf, Poses
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.training import loop
from cryodrgn_pipeline.training.data import TrainingData
from cryodrgn_pipeline.training.loop import Trainer
from cryodrgn_pipeline.training.losses import reconstruction
from cryodrgn_pipeline.training.run import TrainingRequest, split_held_out, train_vae
from cryodrgn_pipeline.training.settings import TrainingSettings
from cryodrgn_pipeline.training.state import StopRequest, only_writer

MODEL = VaeConfig(box_size_px=16, latent_dim=2, encoder_width=16, decoder_width=16, encoder_layers=1)
SETTINGS = TrainingSettings(epochs=2, coordinate_fraction=0.5, learning_rate=1e-3, device="cpu", threads=1)


@pytest.fixture
def request_for(tiny_set, tmp_path):
    base = TrainingRequest(
        stack=tiny_set / "stack",
        run=tmp_path / "run",
        subset=None,
        model=MODEL,
        settings=SETTINGS,
        resume=True,
    )

    def make(**changes) -> TrainingRequest:
        recipe = {name: changes.pop(name) for name in list(changes) if name in TrainingSettings.__slots__}
        return replace(base, settings=replace(SETTINGS, **recipe), **changes)

    return make


def trainer_on(
    stack: Path, settings: TrainingSettings = SETTINGS, state=None, model: VaeConfig = MODEL, **data_options
) -> Trainer:
    opened = Stack.open(stack)
    rows = np.arange(len(opened))
    cpu = torch.device("cpu")
    options = {"in_memory": True, "device": cpu} | data_options
    data = TrainingData(opened, rows, model, **options)
    return Trainer(
        Vae(model),
        data,
        settings,
        train_rows=rows[:80],
        held_out_rows=rows[80:],
        device=cpu,
        state=state,
    )


def latents(run: Path):
    return pq.read_table(run / "latent.parquet").to_pandas()


def metrics(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_latents_of_every_particle_weights_metrics_and_a_manifest(request_for, tiny_set):
    request = request_for()
    train_vae(request)
    table = latents(request.run)
    assert table.particle_id.tolist() == Stack.open(tiny_set / "stack").particles.particle_id.tolist()
    assert {"z_0", "z_1", "std_0", "std_1", "loss", "held_out"} <= set(table.columns)
    assert table.dtypes[["z_0", "std_1", "loss"]].eq(np.float32).all()
    assert np.isfinite(table[["z_0", "z_1", "loss"]]).all(axis=None)
    assert (table[["std_0", "std_1"]] > 0).all(axis=None)
    assert table.held_out.sum() == round(0.05 * 96)
    rows = metrics(request.run)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["held_out_reconstruction"]) for row in rows)
    manifest = json.loads((request.run / "run.json").read_text())
    assert manifest["settings"]["seed"] == 0
    assert manifest["versions"]["torch"].startswith("2.")
    assert manifest["stack_fingerprint"] == Stack.open(tiny_set / "stack").fingerprint


@pytest.mark.parametrize(("batch_size", "rate"), [(16, 1e-4), (64, 2e-4), (256, 4e-4)])
def test_the_learning_rate_grows_with_the_root_of_the_batch_unless_it_is_given(batch_size, rate, tiny_set):
    settings = TrainingSettings(batch_size=batch_size, device="cpu")
    (group,) = trainer_on(tiny_set / "stack", settings).optimizer.param_groups
    assert group["lr"] == pytest.approx(rate)
    assert replace(settings, learning_rate=3e-3).step_size == 3e-3


def test_training_lowers_the_held_out_loss(request_for):
    request = request_for(epochs=15, held_out_fraction=0.2)
    train_vae(request)
    rows = metrics(request.run)
    assert rows[-1]["held_out_reconstruction"] < rows[0]["held_out_reconstruction"]


@pytest.mark.parametrize(
    "options",
    [{}, {"frequency_marching": 2, "model": replace(MODEL, loss="whitened", encoder_filter="wiener")}],
)
def test_an_interrupted_training_resumes_to_the_same_weights_and_metrics(request_for, monkeypatch, options):
    monkeypatch.setattr("cryodrgn_pipeline.training.windows.CHUNK_BYTES", 8 * 1024)
    monkeypatch.setattr("cryodrgn_pipeline.training.windows.WINDOW_BYTES", 24 * 1024)
    whole = request_for(**options)
    broken = replace(whole, run=whole.run.with_name("broken"))
    train_vae(whole)
    take_step, steps = Trainer._step, []

    def step_then_signal(self, batch):
        steps.append(batch)
        if len(steps) == 9:  # in the middle of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step_then_signal)
        with pytest.raises(Interrupted) as stopped:
            train_vae(broken)
    assert stopped.value.signal_number == signal.SIGTERM
    assert not (broken.run / "run.json").exists()
    train_vae(replace(broken, settings=replace(broken.settings, in_memory=False)))
    first, second = (load_file(request.run / "model.safetensors") for request in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for one, two in zip(metrics(whole.run), metrics(broken.run), strict=True):
        assert one["loss"] == two["loss"]
        assert one["held_out_reconstruction"] == two["held_out_reconstruction"]


def test_more_epochs_continue_and_equal_a_run_of_that_length(request_for):
    short = request_for(epochs=1)
    train_vae(short)
    train_vae(replace(short, settings=replace(short.settings, epochs=2)))
    other = request_for(run=short.run.with_name("long"))
    train_vae(other)
    first, second = (load_file(request.run / "model.safetensors") for request in (short, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_left_as_it_is(request_for):
    request = request_for()
    train_vae(request)
    before = (request.run / "model.safetensors").stat().st_mtime_ns
    train_vae(request)
    assert (request.run / "model.safetensors").stat().st_mtime_ns == before
    train_vae(replace(request, settings=replace(request.settings, seed=1)))
    assert (request.run / "model.safetensors").stat().st_mtime_ns != before


@pytest.mark.parametrize("change", [{"seed": 1}, {"resume": False, "epochs": 3}])
def test_checkpoints_that_do_not_belong_are_moved_aside_never_deleted(request_for, change):
    request = request_for()
    train_vae(request)
    old = (request.run / "checkpoints" / "state.pt").read_bytes()
    old_latents = (request.run / "latent.parquet").read_bytes()
    train_vae(request_for(**change))
    aside = [path for path in request.run.glob("checkpoints.*") if path.is_dir()]
    assert [(path / "state.pt").read_bytes() for path in aside] == [old]
    assert [(path / "latent.parquet").read_bytes() for path in aside] == [old_latents]


def test_a_subset_trains_and_reports_its_particles_only(request_for, tiny_set, tmp_path):
    known = Stack.open(tiny_set / "stack").particles.particle_id
    write_ids(tmp_path / "ids.txt", known[[40, 3, 77, 12]])
    request = request_for(subset=tmp_path / "ids.txt", held_out_fraction=0.0)
    train_vae(request)
    assert latents(request.run).particle_id.tolist() == known[[3, 12, 40, 77]].tolist()


def test_an_id_that_is_not_in_the_stack_is_refused(request_for, tmp_path):
    (tmp_path / "ids.txt").write_text("7@nowhere.mrcs\n")
    with pytest.raises(InputFormatError, match=r"1 of 1 ids are not among .* stack .*7@nowhere"):
        train_vae(request_for(subset=tmp_path / "ids.txt"))


def test_a_loss_that_is_not_a_number_stops_and_names_the_batch(tiny_set):
    trainer = trainer_on(tiny_set / "stack")
    trainer.data._coefficients[17] = float("nan")
    bad = trainer.data.stack.particles.particle_id[17]
    saved = []
    with pytest.raises(TrainingError, match="not a number") as stopped:
        trainer.run(lambda: saved.append(True), StopRequest())
    assert str(bad) in str(stopped.value)
    assert not saved


@pytest.mark.parametrize("encoder_input", ["aligned", "image"])
def test_images_from_memory_and_from_disk_are_the_same(tiny_set, encoder_input):
    rows, model = np.array([5, 90, 31]), replace(MODEL, encoder_input=encoder_input)
    kept = trainer_on(tiny_set / "stack", model=model).data.batch(rows)
    read = trainer_on(tiny_set / "stack", model=model, in_memory=False).data.batch(rows)
    torch.testing.assert_close(kept.coefficients, read.coefficients)
    torch.testing.assert_close(kept.seen, read.seen)
    assert torch.equal(kept.ctf, read.ctf)


def test_the_encoder_reads_phase_flipped_images():
    stack = turned_recordings([0.0, 35.0])
    model = replace(MODEL, box_size_px=32, encoder_input="image")
    data = TrainingData(stack, np.arange(2), model, in_memory=True, device=torch.device("cpu"))
    batch = data.batch(np.arange(2))
    assert (batch.ctf < 0).any()
    assert (batch.ctf > 0).any()
    torch.testing.assert_close(batch.seen, batch.coefficients * batch.ctf.sign())


def coloured_recordings() -> SimpleNamespace:
    """Recordings of two optics groups whose noise spectra differ."""
    stack = turned_recordings([0.0, 35.0, 100.0, 250.0])
    shell = np.arange(17.0)
    optics = replace(stack.particles.optics, optics_group=np.array([3, 3, 7, 7]))
    stack.particles = replace(stack.particles, optics=optics)
    stack.noise = {3: 4.0 + shell, 7: 40.0 - 2 * shell}
    stack.total_power = {group: noise * (1 + 2 / (1 + shell)) for group, noise in stack.noise.items()}
    stack.path = Path("somewhere")
    return stack


def test_a_whitened_loss_divides_by_the_noise_of_the_optics_group_and_keeps_its_size():
    stack, model = coloured_recordings(), replace(MODEL, box_size_px=32, loss="whitened")
    data = TrainingData(stack, np.arange(4), model, in_memory=True, device=torch.device("cpu"))
    batch, radius = data.batch(np.arange(4)), data.plane.radius.numpy()
    weight = batch.weights(slice(None), slice(None)).double()
    total, flat = 0.0, 0.0
    for row, group in enumerate([3, 3, 7, 7]):
        noise = torch.from_numpy(np.interp(radius, np.arange(17), stack.noise[group]))
        power = torch.from_numpy(np.interp(radius, np.arange(17), stack.total_power[group]))
        torch.testing.assert_close(weight[row] * noise / (weight[0, 0] * 5), torch.ones(len(radius)).double())
        total, flat = total + (weight[row] * power).sum(), flat + power.sum()
    torch.testing.assert_close(total, flat)
    difference = torch.randn(4, len(radius), dtype=torch.complex64)
    torch.testing.assert_close(
        reconstruction(
            batch.coefficients + difference, batch.coefficients, batch.weights(slice(None), slice(4))
        ),
        (weight * difference.abs() ** 2).mean(1).float(),
        atol=1e-3,
        rtol=1e-3,
    )


@pytest.mark.parametrize("encoder_input", ["image", "aligned"])
def test_a_wiener_filter_undoes_the_ctf_as_far_as_the_spectra_allow(encoder_input):
    stack = coloured_recordings()
    model = replace(MODEL, box_size_px=32, encoder_input=encoder_input, encoder_mask_radius=0.5)
    flipping, filtering = (
        TrainingData(stack, np.arange(4), each, in_memory=True, device=torch.device("cpu"))
        for each in (model, replace(model, encoder_filter="wiener"))
    )
    flipped, filtered = (data.batch(np.arange(4)).seen for data in (flipping, filtering))
    torch.testing.assert_close(filtered.abs().square().mean(), torch.tensor(1.0))
    plane = model.encoder_plane()
    k = torch.stack([plane.kx, plane.ky], dim=-1)
    everyone = torch.arange(4)
    squared = filtering._transfer(everyone, k).square()
    where = k if encoder_input == "image" else turned_half_plane(plane, in_plane_angle(filtering._rotation))
    transfer = filtering._transfer(everyone, where)
    gain = torch.empty_like(transfer)
    for rows in (slice(0, 2), slice(2, 4)):
        snr = 2 / (1 + plane.radius) / squared[rows].mean(0)
        gain[rows] = (transfer[rows].abs() / (transfer[rows] ** 2 + 1 / snr)).float()
    torch.testing.assert_close(filtered * filtering.input_scale, flipped * gain, atol=1e-3, rtol=0.05)


def test_a_wiener_filter_that_would_pass_nothing_is_refused():
    stack = coloured_recordings()
    stack.total_power[7] = stack.noise[7]
    model = replace(MODEL, box_size_px=32, encoder_filter="wiener")
    with pytest.raises(InputFormatError, match="optics group 7 have no more power than their noise"):
        TrainingData(stack, np.arange(4), model, in_memory=True, device=torch.device("cpu"))


def test_marching_starts_at_a_quarter_of_the_radius_and_ends_at_the_whole(tiny_set):
    trainer = trainer_on(tiny_set / "stack", replace(SETTINGS, frequency_marching=2))
    radius, batches = trainer.data.plane.radius, 5  # 80 images, 16 at a time
    counts = []
    for trainer.progress.step in range(2 * batches + 1):
        counts.append(trainer.points_in_disc())
    assert counts[0] == int((radius <= radius.max() / 4).sum())
    assert counts == sorted(counts)
    assert counts[5] == int((radius <= radius.max() * 0.625).sum())
    assert counts[-2] < counts[-1] == len(radius)
    assert trainer_on(tiny_set / "stack").points_in_disc() == len(radius)


def test_marching_draws_its_share_of_the_coordinates_inside_the_disc(tiny_set, monkeypatch):
    trainer = trainer_on(tiny_set / "stack", replace(SETTINGS, frequency_marching=2))
    seen, piece = [], Trainer._backward_piece
    monkeypatch.setattr(
        Trainer,
        "_backward_piece",
        lambda self, b, p, points, z: seen.append(points) or piece(self, b, p, points, z),
    )
    trainer.progress.step = 4
    inside = trainer.points_in_disc()
    trainer._step(trainer.data.batch(np.arange(4)))
    assert len(set(seen[0].tolist())) == round(0.5 * inside)
    assert max(seen[0].tolist()) < inside < len(trainer.data.plane)


def test_the_encoder_can_read_low_frequencies_only(tiny_set):
    model = replace(MODEL, encoder_input="image", encoder_mask_radius=0.5)
    data = trainer_on(tiny_set / "stack", model=model).data
    batch, inner = data.batch(np.arange(9)), data.plane.radius <= 4
    torch.testing.assert_close(batch.seen.abs(), batch.coefficients[:, inner].abs())


def turned_recordings(angles_deg: list[float]) -> SimpleNamespace:
    """One particle seen from one direction at several in-plane angles, its astigmatism turned with it."""
    d, n, pixel_a = 32, len(angles_deg), 4.0
    view = Rotation.from_euler("ZYZ", [20, 50, 0], degrees=True).as_matrix().T
    turn = Rotation.from_rotvec(np.outer(np.radians(angles_deg), [0, 0, 1])).as_matrix()
    particles = particle_set([Path("none.mrcs")], [0] * n, list(range(n)), pixel_size_a=pixel_a)
    defocus = {"defocus_u_a": np.full(n, 2.5e4), "defocus_v_a": np.full(n, 1.5e4)}
    particles = replace(
        particles,
        poses=Poses(rotation=turn @ view, shift_a=np.zeros((n, 2))),
        ctf=Ctf(**defocus, defocus_angle_deg=10.0 + np.array(angles_deg), phase_shift_deg=np.zeros(n)),
    )
    atoms = np.array([[5.0, 0, 1], [-3, 4, 2], [0, -6, -2]])
    x = torch.arange(d).double() - d // 2
    k = torch.stack(torch.meshgrid(x, x, indexing="ij")).flatten(1) / (d * pixel_a)
    images = []
    for row in range(n):
        places = torch.from_numpy(atoms @ particles.poses.rotation[row].T)
        blobs = [torch.exp(-((x[None] - p[0]) ** 2 + (x[:, None] - p[1]) ** 2) / 4.5) for p in places]
        one = particles.take(np.array([row]))
        parts = {
            name: torch.from_numpy(getattr(part, name))
            for part, names in (
                (one.ctf, Ctf.__slots__),
                (one.optics, ("voltage_kv", "cs_mm", "amplitude_contrast")),
            )
            for name in names
        }
        transfer = ctf(k[0], k[1], **parts).reshape(d, d)
        spectrum = torch.fft.ifftshift(centred_fft(sum(blobs)) * transfer)
        images.append(torch.fft.fftshift(torch.fft.ifft2(spectrum)).real.float().numpy())
    return FakeStack(particles=particles, pixel_size_a=pixel_a, box_size_px=d, images=np.stack(images))


class FakeStack(SimpleNamespace):
    """What training asks of a stack, from memory."""

    def __len__(self) -> int:
        return len(self.particles)

    def read(self, rows):
        return self.images[rows]


def test_the_encoder_sees_the_same_aligned_image_however_it_lay_in_its_plane():
    stack = turned_recordings([0.0, 35.0, 100.0, 250.0])
    model = replace(MODEL, box_size_px=32, encoder_mask_radius=0.5)
    data = TrainingData(stack, np.arange(4), model, in_memory=True, device=torch.device("cpu"))
    seen = data.batch(np.arange(4)).seen
    spread = (seen - seen[0]).abs().square().sum(1) / seen[0].abs().square().sum()
    assert spread.max() < 0.01
    as_they_are = TrainingData(
        stack, np.arange(4), replace(model, encoder_input="image"), in_memory=True, device=torch.device("cpu")
    )
    seen = as_they_are.batch(np.arange(4)).seen
    spread = (seen - seen[0]).abs().square().sum(1) / seen[0].abs().square().sum()
    assert spread[1:].min() > 0.1


def test_coefficients_are_normalised_by_one_sigma_that_a_resume_keeps(tiny_set):
    data = trainer_on(tiny_set / "stack").data
    power = data.batch(np.arange(96)).coefficients.abs().square().mean()
    torch.testing.assert_close(power, torch.tensor(1.0))
    assert trainer_on(tiny_set / "stack", scale=2.5).data.scale == 2.5


def test_a_signal_while_losses_are_in_flight_saves_them_all(tiny_set, monkeypatch):
    monkeypatch.setitem(loop.LOSSES_IN_FLIGHT, "cpu", 64)
    trainer, stop, saved = trainer_on(tiny_set / "stack"), StopRequest(), []

    def signal_after_the_batch(self, since):
        stop.signal_number = signal.SIGTERM
        return since

    monkeypatch.setattr(Trainer, "_clock", signal_after_the_batch)
    with pytest.raises(Interrupted):
        trainer.run(lambda: saved.append(trainer.progress.sums["images"]), stop)
    assert saved == [trainer.progress.batch * SETTINGS.batch_size]


def test_the_smallest_share_of_the_coordinates_is_one_frequency(tiny_set):
    trainer = trainer_on(tiny_set / "stack", replace(SETTINGS, coordinate_fraction=1e-6))
    error, _ = trainer._step(trainer.data.batch(np.arange(4)))
    assert torch.isfinite(error).all()


def test_the_gradient_does_not_depend_on_how_many_points_are_in_flight(tiny_set, monkeypatch):
    weights = []
    for points in (40, 10**6):
        monkeypatch.setitem(loop.POINTS_IN_FLIGHT, "cpu", points)
        trainer = trainer_on(tiny_set / "stack")
        trainer._step(trainer.data.batch(np.arange(16)))
        weights.append([p.grad for p in trainer.vae.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other)


def test_the_pieced_gradient_is_that_of_the_written_loss(tiny_set):
    trainer = trainer_on(tiny_set / "stack", replace(SETTINGS, coordinate_fraction=1.0))
    batch = trainer.data.batch(np.arange(8))
    trainer._step(batch)
    ours = [p.grad.clone() for p in trainer.vae.parameters()]
    fresh = trainer_on(tiny_set / "stack")
    mean, log_variance = fresh.vae.encode(batch.seen)
    draws = torch.Generator().manual_seed(loop._mix(SETTINGS.seed, 0))
    noise = torch.randn(mean.shape, generator=draws)
    z = mean + noise * torch.exp(0.5 * log_variance)
    everything = slice(None)
    coordinates = batch.coordinates(fresh.data.plane, everything, everything)
    predicted = fresh.vae.decode_slices(coordinates, z, batch.transfer(everything, everything))
    mse = (predicted - batch.coefficients).abs().square().mean()
    kld = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
    (mse + 0.5 * kld / (2 * len(fresh.data.plane))).backward()
    for one, other in zip(ours, [p.grad for p in fresh.vae.parameters()], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_each_update_draws_its_own_share_of_the_coordinates(tiny_set, monkeypatch):
    trainer = trainer_on(tiny_set / "stack")
    seen = []
    piece = Trainer._backward_piece
    monkeypatch.setattr(
        Trainer,
        "_backward_piece",
        lambda self, b, p, points, z: seen.append(points) or piece(self, b, p, points, z),
    )
    for _ in range(2):
        trainer._step(trainer.data.batch(np.arange(4)))
        trainer.progress.step += 1
    assert [len(set(points.tolist())) for points in seen] == [round(0.5 * len(trainer.data.plane))] * 2
    assert set(seen[0].tolist()) != set(seen[1].tolist())


def test_a_finer_image_pixel_scales_coordinates_and_amplitude_as_the_same_object_would(tiny_set):
    """A Gaussian projected at two pixel sizes: one volume explains both images."""
    d, sigma_a, volume_pixel_a = 32, 9.0, 4.0

    def projection(pixel_a: float) -> torch.Tensor:
        x = (torch.arange(d).double() - d // 2) * pixel_a
        return torch.exp(-(x[:, None] ** 2 + x[None, :] ** 2) / (2 * sigma_a**2))

    plane = half_plane(d, 8)
    data = trainer_on(tiny_set / "stack").data
    batch = replace(
        data.batch(np.arange(2)),
        ctf=torch.ones(2, len(plane)),
        rotation=torch.eye(3).expand(2, 3, 3),
        magnification=torch.tensor([1.0, volume_pixel_a / 3.0]),
    )
    k = batch.coordinates(plane, slice(None), slice(None)).double()
    # the transform of the Gaussian's projection in volume pixels, at the coordinates asked for
    in_px = sigma_a / volume_pixel_a
    volume = 2 * torch.pi * in_px**2 * torch.exp(-2 * torch.pi**2 * in_px**2 * (k**2).sum(-1))
    predicted = volume * batch.transfer(slice(None), slice(None))
    for image, row in ((projection(4.0), 0), (projection(3.0), 1)):
        torch.testing.assert_close(
            predicted[row],
            half_plane_coefficients(image, plane).real,
            atol=1e-3,
            rtol=1e-4,
            check_dtype=False,
        )


def test_repeats_of_one_image_stay_on_the_same_side_of_the_hold_out():
    ids = np.array([f"{i}@a.mrcs{suffix}" for i in range(50) for suffix in ("", "#2", "#3")], dtype=object)
    training, held_out = split_held_out(np.arange(150), ids, 0.2, 0)
    assert len(held_out) == 30
    assert sorted([*training, *held_out]) == list(range(150))
    assert not set(training // 3) & set(held_out // 3)


def test_only_one_training_writes_to_a_folder(request_for):
    request = request_for()
    me = f"process {os.getpid()} on {socket.gethostname()}"
    with only_writer(request.run), pytest.raises(CryodrgnPipelineError, match=f"another process.*{me} holds"):
        train_vae(request)


def test_mixed_precision_trains(request_for):
    request = request_for(epochs=1, amp=True)
    train_vae(request)
    assert np.isfinite(latents(request.run).loss).all()


def test_cuda_without_a_gpu_is_refused():
    if torch.cuda.is_available():
        assert choose_device("cuda").type == "cuda"
    else:
        with pytest.raises(ConfigError, match="sees no GPU"):
            choose_device("cuda")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("frequency_marching", -1),
        ("learning_rate", 0.0),
        ("coordinate_fraction", 1.5),
        ("held_out_fraction", 1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_option_name(name, value):
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
        TrainingSettings(**{name: value})


def start_training(tiny_set: Path, run: Path, epochs: int) -> subprocess.Popen:
    command = (
        f"train {tiny_set}/stack -o {run} --encoder image --decoder mlp --epochs {epochs} "
        "--encoder-width 16 --decoder-width 16 --resume"
    )
    command += (
        " --latent-dim 2 --checkpoint-every-minutes 1e-9 --threads 1 --device cpu"  # a save every batch
    )
    return subprocess.Popen(
        [sys.executable, "-m", "cryodrgn_pipeline", *command.split()], stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        os.sched_yield()


def test_a_killed_training_goes_on_from_its_checkpoint_to_the_same_weights_and_losses(tiny_set, tmp_path):
    run = tmp_path / "run"
    victim = start_training(tiny_set, run, 100_000)
    wait_for(run / "checkpoints" / "state.pt", victim)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    state = torch.load(run / "checkpoints" / "state.pt", weights_only=True)
    assert not (run / "run.json").exists()
    rerun = start_training(tiny_set, run, state["epoch"] + 2)
    _, log = rerun.communicate()
    assert rerun.returncode == 0, log
    assert "resuming after" in log
    assert json.loads((run / "run.json").read_text())["epochs"] == state["epoch"] + 2
    whole = start_training(tiny_set, tmp_path / "whole", state["epoch"] + 2)
    _, log = whole.communicate()
    assert whole.returncode == 0, log
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for one, two in zip(metrics(tmp_path / "whole"), metrics(run), strict=True):
        assert one["loss"] == two["loss"]
        assert one["held_out_reconstruction"] == two["held_out_reconstruction"]
    assert latents(tmp_path / "whole").equals(latents(run))


def test_sigterm_even_twice_as_slurm_does_saves_and_ends_with_the_signals_exit_code(tiny_set, tmp_path):
    run = tmp_path / "run"
    victim = start_training(tiny_set, run, 100_000)
    wait_for(run / "checkpoints" / "state.pt", victim)
    victim.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    victim.send_signal(signal.SIGTERM)
    _, log = victim.communicate()
    assert victim.returncode == 128 + signal.SIGTERM, log
    assert "--resume" in log


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tiny tmpfs needs root")
def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays_whole(tiny_set, tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=140k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("this system does not let a test mount a tmpfs")
    try:
        victim = start_training(tiny_set, tmp_path / "run", 3)
        _, log = victim.communicate()
        assert victim.returncode == 1, log
        assert "No space left on device" in log
        assert "Traceback" not in log
        assert not (tmp_path / "run" / "run.json").exists()
        state = tmp_path / "run" / "checkpoints" / "state.pt"
        if state.exists():
            torch.load(state, weights_only=True)
        assert not list((tmp_path / "run").glob("**/.*.pt*"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
