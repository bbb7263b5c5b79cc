"""What a change runs again: the table of docs/workflow.md, row by row, on a workflow that ran to its end."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import starfile
from cryosparc.dataset import Dataset
from test_workflow import CHECKOUT, SNAKEFILE, TINY, configured, planned, snakemake

from cryodrgn_pipeline.io.tables import read_particles

Plan = dict[str, int]
AFTER_TRAINING = {"analyze_latent": 1, "decode_volumes": 2, "write_report": 1}
TRAINING = {"train_model": 1} | AFTER_TRAINING
CHOSEN_TRAINING = {"select_subset": 1} | TRAINING


def dataset_of_the_tests() -> dict[str, Any]:
    """One refinement, trained on all particles, on an id file, and on what the first training found."""
    chosen = {"from_run": "vae", "clusters": [0, 1], "where": "z_0 > -99", "without_junk": True}
    return {
        "particles": "data/particles.star",
        "subsets": {"few": {"ids": "few.txt"}, "most": chosen},
        "runs": {"vae": {"subsets": ["all", "few", "most"]}},
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that the whole workflow has run on."""
    folder = tmp_path_factory.mktemp("finished")
    simulate = ["simulate", "--particles", "48", "--box-size", "16", "--pixel-size", "12", "-o", "data"]
    subprocess.run([sys.executable, "-m", "cryodrgn_pipeline", *simulate], cwd=folder, check=True)
    configured(folder, {"datasets": {"mine": dataset_of_the_tests()}})
    (folder / "few.txt").touch()
    run(folder, "--until", "import_particles")
    ids = particle_ids(folder)
    (folder / "few.txt").write_text("\n".join(ids[:30]) + "\n", encoding="utf-8")
    (folder / "other.txt").write_text("\n".join(ids[10:40]) + "\n", encoding="utf-8")
    run(folder)
    return folder


