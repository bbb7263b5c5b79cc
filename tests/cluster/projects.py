"""A small project as a user on a cluster has it: particles, config.yaml, the slurm profile filled in."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from slurm_cluster import kill_tree

RUN = "results/mine/all/vae"
TRAINED = f"{RUN}/run.json"  # written last by the training
SMALL: dict[str, Any] = {
    "preprocess": {"box_size_px": 16},
    "train": {
        "encoder": "image",
        "decoder": "mlp",
        "latent_dim": 2,
        "epochs": 2,
        "checkpoint_every_epochs": 10,
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


@dataclass(frozen=True)
class Head:
    """A `run` on the login node: its process, and the file of what it says."""

    process: subprocess.Popen[bytes]
    said: Path

    @property
    def output(self) -> str:
        """What it has said so far, stdout and stderr."""
        return self.said.read_text(encoding="utf-8")

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.process.returncode

    def wait(self) -> None:
        """Wait for its end."""
        self.process.wait()


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

    @property
    def pid(self) -> int:
        """The process of the training that runs."""
        return int(json.loads((self.run_folder / "progress.json").read_text(encoding="utf-8"))["pid"])

    @property
    def log(self) -> str:
        """What the training has said in its last attempt; nothing before it started."""
        path = self.folder / "logs" / "mine" / "all" / "vae" / "train.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def epoch(self) -> int:
        """The last epoch that the training's last attempt has ended."""
        said = re.findall(r"INFO epoch (\d+) of", self.log)
        return int(said[-1]) if said else 0

    @property
    def resumed_after(self) -> int | None:
        """The epochs that the training's last attempt found in its checkpoint; None where it began anew."""
        said = re.search(r"resuming after (\d+) epochs", self.log)
        return int(said[1]) if said else None

    def provide(self, imported: Path, stack: Path, consensus: Path) -> None:
        """Put the results of the steps before training in place, so that training is what is left to do."""
        for source, name in ((imported, "import"), (stack, "stack_16"), (consensus, "consensus_16")):
            shutil.copytree(source, self.folder / "results" / "mine" / name)

    def untrained_copy(self, folder: Path) -> Project:
        """The project as it was before its training, in another folder."""
        other = copy.copy(self)
        other.folder = folder
        shutil.copytree(self.folder, folder)
        shutil.rmtree(other.run_folder)
        return other

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

    def on_cluster(self, *words: str) -> Head:
        """`run --profile slurm` to its end."""
        with self.started(*words) as head:
            head.wait()
        return head

    @contextmanager
    def started(self, *words: str) -> Iterator[Head]:
        """`run --profile slurm` as a process, killed if the block ends before it."""
        often = ("--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "10")
        call = self._call(("run", "--profile", "slurm", *often, *words))
        said = self.folder / "head.log"
        with said.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(**call, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield Head(process, said)
        finally:
            kill_tree(process.pid)
            process.wait()

    def _call(self, words: tuple[str, ...]) -> dict[str, Any]:
        command = [sys.executable, "-m", "cryodrgn_pipeline", *words]
        return {"args": command, "cwd": self.folder, "env": os.environ | ENVIRONMENT}
