"""The command line as its user meets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import cryodrgn_pipeline
from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.config import load_config
from cryodrgn_pipeline.workflow import snakemake_command, workflow_root

VERBS = (
    "import",
    "export",
    "preprocess",
    "phase-flip",
    "consensus",
    "simulate",
    "train",
    "encode",
    "volumes",
    "analyze",
    "select",
    "report",
    "evaluate",
    "read-cryosparc",
    "push",
    "live-check",
    "init",
    "run",
    "plan",
    "status",
    "demo",
)


def command_line(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cryodrgn_pipeline", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_version_is_printed() -> None:
    assert command_line("--version").stdout.strip() == f"cryodrgn-pipeline {cryodrgn_pipeline.__version__}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert f"Example: cryodrgn-pipeline {verb} " in commands[verb].help


def test_no_verb_is_unknown_to_these_tests() -> None:
    assert set(typer.main.get_command(app).commands) == set(VERBS)  # type: ignore[attr-defined]


def test_help_lists_every_verb() -> None:
    text = command_line("--help").stdout
    assert all(f" {verb} " in text for verb in VERBS)


def test_an_unknown_verb_is_a_usage_error() -> None:
    assert command_line("dance").returncode == 2


def test_init_writes_a_configuration_that_loads(tmp_path: Path) -> None:
    (tmp_path / "job 1").mkdir()
    (tmp_path / "job 1" / "run_data.star").touch()
    done = command_line("init", "--particles", "job 1/run_data.star", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "config.yaml")
    config = load_config(tmp_path / "config.yaml")
    assert config.datasets["run_data"].particles == "job 1/run_data.star"


def test_init_writes_a_name_that_yaml_takes_for_a_number_as_text(tmp_path: Path) -> None:
    (tmp_path / "007.star").touch()
    assert command_line("init", "--particles", "007.star", cwd=tmp_path).returncode == 0
    assert list(load_config(tmp_path / "config.yaml").datasets) == ["007"]


def test_init_without_particles_writes_the_template(tmp_path: Path) -> None:
    assert command_line("init", "-o", "new.yaml", cwd=tmp_path).returncode == 0
    assert load_config(tmp_path / "new.yaml").datasets == {}


def test_init_finds_the_passthrough_file_of_the_same_cryosparc_job(tmp_path: Path) -> None:
    for name in ("J24_005_particles.cs", "J24_passthrough_particles.cs", "J9_passthrough_particles.cs"):
        (tmp_path / name).touch()
    done = command_line("init", "--particles", "J24_005_particles.cs", "--name", "ours", cwd=tmp_path)
    assert done.returncode == 0
    assert load_config(tmp_path / "config.yaml").datasets["ours"].passthrough == [
        "J24_passthrough_particles.cs"
    ]


def test_init_copies_a_profile_to_fill_in_and_run_takes_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command_line("init", "--profile", "slurm", cwd=tmp_path)
    assert done.stdout == "slurm/config.yaml\n"
    assert [path.name for path in tmp_path.iterdir()] == ["slurm"]
    ours = workflow_root() / "workflows" / "profiles" / "slurm" / "config.yaml"
    copy = tmp_path / "slurm" / "config.yaml"
    assert copy.read_text() == ours.read_text()
    copy.write_text("executor: slurm\n")
    refused = command_line("init", "--profile", "slurm", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    assert copy.read_text() == "executor: slurm\n"
    monkeypatch.chdir(tmp_path)
    assert snakemake_command(Path("c.yaml"), cores=None, profile="slurm", extra=[])[-1] == "slurm"


def test_init_with_particles_and_a_profile_writes_both(tmp_path: Path) -> None:
    (tmp_path / "p.star").touch()
    done = command_line("init", "--particles", "p.star", "--profile", "local-gpu", cwd=tmp_path)
    assert done.stdout.split() == ["local-gpu/config.yaml", "config.yaml"]
    unknown = command_line("init", "--profile", "pbs", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "local-gpu, slurm" in unknown.stderr


def test_init_leaves_a_file_that_is_there_unless_forced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine", encoding="utf-8")
    refused = command_line("init", cwd=tmp_path)
    assert (refused.returncode, (tmp_path / "config.yaml").read_text(encoding="utf-8")) == (2, "mine")
    assert "--force" in refused.stderr
    assert command_line("init", "--force", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(("name", "words"), [("p.csv", "expected a RELION .star"), (None, "does not exist")])
def test_init_refuses_what_is_no_particle_file(tmp_path: Path, name: str | None, words: str) -> None:
    if name:
        (tmp_path / name).touch()
    done = command_line("init", "--particles", name or "none.star", cwd=tmp_path)
    assert done.returncode == 3
    assert words in done.stderr
    assert not (tmp_path / "config.yaml").exists()


def test_run_names_the_mistakes_of_a_configuration_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train:\n  epochz: 3\n  seed: x\n", encoding="utf-8")
    done = command_line("run", "--configfile", "config.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "line 2, train.epochz: unknown key; did you mean epochs?" in done.stderr
    assert "line 3, train.seed: expected a whole number" in done.stderr
    assert not (tmp_path / ".snakemake").exists()


def test_run_names_files_that_do_not_exist(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("datasets: {mine: {particles: none.star}}", encoding="utf-8")
    done = command_line("run", cwd=tmp_path)
    assert done.returncode == 2
    assert "datasets.mine.particles: no none.star in" in done.stderr


def test_run_asks_for_a_dataset_when_there_is_none(tmp_path: Path) -> None:
    command_line("init", cwd=tmp_path)
    done = command_line("run", cwd=tmp_path)
    assert done.returncode == 2
    assert "datasets is empty" in done.stderr
