"""A particle set in the making: what the source gave, what the user overrode, and what is still missing."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.conventions import SETTABLE_COLUMNS, Remedies
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.particles import UNKNOWN_BOX, Ctf, ImageRef, Optics, ParticleSet, Poses

EXAMPLES = 3
EXAMPLE_VALUES = {
    "pixel_size_a": "1.31",
    "voltage_kv": "300",
    "cs_mm": "2.7",
    "amplitude_contrast": "0.1",
    "contrast_sign": "-1",
    "defocus_u_a": "15000",
    "defocus_v_a": "15000",
}
Aberration = dict[str, str | int | float]


@dataclass(slots=True, kw_only=True)
class Draft:
    """What a source says of its N particles; `columns` holds those of SETTABLE_COLUMNS that it has.

    `origins` says by column where a value came from, `lacking` which source column a missing one would have
    come from. `rotation` is None without poses.
    """

    path: Path
    kind: str
    particle_id: NDArray[Any]
    stack_paths: tuple[str, ...]
    stack: NDArray[np.int64]
    index: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    rotation: NDArray[np.float64] | None = None
    half_set: NDArray[np.int64] | None = None
    micrograph: NDArray[np.object_] | None = None
    class_number: NDArray[np.int64] | None = None
    aberrations: list[Aberration] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.particle_id)

    @property
    def pixel_size_a(self) -> NDArray[np.float64]:
        """The pixel size `(N,)`; NaN until it is known: `override` refuses a set without one."""
        return self.columns.get("pixel_size_a", np.full(len(self), np.nan))

    def put(self, name: str, values: NDArray[np.floating[Any]] | float, origin: str) -> None:
        """Set a column, one value for all or `(N,)`, and say where it comes from."""
        self.columns[name] = np.broadcast_to(np.asarray(values, dtype=np.float64), (len(self),)).copy()
        self.origins[name] = origin

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Drop the particles outside `mask`."""
        for name in ("particle_id", "stack", "index", "rotation", "half_set", "micrograph", "class_number"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, values[mask])
        self.columns = {name: values[mask] for name, values in self.columns.items()}
        used, self.stack = np.unique(self.stack, return_inverse=True)
        self.stack_paths = tuple(self.stack_paths[i] for i in used)

    def aberration(
        self, name: str, size: NDArray[np.float64], effect: str, values: NDArray[np.float64] | None = None
    ) -> None:
        """Record an aberration by its size `(N,)`, 0 where it is absent; nothing if absent everywhere."""
        rows = int(np.count_nonzero(size))
        if rows:
            shown = size if values is None else values
            largest = float(shown[np.argmax(size)])
            self.aberrations.append(
                {"name": name, "rows": rows, "of": len(size), "max": largest, "effect": effect}
            )

    def override(self, overrides: Mapping[str, float]) -> None:
        """Apply `--set` values, and check that every needed column is there and plausible.

        Raises
        ------
        InputFormatError
            If a needed column is missing (the message names its `--set` key) or holds implausible values.
        """
        for name, value in overrides.items():
            self.put(name, value, "--set")
        self._refuse_missing()
        for name, values in self.columns.items():
            self._refuse_implausible(name, values)

    def build(self, remedies: Remedies) -> ParticleSet:
        """The canonical particle set, its poses mended as `remedies` says."""
        column = self.columns
        poses = None
        if self.rotation is not None:
            shift = np.stack([column["shift_x_a"], column["shift_y_a"]], axis=1)
            poses = remedies.apply(Poses(rotation=self.rotation, shift_a=shift))
        box = column.get("box_size_px", np.full(len(self), UNKNOWN_BOX))
        return ParticleSet(
            particle_id=self.particle_id,
            images=ImageRef(stack_paths=self.stack_paths, stack=self.stack, index=self.index),
            optics=Optics(
                optics_group=column["optics_group"].astype(np.int64),
                box_size_px=box.astype(np.int64),
                pixel_size_a=column["pixel_size_a"],
                voltage_kv=column["voltage_kv"],
                cs_mm=column["cs_mm"],
                amplitude_contrast=column["amplitude_contrast"],
            ),
            ctf=Ctf(**{name: column[name] for name in Ctf.__slots__}),
            poses=poses,
            contrast_sign=column["contrast_sign"],
            half_set=self.half_set,
            micrograph=self.micrograph,
            class_number=self.class_number,
        )

    def _refuse_missing(self) -> None:
        optional = {"box_size_px"}
        if self.rotation is None:
            optional |= {"shift_x_a", "shift_y_a"}
        missing = [name for name in SETTABLE_COLUMNS if name not in self.columns and name not in optional]
        if not missing:
            return
        lines = [f"{name} (from {self.lacking.get(name, 'the source')})" for name in missing]
        options = " ".join(f"--set {name}={EXAMPLE_VALUES.get(name, '0')}" for name in missing)
        config = ", ".join(f"{name}: {EXAMPLE_VALUES.get(name, '0')}" for name in missing)
        raise InputFormatError(
            f"{self.path}: all {len(self)} rows lack {'; '.join(lines)}. Supply what holds for your data, on "
            f"the command line: {options}; in config.yaml, below the dataset's name: set: {{{config}}}"
        )

    def _refuse_implausible(self, name: str, values: NDArray[np.float64]) -> None:
        rule = SETTABLE_COLUMNS[name]
        wrong = np.flatnonzero(~rule.plausible(values))
        if not len(wrong):
            return
        shown = ", ".join(f"row {row + 1} ({values[row]:g})" for row in wrong[:EXAMPLES])
        raise InputFormatError(
            f"{self.path}: {self.origins[name]} gives no usable {name} in {len(wrong)} of {len(self)} rows: "
            f"{shown}; expected {rule.expected}. Mend the file, or overwrite it with --set {name}=..."
        )