def run(folder: Path, *words: str) -> None:
    done = snakemake("-s", SNAKEFILE, *words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def particle_ids(folder: Path) -> list[str]:
    particles = read_particles(folder / "results/mine/import/particles.parquet")
    return [str(name) for name in particles.particle_id]


def latent_ids(folder: Path, subset: str) -> list[str]:
    table = pq.read_table(folder / f"results/mine/{subset}/vae/latent.parquet", columns=["particle_id"])
    ids: list[str] = table["particle_id"].to_pylist()
    return ids


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project, to change something in."""
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)  # keeps the times of the files
    return folder


def plan(folder: Path, sections: dict[str, Any] | None = None, **dataset: Any) -> Plan:
    """What would run after settings of the dataset, or whole sections, were changed."""
    mine = dataset_of_the_tests() | dataset
    configured(folder, {"datasets": {"mine": mine}} | (sections or {}))
    return planned("-s", SNAKEFILE, cwd=folder)


def times(n: int, jobs: Plan) -> Plan:
    return {rule: n * count for rule, count in jobs.items()}


def touch_everything_of_the_user(folder: Path) -> None:
    assert plan(folder) == {}
    for name in ("few.txt", "data/particles.star", "config.yaml"):
        (folder / name).touch()
    assert plan(folder) == {}


def edit_an_id_file(folder: Path) -> None:
    shutil.copy(folder / "other.txt", folder / "few.txt")
    assert plan(folder) == TRAINING


def add_subsets_and_runs(folder: Path) -> None:
    given = dataset_of_the_tests()
    listed = given["subsets"] | {"other": {"ids": "other.txt"}}
    chosen = given["subsets"] | {"rest": {"from_run": "vae", "clusters": [2]}}
    for subsets, expected in ((listed, TRAINING), (chosen, CHOSEN_TRAINING)):
        runs = {"vae": {"subsets": ["all", *subsets]}}
        assert plan(folder, subsets=subsets, runs=runs) == expected
    assert plan(folder, runs=given["runs"] | {"second": {"subsets": ["few"]}}) == TRAINING
    of_few = given["subsets"] | {"fewer": {"from_run": "vae", "from_subset": "few", "ranges": ["z_0::99"]}}
    assert plan(folder, subsets=of_few, runs=given["runs"] | {"second": {"subsets": ["fewer"]}}) == (
        CHOSEN_TRAINING
    )


def change_a_choice(folder: Path) -> None:
    given = dataset_of_the_tests()["subsets"]
    for change in (
        {"clusters": [1, 2]},
        {"ranges": ["z_0:-99:99"]},
        {"where": "z_0 > -98"},
        {"without_junk": False},
        {"invert": True},
    ):
        assert plan(folder, subsets=given | {"most": given["most"] | change}) == CHOSEN_TRAINING, change


def take_subsets_out(folder: Path) -> None:
    given = dataset_of_the_tests()["subsets"]
    assert plan(folder, subsets={"few": given["few"]}, runs={"vae": {"subsets": ["all", "few"]}}) == {}
    assert plan(folder, subsets={}, runs={"vae": {}}) == {}
    assert len(latent_ids(folder, "few")) == 30


def change_volumes(folder: Path) -> None:
    assert plan(folder, {"volumes": {"flip_hand": True}}) == {"decode_volumes": 6, "write_report": 3}


def change_the_analysis(folder: Path) -> None:
    expected = times(3, AFTER_TRAINING) | {"select_subset": 1, "train_model": 1}
    assert plan(folder, {"analyze": TINY["analyze"] | {"clusters": 2}}) == expected


def change_the_training(folder: Path) -> None:
    expected = times(3, TRAINING) | {"select_subset": 1}
    assert plan(folder, {"train": TINY["train"] | {"epochs": 2}}) == expected


def change_the_particles(folder: Path) -> None:
    before = {"import_particles": 1, "preprocess_images": 1, "reconstruct_consensus": 1}
    expected = before | times(3, TRAINING) | {"select_subset": 1}
    assert plan(folder, set={"voltage_kv": 200}) == expected
    assert plan(folder, conventions={"negate_shifts": True}) == expected
    with (folder / "data" / "particles.star").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert plan(folder) == expected


def export_the_subsets(folder: Path) -> None:
    given = dataset_of_the_tests()["subsets"]
    assert plan(folder, export=["star", "cs"]) == {"export_particles": 4}
    untrained = {"untrained": {"from_run": "vae", "clusters": [2]}}
    expected = {"select_subset": 1, "export_particles": 3}
    assert plan(folder, export=["star"], subsets=given | untrained) == expected


def give_maps(folder: Path) -> None:
    for key in ("reference", "mask"):
        expected = {"reconstruct_consensus": 1, "write_report": 3}
        assert plan(folder, **{key: "data/consensus.mrc"}) == expected


def change_resources(folder: Path) -> None:
    resources = TINY["resources"] | {"train": {"threads": 2, "mem_mb": 1234}}
    assert plan(folder, {"resources": resources}) == {}


def change_the_stacks(folder: Path) -> None:
    for stack in (folder / "data" / "stacks").iterdir():
        with stack.open("ab") as file:
            file.write(b"\0")
    assert plan(folder) == {}


CASES: dict[str, Callable[[Path], None]] = {
    "nothing; or a file touched, its content unchanged": touch_everything_of_the_user,
    "an id file's content": edit_an_id_file,
    "a new subset or run": add_subsets_and_runs,
    "a subset's choice: `clusters`, `ranges`, `where`, `without_junk`, `invert`": change_a_choice,
    "a subset or run taken out": take_subsets_out,
    "`volumes:`": change_volumes,
    "`analyze:`": change_the_analysis,
    "`train:`": change_the_training,
    "the particle file's content, `set`, `conventions`": change_the_particles,
    "`export:`": export_the_subsets,
    "`reference`, `mask`": give_maps,
    "`resources:`": change_resources,
    "the image stacks": change_the_stacks,
}


def test_every_row_of_the_documented_table_is_tested() -> None:
    text = (CHECKOUT / "docs" / "workflow.md").read_text(encoding="utf-8")
    section = text.split("## What runs again", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.+?) \| .+ \|$", section, flags=re.MULTILINE)
    of_cryosparc = [
        row for row in rows if "cryoSPARC" in row or "`push:`" in row
    ]  # test_cryosparc_workflow.py
    assert [row for row in rows if row not in of_cryosparc] == ["change", *CASES]


@pytest.mark.parametrize("change", CASES)
def test_a_change_runs_again_what_the_table_says(change: str, again: Path) -> None:
    CASES[change](again)


def test_a_finished_workflow_has_written_what_it_promises(finished: Path) -> None:
    for subset in ("all", "few", "most"):
        folder = finished / "results" / "mine" / subset / "vae"
        for name in ("latent.parquet", "model.safetensors", "metrics.jsonl", "run.json", "report.html"):
            assert (folder / name).stat().st_size > 0
        assert len(list((folder / "volumes" / "centers").glob("vol_*.mrc"))) == 3
    for name in ("train.log", "report.log"):
        assert (finished / "logs" / "mine" / "all" / "vae" / name).is_file()
    assert (finished / "logs" / "benchmarks" / "mine" / "import.tsv").is_file()


def test_subsets_hold_the_particles_that_were_asked_for(finished: Path) -> None:
    ids = particle_ids(finished)
    assert latent_ids(finished, "all") == ids
    assert latent_ids(finished, "few") == ids[:30]
    analysis = pq.read_table(finished / "results/mine/all/vae/analysis/particles.parquet")
    wanted = np.isin(analysis["cluster"].to_numpy(), [0, 1]) & ~analysis["junk"].to_numpy(
        zero_copy_only=False
    )
    chosen = [name for name, keep in zip(ids, wanted, strict=True) if keep]
    assert 0 < len(chosen) < len(ids)
    assert latent_ids(finished, "most") == chosen
    listed = (finished / "results/mine/most/ids.txt").read_text(encoding="utf-8").split()
    assert listed == chosen


def test_changed_subsets_are_trained_on_and_nothing_else_is_written(again: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (again / "results").rglob("*") if path.is_file()}
    shutil.copy(again / "other.txt", again / "few.txt")
    given = dataset_of_the_tests()
    given["subsets"]["most"]["clusters"] = [1, 2]
    configured(again, {"datasets": {"mine": given}})
    run(again)
    assert planned("-s", SNAKEFILE, cwd=again) == {}
    assert latent_ids(again, "few") == particle_ids(again)[10:40]
    ids = (again / "results/mine/most/ids.txt").read_text(encoding="utf-8").split()
    assert latent_ids(again, "most") == ids
    changed = (again / "results/mine/few", again / "results/mine/most")
    kept = {path: at for path, at in before.items() if not any(map(path.is_relative_to, changed))}
    assert len(kept) > 20
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_subsets_are_written_for_relion_and_for_cryosparc(again: Path) -> None:
    configured(again, {"datasets": {"mine": dataset_of_the_tests() | {"export": ["star", "cs"]}}})
    run(again)
    assert planned("-s", SNAKEFILE, cwd=again) == {}
    for subset in ("few", "most"):
        folder = again / "results" / "mine" / subset
        written = starfile.read(folder / "particles.star")["particles"]
        assert list(written["rlnImageName"]) == latent_ids(again, subset)
        assert len(Dataset.load(folder / "particles.cs")) == len(written)
        assert (folder / "particles.csg").is_file()


def test_a_failed_job_names_its_reason_on_the_screen_and_leaves_the_other_subsets(again: Path) -> None:
    (again / "few.txt").write_text("no_such_particle\n", encoding="utf-8")
    done = snakemake("-s", SNAKEFILE, cwd=again)
    assert done.returncode == 1
    assert "no_such_particle" in done.stdout + done.stderr
    assert not (again / "results/mine/few/vae/latent.parquet").exists()
    assert len(latent_ids(again, "all")) == 48


def test_a_choice_of_nothing_stops_before_training(again: Path) -> None:
    given = dataset_of_the_tests()
    given["subsets"]["most"]["where"] = "z_0 > 99"
    configured(again, {"datasets": {"mine": given}})
    done = snakemake("-s", SNAKEFILE, cwd=again)
    assert done.returncode == 1
    assert "none of 48 particles selected" in done.stdout + done.stderr
    assert not (again / "results/mine/most/ids.txt").exists()
    assert len(latent_ids(again, "all")) == 48
