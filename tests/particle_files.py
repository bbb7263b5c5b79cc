"""Particle files of RELION and cryoSPARC, made for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np

OPTICS = {
    "rlnOpticsGroup": [1],
    "rlnOpticsGroupName": ["opticsGroup1"],
    "rlnVoltage": [300.0],
    "rlnSphericalAberration": [2.7],
    "rlnAmplitudeContrast": [0.1],
    "rlnImagePixelSize": [1.25],
    "rlnImageSize": [16],
}


def particle_columns(n: int = 4, stack: str = "stack.mrcs") -> dict[str, list[Any]]:
    """The columns of a RELION 3.1 refinement of n particles."""
    rng = np.random.default_rng(n)
    return {
        "rlnImageName": [f"{i + 1:06d}@{stack}" for i in range(n)],
        "rlnMicrographName": [f"{i % 2 + 7:05d}" for i in range(n)],
        "rlnOpticsGroup": [1] * n,
        "rlnDefocusU": (15000 + 100 * rng.normal(size=n)).round(6).tolist(),
        "rlnDefocusV": (14900 + 100 * rng.normal(size=n)).round(6).tolist(),
        "rlnDefocusAngle": rng.uniform(-180, 180, n).round(6).tolist(),
        "rlnAngleRot": rng.uniform(-180, 180, n).round(6).tolist(),
        "rlnAngleTilt": rng.uniform(0, 180, n).round(6).tolist(),
        "rlnAnglePsi": rng.uniform(-180, 180, n).round(6).tolist(),
        "rlnOriginXAngst": rng.normal(size=n).round(6).tolist(),
        "rlnOriginYAngst": rng.normal(size=n).round(6).tolist(),
        "rlnRandomSubset": [i % 2 + 1 for i in range(n)],
        "rlnClassNumber": [1] * n,
    }


def loop_block(name: str, columns: Mapping[str, Sequence[Any]]) -> str:
    """A STAR loop as RELION lays it out."""
    head = "".join(f"_{label} #{i} \n" for i, label in enumerate(columns, start=1))
    rows = "".join(
        " ".join(f"{value!s:>12}" for value in row) + " \n" for row in zip(*columns.values(), strict=True)
    )
    return f"\n# version 30001\n\ndata_{name}\n\nloop_ \n{head}{rows} \n"


def write_relion(
    path: Path,
    particles: Mapping[str, Sequence[Any]] | None = None,
    optics: Mapping[str, Sequence[Any]] | None = OPTICS,
) -> Path:
    """A RELION file: 3.1 style with optics, or one table (3.0 style) when `optics` is None."""
    particles = particle_columns() if particles is None else particles
    blocks = [loop_block("optics", optics)] if optics else []
    blocks.append(loop_block("particles" if optics else "images", particles))
    path.write_text("".join(blocks))
    return path


def write_stack(path: Path, n: int = 4, box: int = 16, voxel_size_a: float = 1.25) -> Path:
    """A stack of n noise images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(np.random.default_rng(0).normal(size=(n, box, box)).astype(np.float32))
        mrc.set_image_stack()
        mrc.voxel_size = voxel_size_a
    return path


def cs_columns(n: int = 4, poses: bool = True) -> dict[str, Any]:
    """The columns of a cryoSPARC refinement of n particles, uids beyond 2^53."""
    rng = np.random.default_rng(n)
    columns: dict[str, Any] = {
        "uid": np.uint64(2**63) + np.arange(n, dtype=np.uint64),
        "blob/path": np.array(["J1/stack.mrc"] * n, dtype=object),
        "blob/idx": np.arange(n, dtype=np.uint32)[::-1].copy(),
        "blob/shape": np.full((n, 2), 16, dtype=np.uint32),
        "blob/psize_A": np.full(n, 1.25, dtype=np.float32),
        "blob/sign": np.full(n, -1, dtype=np.float32),
        "ctf/exp_group_id": np.full(n, 3, dtype=np.uint32),
        "ctf/accel_kv": np.full(n, 300, dtype=np.float32),
        "ctf/cs_mm": np.full(n, 2.7, dtype=np.float32),
        "ctf/amp_contrast": np.full(n, 0.1, dtype=np.float32),
        "ctf/df1_A": rng.uniform(10000, 20000, n).astype(np.float32),
        "ctf/df2_A": rng.uniform(10000, 20000, n).astype(np.float32),
        "ctf/df_angle_rad": rng.uniform(-1.5, 1.5, n).astype(np.float32),
        "ctf/phase_shift_rad": np.full(n, np.pi / 2, dtype=np.float32),
    }
    return columns | alignment_columns("alignments3D", n) if poses else columns


def alignment_columns(prefix: str, n: int = 4, psize_a: float = 1.25, seed: int = 5) -> dict[str, Any]:
    """Poses of n particles under `prefix`."""
    rng = np.random.default_rng(seed)
    return {
        f"{prefix}/pose": rng.normal(size=(n, 3)).astype(np.float32),
        f"{prefix}/shift": rng.normal(size=(n, 2)).astype(np.float32),
        f"{prefix}/psize_A": np.full(n, psize_a, dtype=np.float32),
        f"{prefix}/split": (np.arange(n) % 2).astype(np.uint32),
    }


def write_cryosparc(path: Path, columns: Mapping[str, Any] | None = None, csdat: bool = False) -> Path:
    """A .cs file in NumPy or CSDAT encoding."""
    from cryosparc.dataset import CSDAT_FORMAT, NUMPY_FORMAT, Dataset

    columns = cs_columns() if columns is None else columns
    Dataset(list(columns.items())).save(path, format=CSDAT_FORMAT if csdat else NUMPY_FORMAT)
    return path
