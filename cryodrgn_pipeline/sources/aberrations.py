"""Aberrations that a source records and no later step applies: how many rows have one, and what it does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.conventions import coma_effect, coma_from_beam_tilt
from cryodrgn_pipeline.io.cs import CsTable
from cryodrgn_pipeline.sources.draft import Draft
from cryodrgn_pipeline.sources.relion_rows import Rows

MAG_MATRIX = {"rlnMagMat00": 1.0, "rlnMagMat01": 0.0, "rlnMagMat10": 0.0, "rlnMagMat11": 1.0}
ZERNIKES = ("rlnOddZernike", "rlnEvenZernike")


def record_relion_aberrations(draft: Draft, rows: Rows) -> None:
    """Record beam tilt, Zernike, magnification, B-factor and scale columns that are not neutral."""
    if "rlnBeamTiltX" in rows or "rlnBeamTiltY" in rows:
        tilts = [rows.numbers(name) for name in ("rlnBeamTiltX", "rlnBeamTiltY") if name in rows]
        size = np.hypot(*tilts) if len(tilts) == 2 else np.abs(tilts[0])
        worst = int(np.argmax(size))
        cs, voltage = (draft.columns.get(name) for name in ("cs_mm", "voltage_kv"))
        effect = "coma"
        if cs is not None and voltage is not None and size[worst] > 0 and cs[worst] > 0:
            effect = coma_effect(coma_from_beam_tilt(size[worst], cs[worst]), voltage[worst])
        draft.aberration("beam tilt in mrad (rlnBeamTiltX/Y)", size, effect)
    for name in ZERNIKES:
        if name in rows:
            sizes = rows.largest_coefficient(name)
            effect = f"phase error, largest coefficient {sizes.max():.3g} rad"
            draft.aberration(f"higher-order aberration ({name})", sizes, effect)
    if any(name in rows for name in MAG_MATRIX):
        parts = [np.abs(rows.numbers(name) - one) for name, one in MAG_MATRIX.items() if name in rows]
        size = np.max(parts, axis=0)
        effect = f"distances off by up to {100 * size.max():.2g} %"
        draft.aberration("anisotropic magnification (rlnMagMat00-11)", size, effect)
    if "rlnCtfBfactor" in rows:
        _b_factor(draft, rows.numbers("rlnCtfBfactor"), "rlnCtfBfactor")
    if "rlnCtfScalefactor" in rows:
        _scale(draft, rows.numbers("rlnCtfScalefactor"), "rlnCtfScalefactor")


def record_cryosparc_aberrations(draft: Draft, table: CsTable) -> None:
    """Record the `ctf/` columns of a .cs file that no step applies, where they are not neutral."""
    voltage = draft.columns.get("voltage_kv")
    for name, what in {"tilt": "beam tilt", "trefoil": "trefoil"}.items():
        if f"ctf/{name}_A" in table:
            size = _length(table, f"ctf/{name}_A")
            worst = int(np.argmax(size))
            known = voltage is not None and size[worst] > 0
            effect = coma_effect(size[worst], voltage[worst]) if known and voltage is not None else what
            draft.aberration(f"{what} in A (ctf/{name}_A)", size, effect)
    if "ctf/tetra_A" in table:
        size = _length(table, "ctf/tetra_A")
        draft.aberration("tetrafoil in A (ctf/tetra_A)", size, f"phase error, up to {size.max():.3g} A")
    if "ctf/shift_A" in table:
        size = _length(table, "ctf/shift_A")
        draft.aberration("shift in A (ctf/shift_A)", size, f"images off centre by up to {size.max():.3g} A")
    if "ctf/anisomag" in table:
        size = np.abs(table.numbers("ctf/anisomag")).max(axis=1)
        effect = f"distances off by up to {100 * size.max():.2g} %"
        draft.aberration("anisotropic magnification (ctf/anisomag)", size, effect)
    if "ctf/bfactor" in table:
        _b_factor(draft, table.numbers("ctf/bfactor"), "ctf/bfactor")
    if "ctf/scale" in table:
        _scale(draft, table.numbers("ctf/scale"), "ctf/scale")


def _length(table: CsTable, name: str) -> NDArray[np.float64]:
    length: NDArray[np.float64] = np.linalg.norm(table.numbers(name), axis=1)
    return length


def _b_factor(draft: Draft, values: NDArray[np.float64], label: str) -> None:
    worst = float(values[np.argmax(np.abs(values))])
    effect = f"amplitudes times {np.exp(-worst / 400):.2g} at 10 A"
    draft.aberration(f"B-factor in A^2 ({label})", np.abs(values), effect, values)


def _scale(draft: Draft, values: NDArray[np.float64], label: str) -> None:
    effect = f"amplitudes times {values.min():.3g} to {values.max():.3g}"
    draft.aberration(f"CTF scale ({label})", np.abs(values - 1), effect, values)
