"""The whole workflow, started in every way it can be; what a change runs again is in test_reruns.py."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.workflow import following, snakemake_command, workflow_root

CHECKOUT = Path(__file__).resolve().parents[1]
SNAKEFILE = CHECKOUT / "workflows" / "Snakefile"
FIRST_RUN = {
    "import_particles": 1,
    "preprocess_images": 1,
    "reconstruct_consensus": 1,
    "train_model": 1,
    "analyze_latent": 1,
    "decode_volumes": 2,
    "write_report": 1,
}
TINY: dict[str, Any] = {
    "preprocess": {"box_size_px": 16},
    "train": {
        "encoder": "image",
        "decoder": "mlp",
        "latent_dim": 2,
        "epochs": 1,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_width": 16,
        "decoder_width": 16,
    },
    "analyze": {"clusters": 3, "principal_components": 1, "umap": False, "traversal_points": 2},
    "resources": {
        "train": {"threads": 1},
        "preprocess": {"threads": 1},
        "consensus": {"threads": 1},
        "volumes": {"threads": 1},
    },
}


def snakemake(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def planned(*words: object, cwd: Path) -> dict[str, int]:
    """How many jobs of each rule a dry run announces."""
    done = snakemake("--dry-run", *words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.search(r"^job +count\n[- ]+\n(.*?)^total", done.stdout, flags=re.MULTILINE | re.DOTALL)
    if table is None:
        assert "Nothing to be done" in done.stdout + done.stderr
        return {}
    counts = {line.split()[0]: int(line.split()[1]) for line in table[1].strip().splitlines()}
    return {rule: count for rule, count in counts.items() if rule not in ("all", "default")}


def commands(*words: object, cwd: Path) -> list[list[str]]:
    """The shell commands that a dry run announces, split into words as a shell would."""
    done = snakemake("--dry-run", "--printshellcmds", *words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    said = r"^Shell command: (?:exec )?(cryodrgn-pipeline .*) &> .*$"
    found = re.findall(said, done.stdout, flags=re.MULTILINE)
    return [shlex.split(line)[1:] for line in found]


def configured(folder: Path, content: dict[str, Any], name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(TINY | content), encoding="utf-8")
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a particle file and a configuration, for dry runs."""
    (tmp_path / "p.star").touch()
    configured(tmp_path, {"datasets": {"mine": {"particles": "p.star"}}})
    return tmp_path


def test_plain_snakemake_in_a_checkout_runs_the_whole_workflow(project: Path) -> None:
    assert planned("--directory", project, cwd=CHECKOUT) == FIRST_RUN


def test_a_snakefile_and_a_configfile_are_enough(project: Path) -> None:
    (project / "config.yaml").rename(project / "other.yaml")
    assert planned("-s", SNAKEFILE, "--configfile", "other.yaml", cwd=project) == FIRST_RUN


def test_a_configfile_stands_alone_beside_a_config_yaml(project: Path) -> None:
    configured(project, {"datasets": {"yours": {"particles": "p.star"}}}, "other.yaml")
    lines = commands("-s", SNAKEFILE, "--configfile", "other.yaml", cwd=project)
    words = [word for line in lines for word in line]
    assert "results/yours/import" in words
    assert not [word for word in words if "results/mine" in word]


