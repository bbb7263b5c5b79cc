"""A stand-in instance with one refinement in it, and commands that talk to it, for tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryosparc.dataset import Dataset
from standin import server, server4
from standin.slots import slot_fields
from standin.state import EMAIL, LICENSE, PASSWORD, State

from cryodrgn_pipeline.io.mrc import write_volume

PROJECT, WORKSPACE, REFINEMENT = "P3", "W1", "J1"
VERSIONS = {"5": "v5.0.6", "4": "v4.7.1"}


@dataclass
class Instance:
    """A running stand-in: its state, the folder of its project, and who talks to it how."""

    state: State
    project: Path
    python: Path
    environment: dict[str, str]

    def command(self, *words: object) -> list[str]:
        return [str(self.python), "-m", "cryodrgn_pipeline", *map(str, words)]

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), env=self.environment, capture_output=True, text=True, check=False
        )


@contextmanager
def instance(
    folder: Path, particles: Any, python: Path, major: str, maps: Mapping[str, Any] | None = None
) -> Iterator[Instance]:
    """Serve an instance whose refinement holds these particles (columns by name), a map and a mask.

    `maps` has densities of `map` and `mask`; what it lacks is 1 everywhere.
    """
    state = State(folder / "instance", VERSIONS[major])
    project = state.add_project(PROJECT)
    state.add_workspace(PROJECT, WORKSPACE)
    add_refinement(state, particles, maps or {})
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CRYOSPARC_")}
    environment |= {
        "CRYOSPARC_EMAIL": EMAIL,
        "CRYOSPARC_PASSWORD": PASSWORD,
        "XDG_CONFIG_HOME": str(folder / "config"),
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    with ExitStack() as open_faces:
        if major == "5":
            url = open_faces.enter_context(server.served(state))
            environment["CRYOSPARC_BASE_URL"] = url
        else:
            base = open_faces.enter_context(server4.served(state))
            environment |= {
                "CRYOSPARC_MASTER_HOSTNAME": server.LOOPBACK,
                "CRYOSPARC_BASE_PORT": str(base),
                "CRYOSPARC_LICENSE_ID": LICENSE,
            }
        yield Instance(state, project, python, environment)


def add_refinement(state: State, columns: Mapping[str, Any], densities: Mapping[str, Any]) -> None:
    """J1, a refinement: poses are its own, images and CTF passed through; a map with half maps, a mask."""
    job = state.set_status(state.new_job(PROJECT, WORKSPACE, "nonuniform_refine_new"), "completed")
    particles = Dataset({"uid": columns["uid"]})
    for slot in ("blob", "ctf", "alignments3D"):
        particles.add_fields(slot_fields("particle", slot, slot))
    for name in particles.fields():
        if name in columns:
            particles[name] = columns[name]
    if "ctf/scale" not in columns:
        particles["ctf/scale"] = 1
    slots = [("alignments3D", "alignments3D", False), ("blob", "blob", True), ("ctf", "ctf", True)]
    state.add_output(job, "particles", "particle", slots, particles)
    box, psize_a = int(columns["blob/shape"][0, 0]), float(columns["blob/psize_A"][0])
    maps = [("map", "blob", False), ("map_half_A", "blob", False), ("map_half_B", "blob", False)]
    for name, kind, own in (("volume", "volume", maps), ("mask", "mask", [("mask", "blob", False)])):
        rows = Dataset({"uid": np.array([1], dtype=np.uint64)})
        for slot, dtype, _ in own:
            path = f"{job.uid}/{job.uid}_{name}_{slot}.mrc"
            density = densities.get(slot, np.ones((box,) * 3, dtype=np.float32))
            write_volume(state.folder(PROJECT) / path, density, psize_a)
            rows.add_fields(slot_fields(kind, slot, dtype))
            rows[f"{slot}/path"] = path
            rows[f"{slot}/shape"] = [[box] * 3]
            rows[f"{slot}/psize_A"] = psize_a
        state.add_output(job, name, kind, own, rows)
