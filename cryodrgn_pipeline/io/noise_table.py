"""noise.parquet: one row per optics group and Fourier shell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cryodrgn_pipeline.fourier.noise import NoiseSpectrum

HALF_NOISE = ("half1_noise_power", "half2_noise_power")


def write_noise(
    path: Path,
    spectra: Mapping[int, NoiseSpectrum],
    halves: Mapping[tuple[int, int], NoiseSpectrum],
    pixel_size_a: Mapping[int, float],
) -> None:
    """Write the spectra by optics group, with the pixel size in Å that places each group's shells.

    Parameters
    ----------
    halves
        By optics group and half set (0 or 1): what each half set's own images say; NaN where there are none.
    """
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
            **{
                name: halves[group, half].noise_power.numpy()
                if (group, half) in halves
                else np.full(len(shells), np.nan)
                for half, name in enumerate(HALF_NOISE)
            },
        }
        tables.append(pa.table(columns))
    pq.write_table(pa.concat_tables(tables), path)
