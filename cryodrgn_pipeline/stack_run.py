"""The arithmetic of `preprocess`, chunk by chunk: image files in, one stack and its tables out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.fourier.crop import cropped_spectrum, images_of
from cryodrgn_pipeline.fourier.noise import NoiseEstimate, NoiseSpectrum
from cryodrgn_pipeline.fourier.window import linear_window, soft_disc
from cryodrgn_pipeline.half_sets import half_sets
from cryodrgn_pipeline.io.images import ParticleImages, stream
from cryodrgn_pipeline.io.mrc import MrcStackWriter
from cryodrgn_pipeline.io.noise_table import write_noise
from cryodrgn_pipeline.io.tables import write_particles
from cryodrgn_pipeline.particles import ImageRef, ParticleSet, Poses
from cryodrgn_pipeline.progress import progress
from cryodrgn_pipeline.stack import APPLIED_SHIFT_COLUMNS, IMAGES, NOISE, PARTICLES

log = logging.getLogger(__name__)

Partial = dict[tuple[int, int], NoiseEstimate]  # by optics group and half set

NOISE_IMAGES_PER_GROUP = 500
MASK_EDGE = 0.05  # of the box: width of the soft edge of the real-space mask
FLOAT16_LARGEST = 65504.0
BACKGROUND_LEVEL_WORTH_A_WORD = 0.5  # in standard deviations of the background


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSettings:
    """What a stack shall be: even box D, stored type, window radii (fractions of D/2), mask radius in Å."""

    box_size_px: int
    dtype: str = "float32"
    window: bool = True
    window_radius: float = 0.85
    window_falloff: float = 0.99
    mask_radius_a: float | None = None

    def __post_init__(self) -> None:
        if self.box_size_px < 2 or self.box_size_px % 2:
            raise ConfigError(f"--box-size must be even and positive, got {self.box_size_px}")
        if self.dtype not in ("float32", "float16"):
            raise ConfigError(f"--dtype must be float32 or float16, got {self.dtype}")
        if self.window and not 0 <= self.window_radius < self.window_falloff:
            raise ConfigError(
                f"--window-radius ({self.window_radius}) must be smaller than --window-falloff "
                f"({self.window_falloff}); both are fractions of half the box"
            )
        if self.mask_radius_a is not None and not self.mask_radius_a > 0:
            raise ConfigError(f"--mask-radius-a must be positive, got {self.mask_radius_a}")


class StackRun:
    """One preprocessing run: what all its chunks share, and what they add up to."""

    def __init__(
        self, particles: ParticleSet, images: ParticleImages, settings: PreprocessSettings, folder: Path
    ) -> None:
        self.particles, self.images, self.settings, self.folder = particles, images, settings, folder
        d = settings.box_size_px
        original = particles.optics.pixel_size_a
        self.pixel_sizes_a = original * images.box_size_px / d
        values, counts = np.unique(self.pixel_sizes_a, return_counts=True)
        self.pixel_size_a = float(values[np.argmax(counts)])
        if len(values) > 1:
            log.info(
                "pixel sizes of %s Å stay with their particles; the stack's is that of most, %.6g Å",
                ", ".join(f"{value:.6g}" for value in values[:6]) + (" ..." if len(values) > 6 else ""),
                self.pixel_size_a,
            )
        if particles.poses is None:
            log.warning("the particles have no poses: their images are not centred")
            self.shift_a = np.zeros((len(particles), 2))
        else:
            self.shift_a = particles.poses.shift_a
        self.shift_px = self.shift_a / original[:, None]
        self.half, _ = half_sets(particles)
        groups = 2 * particles.optics.optics_group + self.half
        self.in_noise_sample = _spread_sample(groups, NOISE_IMAGES_PER_GROUP // 2)
        self.noise: Partial = {}
        self.weights: dict[float, Tensor] = {}

    def write_images(self, chunk_size: int | None, threads: int | None) -> None:
        """Stream all images through `_work` into the folder's stack."""
        settings, n = self.settings, len(self.particles)
        with (
            MrcStackWriter(
                self.folder / IMAGES,
                n_images=n,
                box_size_px=settings.box_size_px,
                voxel_size_a=self.pixel_size_a,
                dtype=settings.dtype,
                label=f"{n} particles, centred, cropped",
            ) as writer,
            progress("preprocess", n) as advance,
        ):

            def collect(rows: NDArray[np.int64], result: NDArray[np.float32], parts: list[Partial]) -> None:
                for part in parts:  # in row order, so that sums do not depend on which thread was first
                    for which, estimate in part.items():
                        self.noise.setdefault(which, NoiseEstimate(settings.box_size_px)).merge(estimate)
                if settings.dtype == "float16":
                    self._check_float16(rows, result)
                advance(len(rows))

            stream(
                self.images,
                box_size_px=settings.box_size_px,
                chunk_size=chunk_size,
                threads=threads,
                work=self._work,
                collect=collect,
                write=writer.append,
            )

    def _work(
        self, rows: NDArray[np.int64], images: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], Partial]:
        d = self.settings.box_size_px
        spectrum = cropped_spectrum(
            torch.from_numpy(images),
            d,
            shift_px=torch.from_numpy(self.shift_px[rows]),
            factor=torch.from_numpy(self.particles.contrast_sign[rows].astype(np.float32)),
        )
        self._check_finite(rows, spectrum)
        cropped = images_of(spectrum)
        noise = self._noise_of(rows, cropped, spectrum)
        pixel_sizes = self.pixel_sizes_a[rows]
        for pixel_size in np.unique(pixel_sizes):
            weight = self._weight(float(pixel_size))
            if weight is not None:
                same = torch.from_numpy(pixel_sizes == pixel_size)
                if bool(same.all()):
                    cropped *= weight
                else:
                    cropped[same] *= weight
        return cropped.numpy(), noise

    def _noise_of(self, rows: NDArray[np.int64], cropped: Tensor, spectrum: Tensor) -> Partial:
        estimates: Partial = {}
        sampled, halves = self.in_noise_sample[rows], self.half[rows]
        groups = self.particles.optics.optics_group[rows]
        for group, half in sorted(set(zip(groups[sampled].tolist(), halves[sampled].tolist(), strict=True))):
            chosen = torch.from_numpy(sampled & (groups == group) & (halves == half))
            estimate = estimates[group, half] = NoiseEstimate(self.settings.box_size_px)
            if bool(chosen.all()):
                estimate.add(cropped, spectrum)
            else:
                estimate.add(cropped[chosen], spectrum[chosen])
        return estimates

    def _weight(self, pixel_size_a: float) -> Tensor | None:
        """Window times mask for images of this pixel size; None if there is neither."""
        settings, d = self.settings, self.settings.box_size_px
        if not settings.window and settings.mask_radius_a is None:
            return None
        if pixel_size_a not in self.weights:
            parts = []
            if settings.window:
                parts.append(linear_window(d, settings.window_radius, settings.window_falloff))
            if settings.mask_radius_a is not None:
                parts.append(soft_disc(d, settings.mask_radius_a / pixel_size_a, MASK_EDGE * d))
            self.weights[pixel_size_a] = parts[0] if len(parts) == 1 else parts[0] * parts[1]
        return self.weights[pixel_size_a]

    def _check_finite(self, rows: NDArray[np.int64], spectrum: Tensor) -> None:
        good = torch.isfinite(spectrum[:, 0, 0].abs())  # one bad pixel spoils all coefficients
        if not bool(good.all()):
            row = rows[int(torch.nonzero(~good)[0])]
            raise InputFormatError(
                f"{self.images.name_of(row)} (row {row + 1} of the particle table) has pixels that are not "
                "finite numbers; leave the particle out or extract it again"
            )

    def _check_float16(self, rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        largest = np.abs(out).max((1, 2))
        row = int(np.argmax(largest))
        if largest[row] > FLOAT16_LARGEST:
            raise InputFormatError(
                f"{self.images.name_of(rows[row])} has values up to {largest[row]:.4g}, float16 ends at "
                f"{FLOAT16_LARGEST:.0f}; use --dtype float32"
            )
        if 0 < (faintest := float(np.median(largest))) < 1e-4:
            raise InputFormatError(
                f"the images near {self.images.name_of(rows[row])} have values up to {faintest:.2g} only, "
                "too faint for float16; use --dtype float32"
            )

    def write_tables(self) -> dict[str, Any]:
        """Write the particle and noise tables; returns what stack.json says about the noise."""
        particles, n = self.particles, len(self.particles)
        poses = particles.poses
        stored = replace(
            particles,
            images=ImageRef(stack_paths=(IMAGES,), stack=np.zeros(n, np.int64), index=np.arange(n)),
            optics=replace(
                particles.optics,
                pixel_size_a=self.pixel_sizes_a,
                box_size_px=np.full(n, self.settings.box_size_px, dtype=np.int64),
            ),
            poses=None if poses is None else Poses(rotation=poses.rotation, shift_a=np.zeros((n, 2))),
            contrast_sign=np.ones(n),
        )
        applied = {name: self.shift_a[:, axis] for axis, name in enumerate(APPLIED_SHIFT_COLUMNS)}
        write_particles(stored, self.folder / PARTICLES, applied)
        spectra = {group: self._spectrum_of(group) for group in sorted({group for group, _ in self.noise})}
        groups = particles.optics.optics_group
        write_noise(
            self.folder / NOISE,
            spectra,
            {which: estimate.result() for which, estimate in self.noise.items()},
            {group: float(np.median(self.pixel_sizes_a[groups == group])) for group in spectra},
        )
        return {str(group): _noise_summary(group, spectrum) for group, spectrum in spectra.items()}

    def _spectrum_of(self, group: int) -> NoiseSpectrum:
        both = NoiseEstimate(self.settings.box_size_px)
        for half in (0, 1):
            if (group, half) in self.noise:
                both.merge(self.noise[group, half])
        return both.result()


def _noise_summary(group: int, spectrum: NoiseSpectrum) -> dict[str, Any]:
    level, spread = spectrum.background_mean, spectrum.background_std
    if spectrum.source == "total":
        log.warning(
            "optics group %d: nothing is left outside the particle (subtracted or masked images), so the "
            "total power stands in for the noise power; it includes the signal",
            group,
        )
    elif abs(level) > BACKGROUND_LEVEL_WORTH_A_WORD * spread:
        log.warning(
            "optics group %d: the background lies at %.3g with a standard deviation of %.3g; the window "
            "leaves this level as a disc (normalise the particles to a background of 0)",
            *(group, level, spread),
        )
    return {
        "source": spectrum.source,
        "n_images": spectrum.n_images,
        "background_mean": level,
        "background_std": spread,
    }


def _spread_sample(groups: NDArray[np.int64], most: int) -> NDArray[np.bool_]:
    """At most `most` rows of every group, spread evenly over its rows."""
    chosen = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        count = min(most, len(rows))
        chosen[rows[np.arange(count) * len(rows) // count]] = True
    return chosen
