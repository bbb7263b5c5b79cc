"""From a stack to batches: normalised half-plane coefficients, CTFs, and what the encoder reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from cryodrgn_pipeline.fourier.ctf import ctf
from cryodrgn_pipeline.fourier.rotate import coefficients_at, in_plane_angle, turned_half_plane
from cryodrgn_pipeline.fourier.transforms import half_plane_coefficients
from cryodrgn_pipeline.io.memory import available_bytes
from cryodrgn_pipeline.models.vae import VaeConfig
from cryodrgn_pipeline.progress import progress
from cryodrgn_pipeline.ranks import ALONE, Ranks
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.subspace.poses import PoseOffsets
from cryodrgn_pipeline.training.batch import Batch, Placed
from cryodrgn_pipeline.training.spectra import group_rows, loss_weights, signal_to_noise
from cryodrgn_pipeline.training.windows import Windows, read_in_order

log = logging.getLogger(__name__)

READ_ROWS = 512  # images read at a time into memory
NORMALISATION_IMAGES = 1000
AHEAD = 3  # batches


class TrainingData:
    """The chosen rows of a stack as batches, from memory or read as they are needed.

    Parameters
    ----------
    stack, rows
        The stack, and which of its rows belong to this training (ascending).
    model
        What frequencies its loss takes and its encoder reads, and how the latter is turned and filtered.
    in_memory
        Hold all coefficients in memory (8 bytes per frequency and image); None decides by what is free.
    device
        Where batches go.
    scale, input_scale
        σ that coefficients are divided by, and what a Wiener filter's output is divided by; estimated from
        the images when None.
    placed
        What the subspace says about the particles, where the model starts from it.
    copies
        How many processes on this node hold the same in memory.
    """

    def __init__(
        self,
        stack: Stack,
        rows: NDArray[np.int64],
        model: VaeConfig,
        *,
        in_memory: bool | None,
        device: torch.device,
        scale: float | None = None,
        input_scale: float | None = None,
        placed: Placed | None = None,
        copies: int = 1,
    ) -> None:
        self.stack, self.rows, self.device = stack, rows, device
        plane, encoder_plane = model.plane(), model.encoder_plane()
        self.plane = plane.to(device)
        self._plane_cpu, self._encoder_plane = plane, encoder_plane.to(device)
        self._features = placed.features.to(device) if placed and model.encoder == "subspace" else None
        self._aligned = model.encoder_input == "aligned" and self._features is None
        particles = stack.particles.take(rows)
        self.particle_id = particles.particle_id
        poses, optics = particles.require_poses("train"), particles.optics
        self._position = np.full(len(stack), -1, dtype=np.int64)
        self._position[rows] = np.arange(len(rows))

        def tensor(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device)

        self._rotation = tensor(poses.rotation)
        self._magnification = tensor(stack.pixel_size_a / optics.pixel_size_a)
        self._image_length_a = tensor(optics.pixel_size_a * optics.box_size_px)
        self._ctf = {
            "defocus_u_a": tensor(particles.ctf.defocus_u_a),
            "defocus_v_a": tensor(particles.ctf.defocus_v_a),
            "defocus_angle_deg": tensor(particles.ctf.defocus_angle_deg),
            "phase_shift_deg": tensor(particles.ctf.phase_shift_deg),
            "voltage_kv": tensor(optics.voltage_kv),
            "cs_mm": tensor(optics.cs_mm),
            "amplitude_contrast": tensor(optics.amplitude_contrast),
        }
        self._contrast: Tensor | None = None
        self._shift: Tensor | None = None
        if placed is not None:
            self._contrast = placed.contrast.float().to(device)
            self._correct(placed.poses)
        coloured = model.loss == "whitened"
        self._weight = loss_weights(stack, rows, plane).float().to(device) if coloured else None
        wiener = model.encoder_filter == "wiener" and self._features is None
        self._group = group_rows(stack, rows).to(device) if coloured or wiener else None
        self.scale = self._estimate_scale() if scale is None else scale
        self._snr = self._signal_to_noise() if wiener else None
        self._width = len(plane) + (len(encoder_plane) if self._aligned else 0)
        needed = 8 * self._width * len(rows)
        if in_memory is None:
            in_memory = copies * needed < 0.5 * available_bytes()
        log.info(
            "%d images of %d px %s (%.2f GB of coefficients)",
            len(rows),
            stack.box_size_px,
            "held in memory" if in_memory else "read from the stack as needed",
            needed / 1e9,
        )
        self._coefficients: Tensor | None = None
        self.input_scale = 1.0 if input_scale is None else input_scale
        if wiener and input_scale is None:
            self.input_scale = self._estimate_input_scale()
        self._coefficients = self._load_all() if in_memory else None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def windows(self) -> Windows:
        """How images are mixed, and read when they are not in memory."""
        return Windows.of(self.stack.images)

    def batch(
        self,
        rows: NDArray[np.int64],
        ranks: Ranks = ALONE,
        images: NDArray[np.floating[Any]] | None = None,
    ) -> Batch:
        """The batch of the given stack rows: the share of this rank, its images read before or now."""
        whole, rows = rows, rows[ranks.share(len(rows))]
        position = torch.from_numpy(self._position[rows])
        if self._coefficients is None:
            read = torch.from_numpy(self.stack.read(rows) if images is None else images)
            stored = self._transformed(self._sent(read), position)
        else:
            stored = self._sent(self._coefficients[position])
        position = position.to(self.device)
        transfer = self._transfer(position, torch.stack([self.plane.kx, self.plane.ky], dim=-1))
        coefficients = stored[:, : len(self.plane)]
        contrast = None if self._contrast is None else self._contrast[position, None]
        weight = None
        if self._weight is not None and self._group is not None:
            weight = self._weight[self._group[position]]
        return Batch(
            rows=rows,
            whole=whole,
            position=position,
            coefficients=coefficients,
            ctf=transfer if contrast is None else transfer * contrast,
            weight=weight,
            seen=self._seen(position, stored, transfer),
            rotation=self._rotation[position],
            magnification=self._magnification[position],
        )

    def _seen(self, position: Tensor, stored: Tensor, transfer: Tensor) -> Tensor:
        if self._features is not None:
            return self._features[position]
        if self._aligned:
            seen = stored[:, len(self.plane) :]
            angle = in_plane_angle(self._rotation[position])
            transfer = self._transfer(position, turned_half_plane(self._encoder_plane, angle))
        else:
            inner = slice(len(self._encoder_plane))
            seen, transfer = stored[:, inner], transfer[:, inner]
        if self._snr is None or self._group is None:
            return seen * torch.where(transfer < 0, -1.0, 1.0)
        snr = self._snr[self._group[position]]
        return seen * (transfer * snr / (transfer**2 * snr + 1) / self.input_scale)

    def batches(
        self, order: NDArray[np.int64], batch_size: int, first: int = 0, ranks: Ranks = ALONE
    ) -> Iterator[Batch]:
        """Batches of the rows in `order` from batch number `first`: of each the share of this rank.

        One thread reads a window of the order ahead, another makes batches of what was read, or of what is in
        memory for a GPU. They are threads, not forked workers: reading, transforms and copies run outside
        Python's lock, and a fork beside running threads may inherit a lock that nobody opens.
        """
        starts = range(first * batch_size, len(order), batch_size)
        parts = [order[start : start + batch_size] for start in starts]
        if self._coefficients is not None and self.device.type == "cpu":
            yield from (
                self.batch(part, ranks) for part in parts
            )  # a second thread would only take the cores from the network
            return
        images: Iterator[NDArray[np.floating[Any]] | None] = repeat(None)
        if self._coefficients is None:
            own = [part[ranks.share(len(part))] for part in parts]
            images = read_in_order(self.stack.images, own, [start // self.windows.window for start in starts])

        def prepared(part: NDArray[np.int64]) -> Batch:
            return self.batch(part, ranks, next(images))

        with ThreadPoolExecutor(1, thread_name_prefix="batches") as preparing:
            ahead = [preparing.submit(prepared, part) for part in parts[:AHEAD]]
            for number in range(len(parts)):
                ready = ahead.pop(0).result()
                ahead += [preparing.submit(prepared, part) for part in parts[number + AHEAD :][:1]]
                yield ready

    def epoch_order(self, rows: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
        """A random order of `rows`, fixed by seed and epoch.

        From memory the order is the same as from disk: how much memory is free when a training resumes must
        not change the result.
        """
        return self.windows.order(rows, seed, epoch)

    def _sent(self, values: Tensor) -> Tensor:
        """The values on the device; a GPU fetches them from pinned memory while the CPU goes on."""
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def _transfer(self, position: Tensor, k: Tensor) -> Tensor:
        """CTF `(B, P)` at `(P, 2)` or `(B, P, 2)` frequencies (kx, ky) in cycles per box."""
        per_a = k / self._image_length_a[position, None, None]
        parameters = {name: value[position] for name, value in self._ctf.items()}
        return ctf(per_a[..., 1], per_a[..., 0], **parameters)

    def _read(self, rows: NDArray[np.int64]) -> Tensor:
        """What `_transformed` makes of rows of the stack, on the CPU."""
        return self._transformed(
            torch.from_numpy(self.stack.read(rows)), torch.from_numpy(self._position[rows])
        )

    def _transformed(self, images: Tensor, position: Tensor) -> Tensor:
        """Coefficients at the half plane and, where the encoder wants them, of the turned images.

        They are made where the images lie.
        """
        images, device = images.float(), images.device
        plane = self._plane_cpu if device.type == "cpu" else self.plane
        coefficients = half_plane_coefficients(images, plane)
        coefficients = self._shifted(coefficients, torch.stack([plane.kx, plane.ky], dim=-1), position)
        if self._aligned:
            angle = in_plane_angle(self._rotation[position.to(self.device)].to(device))
            k = turned_half_plane(self._encoder_plane.to(device), angle)
            turned = self._shifted(coefficients_at(images, k), k, position)
            coefficients = torch.cat([coefficients, turned], dim=1)
        return coefficients / self.scale

    def _correct(self, poses: PoseOffsets | None) -> None:
        """Rotations and shifts as these offsets, in the frame of the map, change them."""
        if poses is None:
            return
        turn = Rotation.from_rotvec(poses.offset[:, :3].numpy()).as_matrix()
        rotation = self._rotation.cpu() @ torch.from_numpy(turn).float()
        in_image = (rotation[:, :2] @ poses.offset[:, 3:, None].float())[..., 0]
        self._shift = in_image * self._magnification.cpu()[:, None]  # boxes
        self._rotation = rotation.to(self.device)

    def _shifted(self, coefficients: Tensor, k: Tensor, position: Tensor) -> Tensor:
        """Coefficients `(B, P)` at `k` `(P, 2)` or `(B, P, 2)`, as if poses had been right."""
        if self._shift is None:
            return coefficients
        shift = self._shift[position].to(k.device)
        phase = 2 * torch.pi * (k * shift[:, None]).sum(-1)
        return coefficients * torch.polar(torch.ones_like(phase), phase)

    def _sample(self) -> NDArray[np.int64]:
        """An even sample of the rows."""
        count = min(len(self.rows), NORMALISATION_IMAGES)
        chosen: NDArray[np.int64] = self.rows[np.linspace(0, len(self.rows) - 1, count).astype(int)]
        return chosen

    def _signal_to_noise(self) -> Tensor:
        plane = self._encoder_plane
        position = torch.from_numpy(self._position[self._sample()]).to(self.device)
        squared = self._transfer(position, torch.stack([plane.kx, plane.ky], dim=-1)).square()
        group = group_rows(self.stack, self.rows).to(self.device)
        mean = torch.zeros(len(self.stack.noise), len(plane), device=self.device)
        mean.index_add_(0, group[position], squared)
        count = torch.bincount(group[position], minlength=len(mean)).clamp(min=1)[:, None]
        mean = (mean / count).double().cpu()
        return signal_to_noise(self.stack, self.rows, plane.to("cpu"), mean).to(self.device)

    def _estimate_input_scale(self) -> float:
        """Root mean square of what the encoder would read, over a sample of the images."""
        sample, power = self._sample(), []
        for start in range(0, len(sample), READ_ROWS):
            power.append(self.batch(sample[start : start + READ_ROWS]).seen.abs().square().mean(1).cpu())
        return float(max(float(torch.cat(power).mean()), 1e-60) ** 0.5)

    def _estimate_scale(self) -> float:
        """σ of the Hartley values over an even sample of the images: √⟨|F|²⟩, since E H² = E |F|²."""
        sample, power = self._sample(), 0.0
        for start in range(0, len(sample), READ_ROWS):
            images = torch.from_numpy(self.stack.read(sample[start : start + READ_ROWS]))
            power += float(half_plane_coefficients(images, self._plane_cpu).abs().square().double().sum())
        return float(max(power / (len(sample) * len(self._plane_cpu)), 1e-60) ** 0.5)

    def _load_all(self) -> Tensor:
        everything = torch.empty(len(self.rows), self._width, dtype=torch.complex64)
        with progress("reading images", len(self.rows)) as advance:
            for start in range(0, len(self.rows), READ_ROWS):
                rows = self.rows[start : start + READ_ROWS]
                everything[start : start + len(rows)] = self._read(rows)
                advance(len(rows))
        return everything
