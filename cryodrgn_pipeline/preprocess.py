"""Particles and their images → one stack: centred, light on dark, Fourier-cropped, windowed.

Per image, in one forward and one inverse transform: contrast sign, shift by +t, crop to the new box (pixel
size p₀ D₀/D, exact for every row). The noise spectrum is estimated before the window and the mask are
multiplied on; they act in real space, so they blur the spectrum and take the share 1 − ⟨w²⟩ of noise power.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline import __version__
from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing_directory, write_json
from cryodrgn_pipeline.io.images import ParticleImages
from cryodrgn_pipeline.io.imported import ImportedSource
from cryodrgn_pipeline.io.output_lock import full_disk_explained, sole_writer
from cryodrgn_pipeline.particles import ParticleSet
from cryodrgn_pipeline.progress import duration
from cryodrgn_pipeline.stack import IMAGES, INFO, NOISE, PARTICLES, Stack
from cryodrgn_pipeline.stack_run import PreprocessSettings, StackRun

log = logging.getLogger(__name__)

__all__ = ["PreprocessSettings", "preprocess"]


def preprocess(
    import_dir: Path,
    output: Path,
    settings: PreprocessSettings,
    *,
    chunk_size: int | None = None,
    threads: int | None = None,
) -> Stack:
    """Make the stack of an imported particle set, or open it if it is there already.

    Parameters
    ----------
    import_dir
        Folder that `import` wrote.
    output
        Folder to write; a stack of other settings or other particles there is replaced when the new one is
        whole.
    settings
        Box, type, window, mask.
    chunk_size
        Images read at once; default about 64 MiB. Memory holds two chunks whatever N is.
    threads
        Threads for the Fourier transforms; default all the process may use.

    Raises
    ------
    InputFormatError
        If images are missing, truncated, changed since the import, not numbers, or smaller than the box.
    ConfigError
        If `output` is something else than a stack, or holds other files and would be replaced.
    """
    import_dir, output = Path(import_dir), Path(output)
    started = time.monotonic()
    source = ImportedSource.open(import_dir)
    identity = {"settings": asdict(settings), "import_fingerprint": source.fingerprint}
    if (there := _existing(output, identity)) is not None:
        log.info("%s: is there already, made of the same particles with the same options", output)
        return there
    for note in source.notes:
        log.warning(note)
    particles = source.particles
    images = ParticleImages(particles, source.recorded)
    try:
        _check_box(images.box_size_px, settings.box_size_px, particles, images)
        needed = len(particles) * settings.box_size_px**2 * np.dtype(settings.dtype).itemsize
        with (
            sole_writer(output),
            full_disk_explained(output, needed),
            replacing_directory(output, (IMAGES, PARTICLES, NOISE, INFO)) as folder,
        ):
            run = StackRun(particles, images, settings, folder)
            run.write_images(chunk_size, threads)
            noise = run.write_tables()
            write_json(
                folder / INFO,
                {
                    "box_size_px": settings.box_size_px,
                    "pixel_size_a": run.pixel_size_a,
                    "n_particles": len(particles),
                    "dtype": settings.dtype,
                    **identity,
                    "source": source.in_force,
                    "notes": source.notes,
                    "noise": noise,
                    "version": __version__,
                    "wall_time_s": round(time.monotonic() - started, 3),
                },
            )
    finally:
        images.close()
    took = time.monotonic() - started
    log.info(
        "%s: %d images of %d px at %.6g Å in %s (%.0f images/s)",
        *(output, len(particles), settings.box_size_px, run.pixel_size_a, duration(took)),
        len(particles) / took,
    )
    return Stack.open(output)


def _check_box(
    boxes: NDArray[np.int64], box_size_px: int, particles: ParticleSet, images: ParticleImages
) -> None:
    row = int(np.argmin(boxes))
    if boxes[row] < box_size_px:
        small = int((boxes < box_size_px).sum())
        raise InputFormatError(
            f"--box-size {box_size_px} is larger than the images of {small} of {len(particles)} particles: "
            f"{images.path_of(row)} has {boxes[row]} px at {particles.optics.pixel_size_a[row]:.6g} Å, and "
            "enlarging adds nothing; choose at most "
            f"{boxes[row] // 2 * 2}"
        )


def _existing(output: Path, identity: dict[str, Any]) -> Stack | None:
    """The stack at `output` if it is whole and of this identity."""
    if not (output / INFO).exists():
        return None
    try:
        there = Stack.open(output)
    except InputFormatError as error:
        log.warning("making the stack again: %s", error)
        return None
    if all(there.info.get(key) == value for key, value in identity.items()):
        return there
    log.info("%s: holds a stack of other particles or options; it will be replaced", output)
    return None
