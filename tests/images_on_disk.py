"""Stacks and import folders for tests that read images; not a test itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryodrgn_pipeline.io.tables import write_particles
from cryodrgn_pipeline.particles import Ctf, ImageRef, Optics, ParticleSet, Poses


def write_stack(path: Path, images: NDArray[Any], pixel_size_a: float = 2.0) -> Path:
    """Images as an MRC stack of their own type."""
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(images)
        mrc.set_image_stack()
        mrc.voxel_size = pixel_size_a
    return path


def smooth_images(n: int, box_size_px: int, seed: int = 0) -> NDArray[np.float32]:
    """Noise plus a blob off the centre, with mean 0.3."""
    random = np.random.default_rng(seed)
    axis = np.arange(box_size_px) - box_size_px / 2
    blob = np.exp(-((axis[:, None] - 2) ** 2 + axis[None, :] ** 2) / (0.02 * box_size_px**2))
    return (random.normal(0.3, 1, (n, box_size_px, box_size_px)) + 2 * blob).astype(np.float32)


def particle_set(paths: list[Path], stack: list[int], index: list[int], **columns: Any) -> ParticleSet:
    """Particles with given images; all else made up, reproducibly, or given by keyword."""
    n = len(stack)
    random = np.random.default_rng(7)

    def column(name: str, default: Any, dtype: Any = np.float64) -> NDArray[Any]:
        return np.broadcast_to(np.asarray(columns.get(name, default), dtype=dtype), n).copy()

    poses = None
    if columns.get("poses", True):
        shift = np.asarray(columns.get("shift_a", random.normal(0, 4, (n, 2))), dtype=np.float64)
        poses = Poses(rotation=Rotation.random(n, rng=3).as_matrix(), shift_a=shift)
    return ParticleSet(
        particle_id=np.array([f"{i + 1:06d}@{s}" for s, i in zip(stack, index, strict=True)], dtype=object),
        images=ImageRef(
            stack_paths=tuple(str(path) for path in paths),
            stack=np.array(stack, dtype=np.int64),
            index=np.array(index, dtype=np.int64),
        ),
        optics=Optics(
            optics_group=column("optics_group", 1, np.int64),
            pixel_size_a=column("pixel_size_a", 2.0),
            box_size_px=column("box_size_px", 32, np.int64),
            voltage_kv=column("voltage_kv", 300.0),
            cs_mm=column("cs_mm", 2.7),
            amplitude_contrast=column("amplitude_contrast", 0.1),
        ),
        ctf=Ctf(
            defocus_u_a=column("defocus_u_a", random.uniform(8000, 20000, n)),
            defocus_v_a=column("defocus_v_a", random.uniform(8000, 20000, n)),
            defocus_angle_deg=column("defocus_angle_deg", random.uniform(0, 180, n)),
            phase_shift_deg=column("phase_shift_deg", 0.0),
        ),
        poses=poses,
        contrast_sign=column("contrast_sign", 1.0),
    )


def import_folder(folder: Path, particles: ParticleSet, **info: Any) -> Path:
    """A folder as `import` writes it, with the stacks as they are now on record."""
    folder.mkdir(parents=True, exist_ok=True)
    write_particles(particles, folder / "particles.parquet")
    stacks = []
    for path in particles.images.stack_paths:
        if Path(path).exists():
            status = Path(path).stat()
            stacks.append({"path": path, "size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns})
    content = {"image_stacks": stacks, "unapplied_aberrations": [], **info}
    (folder / "import.json").write_text(json.dumps(content))
    return folder
