"""A configuration for the user's data, and the demonstration on a simulated set with known answers."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.io.atomic import replacing

log = logging.getLogger(__name__)

DEMO_SIMULATION = {"--particles": 10000, "--box-size": 32, "--pixel-size": 6.0, "--snr": 0.25, "--seed": 0}
DEMO_SETTINGS: dict[str, Any] = {
    "preprocess": {"box_size_px": 32},
    "analyze": {"clusters": 10},
    "volumes": {"direct_path": True},
}
SMALL_SIMULATION = DEMO_SIMULATION | {"--particles": 200, "--box-size": 16, "--pixel-size": 12.0}
SMALL_SETTINGS: dict[str, Any] = {
    "preprocess": {"box_size_px": 16},
    "train": {"latent_dim": 2},
    "analyze": {"clusters": 4, "umap": False},
    "volumes": {"principal_components": 1},
}


def write_config(
    path: Path,
    *,
    particles: Path | None = None,
    passthrough: tuple[Path, ...] = (),
    datadir: Path | None = None,
    reference: Path | None = None,
    name: str | None = None,
    force: bool = False,
) -> None:
    """Write a commented config.yaml for a particle file, or an empty template without one.

    Parameters
    ----------
    path
        The file to write.
    particles
        RELION .star or cryoSPARC .cs file; paths are written as they are given.
    passthrough
        cryoSPARC passthrough files; one that lies beside `particles` is found without being named.
    datadir, reference
        Folder of the images and the user's own consensus map, if any.
    name
        The dataset's name; made from the file's name when not given.
    force
        Replace a file that is already there.

    Raises
    ------
    ConfigError
        `path` exists and `force` is not set.
    InputFormatError
        A named file does not exist or is neither .star nor .cs.
    """
    from cryodrgn_pipeline.config.template import config_text

    if path.exists() and not force:
        raise ConfigError(f"{path} exists and is left as it is; --force replaces it, -o writes another")
    datasets: dict[str, dict[str, Any]] = {}
    if particles is not None:
        given: dict[str, Any] = {"particles": str(particles)}
        found = passthrough or _neighbouring_passthrough(particles)
        for file in filter(None, (particles, *found, datadir, reference)):
            if not file.exists():
                raise InputFormatError(f"{file} does not exist (looked from {Path.cwd()})")
        if particles.suffix not in (".star", ".cs"):
            raise InputFormatError(f"{particles}: expected a RELION .star or a cryoSPARC .cs file")
        if found:
            given["passthrough"] = [str(file) for file in found]
        given |= {"datadir": str(datadir)} if datadir else {}
        given |= {"reference": str(reference)} if reference else {}
        datasets[_dataset_name(name or particles.stem)] = given
    with replacing(path) as temporary:
        temporary.write_text(config_text(datasets), encoding="utf-8")


def _neighbouring_passthrough(particles: Path) -> tuple[Path, ...]:
    """Find the passthrough file of the same job: J24_005_particles.cs, J24_passthrough_particles.cs."""
    if particles.suffix != ".cs" or "passthrough" in particles.name:
        return ()
    job = re.search(r"(?:^|_)(J\d+)_", particles.name)
    beside = sorted(particles.parent.glob("*passthrough_particles*.cs"))
    same_job = [file for file in beside if job and re.search(rf"(?:^|_){job[1]}_", file.name)]
    if same_job:
        log.info("found the passthrough file %s", same_job[0])
    return tuple(same_job[:1])


def _dataset_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip("_.-") or "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Where the demonstration's results lie, and how well the known answers were found."""

    exit_code: int
    folder: Path
    r2: dict[str, float]

    @property
    def run(self) -> Path:
        """The folder of the one training of the demonstration."""
        return self.folder / "results" / "demo" / "all" / "vae"


def run_demo(folder: Path, *, cores: str, small: bool = False) -> DemoResult:
    """Simulate a set with known answers, run the whole workflow on it and measure what it found.

    What is there already is kept: a second call has nothing to do.

    Parameters
    ----------
    folder
        Holds `data/`, `config.yaml` and the workflow's results.
    cores
        For Snakemake.
    small
        A set of a minute, for tests: it shows that everything runs, not what can be found.
    """
    from cryodrgn_pipeline.workflow import run_command_line, run_workflow

    simulation, settings = (SMALL_SIMULATION, SMALL_SETTINGS) if small else (DEMO_SIMULATION, DEMO_SETTINGS)
    folder.mkdir(parents=True, exist_ok=True)
    data, configfile = folder / "data", folder / "config.yaml"
    if not (data / "particles.star").exists():
        words = [str(word) for option in simulation.items() for word in option]
        code = run_command_line(["simulate", *words, "-o", str(data)])
        if code:
            return DemoResult(exit_code=code, folder=folder, r2={})
    if not configfile.exists():
        _write_demo_config(configfile, settings)
    code = run_workflow(configfile, cores=cores, extra=["--directory", str(folder)])
    result = DemoResult(exit_code=code, folder=folder, r2={})
    return result if code else DemoResult(exit_code=0, folder=folder, r2=_measured(result.run, data))


def _write_demo_config(path: Path, settings: dict[str, Any]) -> None:
    from cryodrgn_pipeline.config.models import Config
    from cryodrgn_pipeline.config.template import config_text

    dataset = {"particles": "data/particles.star", "reference": "data/consensus.mrc"}
    sections = Config.model_validate(settings)
    with replacing(path) as temporary:
        temporary.write_text(config_text({"demo": dataset}, sections), encoding="utf-8")


def _measured(run: Path, data: Path) -> dict[str, float]:
    """Find how much of the true coordinates the latent explains (20-NN R²)."""
    from cryodrgn_pipeline.evaluate import latent_scores, read_truth

    r2: dict[str, float] = latent_scores(run, read_truth(data))["r2"]
    return r2
