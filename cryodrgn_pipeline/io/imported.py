"""An import folder as the steps that read images need it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.runs import read_json
from cryodrgn_pipeline.io.tables import read_particles
from cryodrgn_pipeline.particles import UNKNOWN_BOX, ParticleSet

PARTICLES, INFO = "particles.parquet", "import.json"


def read_info(folder: Path) -> dict[str, Any]:
    """The content of a folder's import.json; an `InputFormatError` if it is missing or damaged."""
    return read_json(Path(folder) / INFO, "make it with `cryodrgn-pipeline import`")


def aberration_note(item: Mapping[str, Any]) -> str:
    """One line on an aberration of import.json, which the source records and no step applies."""
    return (
        f"{item['name']} is not applied: {item['rows']} of {item['of']} rows, up to {item['max']:.4g}; "
        f"{item['effect']}"
    )


class ImportedSource:
    """Particles whose images can be read, and what the import said about them.

    `in_force` is what remedies of the convention check are relative to; `notes` holds one line per aberration
    that no step applies; `recorded` size in bytes and modification time in ns by stack path; `fingerprint`
    changes with the particle table and with the image files.
    """

    def __init__(self, folder: Path, particles: ParticleSet, info: dict[str, Any], fingerprint: str) -> None:
        if info.get("metadata_only") or bool((particles.optics.box_size_px == UNKNOWN_BOX).any()):
            raise InputFormatError(
                f"{folder}: was imported with --metadata-only, so its image files were not looked for; "
                "import the particles again without it (--datadir names the folder of their paths)"
            )
        if len(particles) == 0:
            raise InputFormatError(f"{folder}: has no particles")
        self.particles = particles
        self.fingerprint = fingerprint
        self.in_force = _in_force(particles, info)
        self.notes = [aberration_note(item) for item in info["unapplied_aberrations"]]
        self.recorded = {
            item["path"]: (int(item["size_bytes"]), int(item["mtime_ns"])) for item in info["image_stacks"]
        }

    @classmethod
    def open(cls, folder: Path) -> ImportedSource:
        """Read `folder`'s particle table and import.json; an `InputFormatError` if one is not usable."""
        particles = read_particles(folder)
        info = read_info(folder)
        with (folder / PARTICLES).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(json.dumps(info["image_stacks"], sort_keys=True).encode())
        return cls(folder, particles, info, digest.hexdigest())


def _in_force(particles: ParticleSet, info: dict[str, Any]) -> dict[str, Any]:
    """Pixel size of most images in Å, contrast sign (None where it differs) and the remedies applied."""
    sizes, counts = np.unique(particles.optics.pixel_size_a, return_counts=True)
    signs = np.unique(particles.contrast_sign)
    return {
        "pixel_size_a": float(sizes[counts.argmax()]),
        "contrast_sign": float(signs[0]) if len(signs) == 1 else None,
        "conventions": info.get("conventions", {}),
    }
