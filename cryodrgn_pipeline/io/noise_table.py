"""noise.parquet: one row per optics group and Fourier shell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cryodrgn_pipeline.fourier.noise import NoiseSpectrum


def write_noise(path: Path, spectra: Mapping[int, NoiseSpectrum], pixel_size_a: Mapping[int, float]) -> None:
    """Write the spectra by optics group, with the pixel size in Å that places each group's shells."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for group, spectrum in spectra.items():
        shells = np.arange(len(spectrum.noise_power))
        box_size_px = 2 * int(shells[-1])
        columns = {
            "optics_group": np.full(len(shells), group, dtype=np.int64),
            "shell": shells,
            "frequency_per_a": shells / (box_size_px * pixel_size_a[group]),
            "noise_power": spectrum.noise_power.numpy(),
            "total_power": spectrum.total_power.numpy(),
        }
        tables.append(pa.table(columns))
    pq.write_table(pa.concat_tables(tables), path)
