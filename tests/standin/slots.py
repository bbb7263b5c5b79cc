"""Which columns a slot's dtype has. The real table lives in cryoSPARC and is not published.

Each row says where it was read; dtypes without a row are refused, never guessed.
F: `min_fields` in the tests of cryosparc-tools 4.7.1. D: real .cs files.
X: the client's example notebook of a custom latent (names only; the dtypes are inferred).
"""

from __future__ import annotations

ALIGNMENTS = [  # D
    ("split", "u4"), ("shift", "2f4"), ("pose", "3f4"), ("psize_A", "f4"), ("error", "f4"),
    ("error_min", "f4"),
    ("resid_pow", "f4"), ("slice_pow", "f4"), ("image_pow", "f4"), ("cross_cor", "f4"), ("alpha", "f4"),
    ("alpha_min", "f4"), ("weight", "f4"), ("pose_ess", "f4"), ("shift_ess", "f4"), ("class_posterior", "f4"),
    ("class", "u4"), ("class_ess", "f4"),
]  # fmt: skip
MAP = [("path", "O"), ("shape", "3u4"), ("psize_A", "f4")]  # F
CTF_NUMBERS = (
    "accel_kv", "cs_mm", "amp_contrast", "df1_A", "df2_A", "df_angle_rad", "phase_shift_rad", "scale",
    "scale_const",
)  # fmt: skip
FIELDS = {
    "particle": {
        "blob": [  # F
            ("path", "O"), ("idx", "u4"), ("shape", "2u4"), ("psize_A", "f4"), ("sign", "f4"),
            ("import_sig", "u8"),
        ],
        "ctf": [  # F
            ("type", "O"), ("exp_group_id", "u4"), *((name, "f4") for name in CTF_NUMBERS),
            ("shift_A", "2f4"), ("tilt_A", "2f4"), ("trefoil_A", "2f4"), ("tetra_A", "4f4"),
            ("anisomag", "4f4"), ("bfactor", "f4"),
        ],
        "alignments3D": ALIGNMENTS,
        "components": [("component", "u4"), ("value", "f4")],  # X
    },
    "volume": {"blob": MAP},
    "mask": {"blob": MAP},
}  # fmt: skip


def slot_fields(kind: str, name: str, dtype: str) -> list[tuple[str, str]]:
    """The columns of a slot; KeyError where its dtype is not known for outputs of this kind."""
    table = FIELDS.get(kind, {})
    if dtype not in table:
        raise KeyError(f"unknown {kind} slot dtype {dtype!r}; known: {sorted(table)}")
    return [(f"{name}/{column}", numpy_type) for column, numpy_type in table[dtype]]
