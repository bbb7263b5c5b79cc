"""Phase-flipped copies of the original images: every Fourier coefficient times the sign of its CTF.

Nothing else is done to them: no centring, no contrast sign, no window, same order, full box.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.fourier.crop import fourier_crop
from cryodrgn_pipeline.fourier.ctf import ctf
from cryodrgn_pipeline.io.atomic import replacing
from cryodrgn_pipeline.io.images import ParticleImages, stream
from cryodrgn_pipeline.io.imported import ImportedSource
from cryodrgn_pipeline.io.mrc import MrcStackWriter
from cryodrgn_pipeline.io.output_lock import full_disk_explained, sole_writer
from cryodrgn_pipeline.particles import ParticleSet
from cryodrgn_pipeline.progress import progress

log = logging.getLogger(__name__)


def phase_flip(
    import_dir: Path,
    output: Path,
    *,
    box_size_px: int | None = None,
    chunk_size: int | None = None,
    threads: int | None = None,
) -> None:
    """Write the phase-flipped images of an imported particle set as one float32 stack.

    Parameters
    ----------
    import_dir
        Folder that `import` wrote.
    output
        `.mrcs` or `.mrc` file to write, images in the order of the particle table.
    box_size_px
        Even box to Fourier-crop to after flipping; default the original box.
    chunk_size, threads
        Images read at once (default about 64 MiB) and threads (default all the process may use).

    Raises
    ------
    InputFormatError
        If images are missing, truncated or changed, or differ in box while no `box_size_px` is given.
    ConfigError
        If `output` is no MRC name, or the box is odd or too large.
    """
    output = Path(output)
    if output.suffix not in (".mrc", ".mrcs"):
        raise ConfigError(f"{output}: the flipped images are an MRC stack; give a name that ends in .mrcs")
    source = ImportedSource.open(Path(import_dir))
    for note in source.notes:
        log.warning(note)
    particles = source.particles
    images = ParticleImages(particles, source.recorded)
    try:
        d = _output_box(images, box_size_px)
        pixel_sizes = particles.optics.pixel_size_a * images.box_size_px / d
        values, counts = np.unique(pixel_sizes, return_counts=True)
        n = len(particles)
        with (
            sole_writer(output),
            full_disk_explained(output, n * d * d * 4),
            replacing(output) as temporary,
            MrcStackWriter(
                temporary,
                n_images=n,
                box_size_px=d,
                voxel_size_a=float(values[np.argmax(counts)]),
                label=f"{n} particles, phase-flipped",
            ) as writer,
            progress("phase-flip", n) as advance,
        ):

            def work(rows: NDArray[np.int64], part: NDArray[np.float32]) -> tuple[NDArray[np.float32], None]:
                flipped = flip_images(torch.from_numpy(part), particles.take(rows))
                return (flipped if d == part.shape[-1] else fourier_crop(flipped, d)).numpy(), None

            stream(
                images,
                box_size_px=d,
                chunk_size=chunk_size,
                threads=threads,
                work=work,
                collect=lambda rows, result, parts: advance(len(rows)),
                write=writer.append,
            )
    finally:
        images.close()
    log.info("%s: %d phase-flipped images of %d px", output, n, d)


def flip_images(images: Tensor, particles: ParticleSet) -> Tensor:
    """Multiply the transform of each image by the sign of its CTF; a CTF of 0 counts as positive.

    Parameters
    ----------
    images
        `(B, D, D)` float32.
    particles
        The B particles; their pixel size (Å) is that of the images.

    Returns
    -------
    `(B, D, D)` float32. +D/2 and −D/2 are one frequency in an even box: it takes the mean of both signs.
    """
    d = images.shape[-1]
    optics, defocus = particles.optics, particles.ctf
    field = 1 / (d * torch.from_numpy(optics.pixel_size_a))[:, None]
    ky = torch.fft.fftfreq(d, 1 / d, dtype=torch.float64)
    kx = torch.arange(d // 2 + 1, dtype=torch.float64)

    def signs(rows: Tensor) -> Tensor:
        grid_y, grid_x = torch.meshgrid(rows, kx, indexing="ij")
        values = ctf(  # in float64: near a zero of the CTF, float32 would guess
            grid_y.flatten() * field,
            grid_x.flatten() * field,
            defocus_u_a=torch.from_numpy(defocus.defocus_u_a),
            defocus_v_a=torch.from_numpy(defocus.defocus_v_a),
            defocus_angle_deg=torch.from_numpy(defocus.defocus_angle_deg),
            voltage_kv=torch.from_numpy(optics.voltage_kv),
            cs_mm=torch.from_numpy(optics.cs_mm),
            amplitude_contrast=torch.from_numpy(optics.amplitude_contrast),
            phase_shift_deg=torch.from_numpy(defocus.phase_shift_deg),
        )
        return torch.where(values < 0, -1.0, 1.0).float().reshape(-1, *grid_y.shape)

    sign = signs(ky)
    if d % 2 == 0:
        sign[:, d // 2] = (sign[:, d // 2] + signs(-ky[d // 2 : d // 2 + 1])[:, 0]) / 2
    flipped: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * sign, s=(d, d))
    return flipped


def _output_box(images: ParticleImages, box_size_px: int | None) -> int:
    smallest, largest = int(images.box_size_px.min()), int(images.box_size_px.max())
    if box_size_px is None:
        if smallest != largest:
            raise InputFormatError(
                f"the images have boxes from {smallest} to {largest} px, and a stack has one; give "
                f"--box-size (at most {smallest // 2 * 2})"
            )
        return smallest
    if box_size_px % 2 or not 0 < box_size_px <= smallest:
        raise ConfigError(f"--box-size must be even and at most {smallest} px, got {box_size_px}")
    return box_size_px