def test_the_run_verb_passes_options_and_the_exit_code_on(project: Path) -> None:
    command = [sys.executable, "-m", "cryodrgn_pipeline", "run", "--cores", "1", "-n"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "This was a dry-run" in done.stdout + done.stderr
    wrong = subprocess.run(
        [*command, "no_such_file"], cwd=project, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1


def test_our_profiles_are_found_by_name_and_a_users_by_path(tmp_path: Path) -> None:
    ours = snakemake_command(tmp_path / "c.yaml", cores=None, profile="slurm", extra=[])
    assert str(workflow_root() / "workflows" / "profiles" / "slurm") in ours
    theirs = snakemake_command(tmp_path / "c.yaml", cores=None, profile=str(tmp_path), extra=[])
    assert theirs[-2:] == ["--profile", str(tmp_path)]


@pytest.mark.parametrize(
    ("extra", "cores"), [([], True), (["-np"], True), (["-j", "3"], False), (["--jobs=3"], False)]
)
def test_all_cores_are_taken_unless_something_else_is_said(
    tmp_path: Path, extra: list[str], cores: bool
) -> None:
    command = snakemake_command(tmp_path / "c.yaml", cores=None, profile=None, extra=extra)
    assert ("--cores" in command) is cores


@pytest.mark.parametrize("profile", ["default", "local-gpu", "slurm"])
def test_no_profile_holds_an_option_that_snakemake_does_not_know(profile: str) -> None:
    from snakemake.cli import get_argument_parser

    path = CHECKOUT / "workflows" / "profiles" / profile / "config.yaml"
    known = {action.dest for action in get_argument_parser()._actions} | {"resources"}
    for key in yaml.safe_load(path.read_text(encoding="utf-8")):
        assert key.replace("-", "_") in known


MODULE = """
from snakemake.utils import min_version
min_version("9.12")

rule mine:
    input: "flex/results/ours/all/vae/report.html"
    output: "mine.txt"
    shell: "touch {output}"

module flex:
    snakefile: "SNAKEFILE"
    config: {"datasets": {"ours": {"particles": "p.star"}}}
    pathvars:
        results="flex/results", logs="flex/logs", benchmarks="flex/benchmarks"

use rule * from flex as flex_*

use rule train_model from flex as flex_train_model with:
    threads: 3
"""


def test_the_workflow_is_a_module_of_another_one(tmp_path: Path) -> None:
    (tmp_path / "p.star").touch()
    (tmp_path / "Snakefile").write_text(MODULE.replace("SNAKEFILE", str(SNAKEFILE)), encoding="utf-8")
    plan = planned("--cores", "4", cwd=tmp_path)
    assert plan == {f"flex_{rule}": n for rule, n in FIRST_RUN.items() if rule != "decode_volumes"} | {
        "flex_decode_volumes": 3,
        "mine": 1,
    }
    by_verb = {line[0]: line for line in commands("--cores", "4", cwd=tmp_path)}
    train = by_verb["train"]
    assert train[train.index("-o") + 1] == "flex/results/ours/all/vae"
    assert train[train.index("--threads") + 1] == "3"
    assert train[train.index("--epochs") + 1] == "20"
    assert "p.star" in by_verb["import"]


def test_every_command_of_the_workflow_is_one_that_the_verbs_understand(tmp_path: Path) -> None:
    for name in ("p.cs", "q.cs", "r.mrc", "few.txt"):
        (tmp_path / name).touch()
    dataset = {
        "particles": "p.cs",
        "passthrough": ["q.cs"],
        "datadir": ".",
        "class": 1,
        "set": {"voltage_kv": 300},
        "conventions": {"transpose_rotations": True, "negate_shifts": True, "mirror_hand": True},
        "reference": "r.mrc",
        "mask": "r.mrc",
        "preprocess": {"mask_radius_a": 80.0, "dtype": "float16"},
        "consensus": {"check": False},
        "subsets": {
            "few": {"ids": "few.txt"},
            "some": {
                "from_run": "vae",
                "clusters": [0, 2],
                "ranges": ["z_0:-1:1"],
                "where": "loss < 2 and z_0 > 0",
                "without_junk": True,
                "invert": True,
            },
        },
        "runs": {
            "vae": {},
            "fine": {
                "subsets": ["few", "some"],
                "box_size_px": 32,
                "train": {"in_memory": True, "amp": False, "beta": 0.5},
                "analyze": {"through": [0, 1]},
                "volumes": {
                    "direct_path": True,
                    "graph_path": True,
                    "box_size_px": 8,
                    "low_pass_a": 20.0,
                    "flip_hand": True,
                    "crop_px": 8,
                },
            },
        },
    }
    configured(tmp_path, {"datasets": {"mine": dataset}})
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = commands("-s", SNAKEFILE, cwd=tmp_path)
    assert {line[0] for line in lines} == {
        "import",
        "preprocess",
        "consensus",
        "train",
        "analyze",
        "volumes",
        "select",
        "report",
    }
    for verb, *words in lines:
        verbs[verb].make_context(verb, words)


def test_every_setting_of_the_training_verb_can_be_configured() -> None:
    from cryodrgn_pipeline.config.models import Train

    verb = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    said_by_the_workflow = {"stack", "run", "subset", "threads", "resume", "processes", "nodes"}
    spoken = {"lazy": "in_memory"}
    settings = {spoken.get(parameter.name, parameter.name) for parameter in verb.params}
    assert settings - said_by_the_workflow == set(Train.model_fields)


def test_every_setting_of_the_training_reaches_the_verb(project: Path) -> None:
    from cryodrgn_pipeline.config.models import Train

    train = {
        "encoder": "image",
        "decoder": "mlp",
        "latent_dim": 1,
        "learn_from": 14,
        "epochs": 2,
        "batch_size": 3,
        "learning_rate": 4.0,
        "beta": 5.0,
        "loss": "whitened",
        "encoder_layers": 6,
        "encoder_width": 7,
        "encoder_type": "mlp",
        "decoder_layers": 8,
        "decoder_width": 9,
        "decoder_type": "mlp",
        "positional_encoding": "geometric",
        "domain": "hartley",
        "mask_radius": 0.1,
        "encoder_mask_radius": 0.2,
        "encoder_input": "image",
        "encoder_filter": "wiener",
        "coordinate_fraction": 0.3,
        "frequency_marching": 10,
        "held_out_fraction": 0.4,
        "checkpoint_every_epochs": 11,
        "checkpoint_every_minutes": 12.0,
        "seed": 13,
        "device": "cpu",
        "in_memory": True,
        "amp": True,
    }
    assert set(train) == set(Train.model_fields) - {"method"}
    analyze = {"principal_components": 2}
    configured(project, {"datasets": {"mine": {"particles": "p.star"}}, "train": train, "analyze": analyze})
    lines = commands("-s", SNAKEFILE, cwd=project)
    verb = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    (given,) = (verb.make_context("train", line[1:]).params for line in lines if line[0] == "train")
    given["in_memory"] = not given["lazy"]
    given |= {name: float(given[name]) for name in ("beta", "learning_rate")}
    assert {name: given[name] for name in train} == train
    assert sum(line[0] == "volumes" for line in lines) == 2  # centers, and pc1 of the one dimension


@pytest.mark.parametrize(
    ("resources", "command"),
    [
        ({}, "cryodrgn-pipeline train .* --device auto +--resume --threads 2 -o"),
        ({"gpus": 4}, "cryodrgn-pipeline train .* --device auto --processes 4 --resume --threads 2"),
        (
            {"gpus": 4, "nodes": 2},
            "srun --nodes 2 --ntasks 2 --cpus-per-task 2 --mem 0 --kill-on-bad-exit cryodrgn-pipeline train "
            ".* --processes 4 --nodes 2 --resume --threads 2",
        ),
        (
            {"gpus": 0, "nodes": 2},
            "srun --nodes 2 .*cryodrgn-pipeline train .* --device auto --nodes 2 --resume",
        ),
    ],
)
def test_a_training_has_a_process_for_each_gpu_and_srun_starts_it_on_each_node(
    project: Path, resources: dict[str, int], command: str
) -> None:
    train = {"train": {"threads": 2} | resources}
    configured(project, {"datasets": {"mine": {"particles": "p.star"}}, "resources": train})
    done = snakemake("-s", SNAKEFILE, "--dry-run", "--printshellcmds", cwd=project)
    assert re.search(rf"^Shell command: exec {command}", done.stdout, flags=re.MULTILINE)


def test_the_defaults_of_the_configuration_are_those_of_the_verbs(project: Path) -> None:
    (project / "config.yaml").write_text("datasets: {mine: {particles: p.star}}", encoding="utf-8")
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    said_by_the_workflow = {"threads", "resume", "z", "consensus", "volumes", "import_dir", "stack", "title"}
    for verb, *words in commands("-s", SNAKEFILE, cwd=project):
        given = verbs[verb].make_context(verb, words)
        for parameter in verbs[verb].params:
            if parameter.name not in said_by_the_workflow and not parameter.required:
                value, standard = given.params[parameter.name], parameter.get_default(given)
                assert (None if value == () else value) == standard, f"{verb}: {parameter.name}"


def test_file_names_reach_the_command_line_whole(tmp_path: Path) -> None:
    name = "it's; $HOME & `a` b.star"
    (tmp_path / name).touch()
    configured(tmp_path, {"datasets": {"mine": {"particles": name}}})
    assert ["import", name] in [line[:2] for line in commands("-s", SNAKEFILE, cwd=tmp_path)]


def test_snakemake_refuses_a_configuration_that_the_schema_does_not_allow(project: Path) -> None:
    configured(project, {"datasets": {"mine": {"particles": "p.star"}}, "trian": {}})
    done = snakemake("-n", "-s", SNAKEFILE, cwd=project)
    assert done.returncode == 1
    assert "trian" in done.stdout + done.stderr


def test_an_empty_configuration_is_answered_with_what_to_do(project: Path) -> None:
    (project / "config.yaml").write_text("datasets: {}", encoding="utf-8")
    done = snakemake("-n", "-s", SNAKEFILE, cwd=project)
    assert done.returncode == 1
    assert "cryodrgn-pipeline init" in done.stdout + done.stderr


def test_lines_of_running_jobs_are_shown_with_their_names(tmp_path: Path) -> None:
    logs, stream = tmp_path / "logs", io.StringIO()
    (logs / "mine").mkdir(parents=True)
    (logs / "mine" / "import.log").write_text("old\n", encoding="utf-8")
    with following(logs, stream):
        (logs / "mine" / "import.log").unlink()
        (logs / "mine" / "import.log").write_text("new\n", encoding="utf-8")
        (logs / "mine" / "train.log").write_text("epoch 1\nepoch 2\nhalf a li", encoding="utf-8")
    shown = stream.getvalue().splitlines()
    assert shown == ["  mine/import | new", "  mine/train | epoch 1", "  mine/train | epoch 2"]