def parse_overrides(assignments: Sequence[str]) -> dict[str, float]:
    """The values of `--set key=value` options.

    Raises
    ------
    ConfigError
        If a key is no column that can be set, is given twice, or its value is no number of the right kind.
    """
    overrides: dict[str, float] = {}
    for text in assignments:
        name, equals, value = (part.strip() for part in text.partition("="))
        if name not in SETTABLE_COLUMNS:
            near = difflib.get_close_matches(name, SETTABLE_COLUMNS, n=1, cutoff=0.4)
            raise ConfigError(
                f"--set {text}: no such key{f' (did you mean {near[0]}?)' if near else ''}; the keys are "
                f"{', '.join(SETTABLE_COLUMNS)}"
            )
        try:
            number = float(value) if equals else math.nan
        except ValueError:
            number = math.nan
        rule = SETTABLE_COLUMNS[name]
        if not (math.isfinite(number) and rule.plausible(np.array([number]))[0]):
            raise ConfigError(f"--set {text}: expected {name}=VALUE with {rule.expected}")
        if name in overrides:
            raise ConfigError(f"--set {name} is given more than once")
        overrides[name] = number
    return overrides


def number_repeats(
    ids: NDArray[np.object_], stack: NDArray[np.int64], index: NDArray[np.int64]
) -> tuple[NDArray[np.object_], NDArray[np.int64]]:
    """Make ids unique: further rows of the same image (symmetry expansion) get `#2`, `#3` and so on.

    Returns
    -------
    The ids `(N,)`, and for each row the first row `(N,)` of the same image.
    """
    order = np.lexsort((np.arange(len(ids)), index, stack))
    new = np.ones(len(ids), dtype=bool)
    new[1:] = (np.diff(stack[order]) != 0) | (np.diff(index[order]) != 0)
    starts = np.flatnonzero(new)
    of_group = np.cumsum(new) - 1
    first = np.empty(len(ids), dtype=np.int64)
    first[order] = order[starts[of_group]]
    occurrence = np.empty(len(ids), dtype=np.int64)
    occurrence[order] = np.arange(len(ids)) - starts[of_group] + 1
    unique = ids.copy()
    for row in np.flatnonzero(occurrence > 1):
        unique[row] = f"{ids[first[row]]}#{occurrence[row]}"
    return unique, first
