"""A small simulated set brought through import and preprocess, for tests of what follows."""

from __future__ import annotations

from pathlib import Path

from cryodrgn_pipeline.importing import ImportOptions, import_particles
from cryodrgn_pipeline.preprocess import PreprocessSettings, preprocess
from cryodrgn_pipeline.simulate import Settings, simulate
from cryodrgn_pipeline.stack import Stack

PIXEL_SIZE_A = 5.0


def simulated(folder: Path, *, particles: int = 300) -> Path:
    """A simulated set of 24 px; returns its folder."""
    settings = Settings(
        box_size=24, particles=particles, pixel_size_a=PIXEL_SIZE_A, snr=0.5, motion="none", occupancy=1.0,
        optics_groups=1, seed=3,
    )  # fmt: skip
    simulate(settings, folder / "simulated")
    return folder / "simulated"


def stack_of(simulated_set: Path, folder: Path, options: ImportOptions | None = None) -> Stack:
    """Import (with options that are not called for, to make it wrong) and preprocess a simulated set."""
    import_particles(simulated_set / "particles.star", folder / "import", options)
    return preprocess(folder / "import", folder / "stack", PreprocessSettings(box_size_px=24))
