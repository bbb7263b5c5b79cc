"""A small project as a user on a cluster has it: particles, config.yaml, the slurm profile filled in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

RUN = "results/mine/all/vae"
SMALL: dict[str, Any] = {
    "preprocess": {"box_size_px": 16},
    "train": {
        "encoder": "image",
        "decoder": "mlp",
        "latent_dim": 2,
        "epochs": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_width": 16,
        "decoder_width": 16,
    },
    "analyze": {"clusters": 3, "principal_components": 1, "umap": False, "traversal_points": 2},
    "resources": {
        step: {"threads": 1, "mem_mb": 1000, "runtime_min": 10}
        for step in ("import", "preprocess", "consensus", "train", "analyze", "volumes", "report")
    },
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Project:
    """A working directory with a config.yaml on some particles and what `init --profile slurm` wrote there.

    Parameters
    ----------
    folder
        The working directory; it is made.
    particles
        The star file.
    settings
        Sections of config.yaml that differ from SMALL.
    profile
        Lines of the slurm profile by what stands in their place: a site's account, partition, modules.
    """

    def __init__(
        self,
        folder: Path,
        particles: Path,
        settings: Mapping[str, Any] | None = None,
        profile: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.configure(particles, settings or {})
        self.verb("init", "--profile", "slurm")
        path = folder / "slurm" / "config.yaml"
        text = path.read_text(encoding="utf-8")
        for line, filled_in in (profile or {}).items():
            if text.count(line) != 1:
                raise ValueError(f"{path}: {line!r} stands there {text.count(line)} times")
            text = text.replace(line, filled_in)
        path.write_text(text, encoding="utf-8")

    @property
    def run_folder(self) -> Path:
        """The folder of the one training."""
        return self.folder / RUN

    def configure(self, particles: Path, settings: Mapping[str, Any]) -> None:
        """Write config.yaml."""
        content: dict[str, Any] = {"datasets": {"mine": {"particles": str(particles)}}}
        for section in {*SMALL, *settings}:
            content[section] = SMALL.get(section, {}) | settings.get(section, {})
        (self.folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    def verb(self, *words: str) -> subprocess.CompletedProcess[str]:
        """One of our verbs, run to its end in the project's folder; it has to succeed."""
        done = subprocess.run(**self._call(words), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{words}: {done.stdout}{done.stderr}")
        return done

    def on_cluster(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`run --profile slurm` to its end; stdout and stderr together in `stdout`."""
        with self.started(*words) as head:
            shown, _ = head.communicate()
        return subprocess.CompletedProcess(head.args, head.returncode, shown, "")

    def started(self, *words: str) -> subprocess.Popen[str]:
        """`run --profile slurm` as a process; it asks for jobs' states often, for short tests."""
        often = ("--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "10")
        call = self._call(("run", "--profile", "slurm", *often, *words))
        return subprocess.Popen(
            **call,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _call(self, words: tuple[str, ...]) -> dict[str, Any]:
        command = [sys.executable, "-m", "cryodrgn_pipeline", *words]
        return {"args": command, "cwd": self.folder, "env": os.environ | ENVIRONMENT}
