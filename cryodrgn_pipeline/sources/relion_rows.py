"""The rows of a RELION particle file, joined with its optics table; what is not supported is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.star import StarBlock, StarTable, scan_blocks

Array = NDArray[np.float64]

TOMOGRAPHY = ("rlnTomoName", "rlnTomoVisibleFrames", "rlnTomoParticleName", "rlnTomoSubTomosAre2DStacks")


def find_tables(path: Path) -> tuple[StarBlock, StarBlock | None]:
    """The particle block of a STAR file, and its optics block (None for RELION ≤ 3.0).

    Raises
    ------
    InputFormatError
        If there is no particle block or more than one, or the file holds tilt series.
    """
    blocks = scan_blocks(path)
    for block in blocks:
        tomography = [name for name in TOMOGRAPHY if name in block.columns]
        if tomography:
            raise InputFormatError(
                f"{path}: data_{block.name} has {tomography[0]}: tilt-series (subtomogram) particles are not "
                "supported; import a single-particle refinement"
            )
    optics = next((block for block in blocks if block.name == "optics"), None)
    tables = [block for block in blocks if "rlnImageName" in block.columns]
    if len(tables) != 1:
        names = ", ".join(f"data_{block.name}" for block in blocks)
        raise InputFormatError(
            f"{path}: expected one block with the column rlnImageName, found {len(tables)} among {names}; "
            "give a particle file, such as Refine3D's run_data.star"
        )
    return tables[0], optics


class Rows:
    """Columns per particle, from the optics table where it has them, else from the particle table."""

    def __init__(self, path: Path, particles: StarTable, optics: StarTable | None) -> None:
        self.path, self.particles, self.optics = path, particles, optics
        self.n = particles.rows
        self.group = np.ones(self.n, dtype=np.int64)
        self._optics_row: NDArray[np.int64] | None = None
        if optics is not None:
            self._join(optics)

    def _join(self, optics: StarTable) -> None:
        if "rlnOpticsGroup" not in optics:
            raise InputFormatError(f"{self.path}: data_optics lacks the column rlnOpticsGroup")
        groups = optics.integers("rlnOpticsGroup")
        if len(np.unique(groups)) != len(groups):
            raise InputFormatError(
                f"{self.path}: data_optics lists an rlnOpticsGroup more than once: {groups}"
            )
        if "rlnOpticsGroup" in self.particles:
            self.group = self.particles.integers("rlnOpticsGroup")
        elif len(groups) == 1:
            self.group = np.full(self.n, groups[0])
        else:
            raise InputFormatError(
                f"{self.path}: data_particles lacks the column rlnOpticsGroup; there are {len(groups)} groups"
            )
        order = np.argsort(groups)
        place = np.minimum(np.searchsorted(groups, self.group, sorter=order), len(groups) - 1)
        self._optics_row = order[place]
        unknown = np.flatnonzero(groups[self._optics_row] != self.group)
        if len(unknown):
            raise InputFormatError(
                f"{self.path}: {len(unknown)} of {self.n} particles belong to an rlnOpticsGroup that "
                f"data_optics does not list, first row {unknown[0] + 1} (group {self.group[unknown[0]]}); "
                f"it lists {', '.join(str(group) for group in groups)}"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.particles or (self.optics is not None and name in self.optics)

    def numbers(self, name: str) -> Array:
        if self.optics is not None and name in self.optics:
            return self.optics.numbers(name)[self._optics_row]
        return self.particles.numbers(name)

    def integers(self, name: str) -> NDArray[np.int64]:
        if self.optics is not None and name in self.optics:
            return self.optics.integers(name)[self._optics_row]
        return self.particles.integers(name)

    def largest_coefficient(self, name: str) -> Array:
        """Per particle the largest |value| of a column of lists such as `[0.1,-2,0]`."""
        table = self.optics if self.optics is not None and name in self.optics else self.particles
        distinct = table.text(name).dictionary_encode()
        sizes = np.array([_largest(self.path, name, text) for text in distinct.dictionary.to_pylist()])
        per_row: Array = sizes[distinct.indices.to_numpy(zero_copy_only=False)]
        return per_row[self._optics_row] if table is self.optics else per_row


def _largest(path: Path, name: str, text: str) -> float:
    try:
        return max((abs(float(word)) for word in text.strip("[]").replace(",", " ").split()), default=0.0)
    except ValueError as error:
        raise InputFormatError(f"{path}: {name} should hold a list of numbers, found {text}") from error


def refuse_unsupported(rows: Rows) -> None:
    """Raise an `InputFormatError` for premultiplied or flipped images, subvolumes and tilt series."""
    flags = {
        "rlnCtfDataAreCtfPremultiplied": "images multiplied by their CTF are not supported yet; extract them "
        "again without premultiplication",
        "rlnCtfDataArePhaseFlipped": "phase-flipped images are not supported; extract them again unflipped",
    }
    for name, cure in flags.items():
        count = int(np.count_nonzero(rows.numbers(name))) if name in rows else 0
        if count:
            raise InputFormatError(f"{rows.path}: {name} is set for {count} of {rows.n} particles: {cure}")
    if "rlnImageDimensionality" in rows and (rows.numbers("rlnImageDimensionality") != 2).any():
        raise InputFormatError(
            f"{rows.path}: rlnImageDimensionality is not 2: subtomograms are not supported"
        )
    if "rlnGroupName" in rows.particles:
        _refuse_tilts(rows)


def _refuse_tilts(rows: Rows) -> None:
    """Tilts of one particle share a group name, while dose, tilt scale or B-factor change among them.

    Particles of one micrograph share a group name too, and there these are the same for all.
    """
    group = rows.particles.text("rlnGroupName").dictionary_encode().indices.to_numpy(zero_copy_only=False)
    for name in ("rlnMicrographPreExposure", "rlnCtfScalefactor", "rlnCtfBfactor"):
        if name not in rows.particles:
            continue
        values = rows.particles.numbers(name)
        low, high = np.full(group.max() + 1, np.inf), np.full(group.max() + 1, -np.inf)
        np.minimum.at(low, group, values)
        np.maximum.at(high, group, values)
        varied = int((high > low).sum())
        if varied:
            raise InputFormatError(
                f"{rows.path}: {varied} groups of rows share an rlnGroupName while {name} changes within "
                "them, as in the tilts of a tilt series; tilt series are not supported. If these are single "
                "particles, take the column rlnGroupName out of the file"
            )
