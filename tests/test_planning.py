"""What jobs ask for: the size of a source from its header, the formulas, and that the rules follow them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryosparc.dataset import CSDAT_FORMAT, NUMPY_FORMAT, Dataset
from particle_files import cs_columns, particle_columns, write_relion, write_stack
from test_workflow import SNAKEFILE, configured

from cryodrgn_pipeline.config.models import Config
from cryodrgn_pipeline.importing import ImportOptions, import_particles
from cryodrgn_pipeline.planning import sources, table
from cryodrgn_pipeline.planning.jobs import RULES, Plan
from cryodrgn_pipeline.planning.sources import ASSUMED_BOX_PX, ASSUMED_PARTICLES, SourceSize
from cryodrgn_pipeline.planning.table import plan_workflow

DRY_RUN = """
import json, sys
from snakemake.logging import logger

def say(record):
    if hasattr(record, "resources"):
        asked = {key: record.resources.get(key) for key in ("mem_mb", "runtime", "disk_mb", "gpu")}
        print("JOB", json.dumps([record.rule_name, dict(record.wildcards or {}), asked]))
    return True

logger.addFilter(say)
from snakemake.cli import main
main(["--dry-run", "--cores", "99", *sys.argv[1:]])
"""
RICH: dict[str, Any] = {
    "mine": {
        "particles": "p.star",
        "export": ["star", "cs"],
        "subsets": {
            "few": {"ids": "few.txt"},
            "open": {"from_run": "vae", "clusters": [0]},
            "unused": {"ids": "few.txt"},
        },
        "runs": {
            "vae": {},
            "fine": {
                "subsets": ["few", "open"],
                "box_size_px": 32,
                "train": {"latent_dim": 1},
                "volumes": {"direct_path": True, "source": "particles"},
            },
        },
    },
    "live": {
        "cryosparc": {"project": "P3", "job": "J42"},
        "push": {"workspace": "W1", "subsets": ["closed"]},
        "preprocess": {"box_size_px": 64},
        "subsets": {"closed": {"from_run": "vae", "clusters": [1]}},
    },
}


def size_of(folder: Path, **dataset: Any) -> SourceSize:
    config = Config.model_validate({"datasets": {"mine": dataset}})
    return Plan(config, folder / "results", folder).source("mine")


def plan_of(n: int = 10_000, box: int = 128, **sections: Any) -> Plan:
    """The plan of one dataset whose size is told by a .cs-like stand-in."""
    config = Config.model_validate({"datasets": {"mine": {"particles": "p.star"}}} | sections)
    plan = Plan(config, Path("results"))
    size = SourceSize(particles=n, box_size_px=box, origin="p.star")
    plan.source = lambda _: size  # type: ignore[method-assign]
    return plan


def jobs_of_a_dry_run(folder: Path) -> list[tuple[str, dict[str, str], dict[str, int]]]:
    words = [sys.executable, "-c", DRY_RUN, "-s", str(SNAKEFILE)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert "This was a dry-run" in done.stdout + done.stderr, done.stdout + done.stderr
    found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("JOB ")]
    return [(rule, wildcards, asked) for rule, wildcards, asked in found if rule != "all"]


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """A configuration with everything that a workflow may hold, its sources there."""
    write_relion(tmp_path / "p.star", particle_columns(600))
    (tmp_path / "few.txt").write_text("".join(f"{i}\n" for i in range(40)), encoding="utf-8")
    content: dict[str, Any] = {
        "datasets": RICH,
        "analyze": {"clusters": 3},
        "preprocess": {"box_size_px": 16},
    }
    configured(tmp_path, content | {"resources": {"report": {"mem_mb": 1234}}, "train": {}})
    return tmp_path


# ── Sources ──


def test_a_star_file_tells_particles_and_box_from_its_beginning(tmp_path: Path) -> None:
    write_relion(tmp_path / "p.star", particle_columns(37))
    assert size_of(tmp_path, particles="p.star") == SourceSize(
        particles=37, box_size_px=16, origin=str(tmp_path / "p.star")
    )


def test_rows_of_a_large_star_file_are_estimated_from_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_relion(tmp_path / "p.star", particle_columns(20_000))
    monkeypatch.setattr(sources, "SAMPLE_BYTES", 4096)
    found = {}
    for most in (10**9, 0):
        monkeypatch.setattr(sources, "READ_WHOLE_BYTES", most)
        sources._read.cache_clear()
        found[most] = size_of(tmp_path, particles="p.star")
    assert (found[10**9].particles, found[10**9].sampled) == (20_000, False)
    assert found[0].particles != 20_000
    assert found[0].particles == pytest.approx(20_000, rel=0.02)
    assert found[0].sampled
    configured(tmp_path, {"datasets": {"mine": {"particles": "p.star"}}})
    planned = plan_workflow(tmp_path / "config.yaml", tmp_path)
    assert next(planned.lines()).startswith(f"mine: about {found[0].particles:,} particles of 16 px")


def test_without_an_optics_table_the_box_is_that_of_the_image_file(tmp_path: Path) -> None:
    write_stack(tmp_path / "images" / "stack.mrcs", box=24)
    (tmp_path / "jobs").mkdir()
    write_relion(tmp_path / "jobs" / "run_data.star", particle_columns(5), optics=None)
    assert size_of(tmp_path, particles="jobs/run_data.star", datadir="images").box_size_px == 24
    assert "images of" in size_of(tmp_path, particles="jobs/run_data.star").assumed


@pytest.mark.parametrize("encoding", [CSDAT_FORMAT, NUMPY_FORMAT])
def test_a_cs_file_tells_particles_and_box_in_both_encodings(tmp_path: Path, encoding: int) -> None:
    columns = cs_columns(50) | {"blob/shape": np.full((50, 2), 96, dtype=np.uint32)}
    Dataset(list(columns.items())).save(tmp_path / "p.cs", format=encoding)
    found = size_of(tmp_path, particles="p.cs")
    assert (found.particles, found.box_size_px, found.assumed) == (50, 96, "")


def test_the_box_may_stand_in_a_passthrough_file(tmp_path: Path) -> None:
    columns = cs_columns(50)
    Dataset([(name, columns[name]) for name in ("uid", "alignments3D/pose")]).save(tmp_path / "p.cs")
    beside = {"uid": columns["uid"], "blob/shape": np.full((50, 2), 96, dtype=np.uint32)}
    Dataset(list(beside.items())).save(tmp_path / "q.cs")
    found = size_of(tmp_path, particles="p.cs", passthrough=["q.cs"])
    assert (found.particles, found.box_size_px, found.assumed) == (50, 96, "")


@pytest.mark.parametrize(
    "name", ["absent.star", "empty.star", "empty.cs", "folder.star", "cut.cs", "noise.cs", "p.txt"]
)
def test_a_source_that_tells_nothing_is_no_error_and_is_said(tmp_path: Path, name: str) -> None:
    for empty in ("empty.star", "empty.cs"):
        (tmp_path / empty).touch()
    (tmp_path / "folder.star").mkdir()
    (tmp_path / "noise.cs").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "p.txt").write_text("data_\n", encoding="utf-8")
    Dataset(list(cs_columns(2000).items())).save(tmp_path / "whole.cs", format=CSDAT_FORMAT)
    (tmp_path / "cut.cs").write_bytes((tmp_path / "whole.cs").read_bytes()[:3000])
    found = size_of(tmp_path, particles=name)
    assert (found.particles, found.box_size_px) == (ASSUMED_PARTICLES, ASSUMED_BOX_PX)
    assert name in found.assumed


def test_what_is_not_there_any_more_is_known_from_its_import(tmp_path: Path) -> None:
    write_stack(tmp_path / "stack.mrcs", n=8, box=16)
    write_relion(tmp_path / "p.star", particle_columns(8))
    import_particles(tmp_path / "p.star", tmp_path / "results" / "mine" / "import", ImportOptions())
    (tmp_path / "p.star").unlink()
    found = size_of(tmp_path, particles="p.star")
    assert (found.particles, found.box_size_px, found.assumed) == (8, 16, "")


def test_a_job_of_cryosparc_is_known_once_it_was_read(tmp_path: Path) -> None:
    job = {"project": "P3", "job": "J42"}
    assert "particles.cs" in size_of(tmp_path, cryosparc=job).assumed
    folder = tmp_path / "results" / "mine" / "cryosparc"
    folder.mkdir(parents=True)
    Dataset(list(cs_columns(50).items())).save(folder / "particles.cs")
    assert size_of(tmp_path, cryosparc=job).particles == 50


def test_a_changed_source_is_read_again(tmp_path: Path) -> None:
    path = write_relion(tmp_path / "p.star", particle_columns(5))
    assert size_of(tmp_path, particles="p.star").particles == 5
    write_relion(path, particle_columns(9))
    assert size_of(tmp_path, particles="p.star").particles == 9


# ── Jobs ──


def test_the_rules_ask_for_what_the_plan_says_job_by_job(rich: Path) -> None:
    config = Config.model_validate(_loaded(rich / "config.yaml"))
    plan = {_key(job.rule, job.wildcards): job for job in Plan(config, Path("results"), rich).jobs()}
    asked = {_key(rule, wildcards): given for rule, wildcards, given in jobs_of_a_dry_run(rich)}
    assert asked.keys() == plan.keys()
    assert {rule for rule, _ in asked} == set(RULES.values())
    for key, given in asked.items():
        job = plan[key]
        expected = {"mem_mb": job.mem_mb, "runtime": job.runtime_min, "disk_mb": job.disk_mb}
        assert given == expected | {"gpu": job.gpus}, key
    assert asked["write_report", "dataset=live run=vae subset=all"]["mem_mb"] == 1234


def _loaded(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _key(rule: str, wildcards: dict[str, str]) -> tuple[str, str]:
    return rule, " ".join(f"{name}={wildcards[name]}" for name in sorted(wildcards))


STANDARD = {"dataset": "mine", "subset": "all", "run": "vae", "box": "128", "series": "centers"}
TASKS = ["import", "preprocess", "consensus", "train", "analyze", "volumes", "report"]


@pytest.mark.parametrize("task", TASKS)
def test_more_particles_need_more(task: str) -> None:
    needed = [plan_of(n).needs(task, **STANDARD) for n in (100, 10_000, 1_000_000)]
    assert needed[0].memory_bytes < needed[1].memory_bytes < needed[2].memory_bytes
    if task != "volumes":  # a decoder does not ask the particles
        assert needed[0].seconds < needed[1].seconds < needed[2].seconds


@pytest.mark.parametrize("task", ["preprocess", "consensus", "train", "volumes"])
def test_a_larger_box_needs_more(task: str) -> None:
    small, large = (
        plan_of(100_000, 256, preprocess={"box_size_px": box}).needs(task, **STANDARD | {"box": str(box)})
        for box in (32, 128)
    )
    assert small.memory_bytes < large.memory_bytes
    assert small.seconds < large.seconds
    assert small.disk_bytes < large.disk_bytes


@pytest.mark.parametrize("task", TASKS)
def test_a_job_asks_for_more_than_is_expected_and_not_for_much_more(task: str) -> None:
    plan = plan_of(1_000_000, 256)
    job, needed = plan.job(task, STANDARD), plan.needs(task, **STANDARD)
    assert 1.25 * needed.memory_bytes < 1e6 * job.mem_mb < 1.25 * needed.memory_bytes + 0.7e9
    assert needed.disk_bytes < 1e6 * job.disk_mb < 1.2 * needed.disk_bytes + 20e6
    assert 3 * needed.seconds / 60 <= job.runtime_min <= 3 * needed.seconds / 60 + 15


def test_numbers_of_the_configuration_count_and_double_with_each_attempt() -> None:
    plan = plan_of(resources={"train": {"mem_mb": 5000, "runtime_min": 100, "disk_mb": 7, "gpus": 2}})
    first, third = (plan.job("train", {"dataset": "mine", "subset": "all", "run": "vae"}, n) for n in (1, 3))
    assert (first.mem_mb, first.runtime_min, first.disk_mb, first.gpus) == (5000, 100, 7, 2)
    assert (third.mem_mb, third.runtime_min, third.disk_mb, third.gpus) == (20_000, 400, 7, 2)


def test_what_is_computed_doubles_with_each_attempt_as_well() -> None:
    first, second = (plan_of().job("import", {"dataset": "mine"}, attempt) for attempt in (1, 2))
    assert (second.mem_mb, second.runtime_min) == (2 * first.mem_mb, 2 * first.runtime_min)
    assert second.disk_mb == first.disk_mb


def test_a_subset_is_planned_by_its_own_size(rich: Path) -> None:
    plan = Plan(Config.model_validate(_loaded(rich / "config.yaml")), rich / "results", rich)
    assert [plan.particles("mine", name) for name in ("all", "few", "open")] == [600, 40, 600]
    chosen = rich / "results" / "mine" / "open" / "ids.txt"
    chosen.parent.mkdir(parents=True)
    chosen.write_text("a\nb\n\n", encoding="utf-8")
    assert plan.particles("mine", "open") == 2


def test_settings_of_a_run_are_planned_over_those_of_all() -> None:
    runs = {"vae": {}, "net": {"train": {"encoder": "image", "decoder": "mlp", "epochs": 50}}}
    plan = plan_of(datasets={"mine": {"particles": "p.star", "runs": runs}})
    seconds = {run: plan.needs("train", **STANDARD | {"run": run}).seconds for run in runs}
    assert seconds["net"] > 2 * seconds["vae"]


def test_a_training_on_several_gpus_holds_more_and_takes_less_time() -> None:
    network = {"encoder": "image", "decoder": "mlp", "in_memory": False}
    one, four, eight = (
        plan_of(100_000, train=network, resources={"train": {"gpus": gpus, "nodes": nodes}}).needs(
            "train", **STANDARD
        )
        for gpus, nodes in ((1, 1), (4, 1), (4, 2))
    )
    assert four.memory_bytes == eight.memory_bytes == pytest.approx(4 * one.memory_bytes)
    assert one.seconds > 3 * four.seconds
    assert four.seconds > eight.seconds


def test_every_process_of_a_subspace_holds_its_sums_and_shares_the_passes() -> None:
    none, one, four = (
        plan_of(resources={"train": {"gpus": gpus}}).needs("train", **STANDARD) for gpus in (0, 1, 4)
    )
    assert none.seconds > one.seconds > four.seconds
    assert four.memory_bytes == pytest.approx(4 * one.memory_bytes)


@pytest.mark.parametrize(
    ("train", "peak_gb"),
    [({}, 8.5), ({"method": "subspace", "latent_dim": 5}, 9.2)],
    ids=["default", "linear"],
)
def test_what_256_px_took_is_asked_for_and_not_much_more(train: dict[str, Any], peak_gb: float) -> None:
    plan = plan_of(300, 256, preprocess={"box_size_px": 256}, train=train)
    assert peak_gb < plan.job("train", STANDARD).mem_mb / 1e3 < 1.5 * peak_gb


def test_planning_needs_no_library_of_arrays() -> None:
    code = "import sys, cryodrgn_pipeline.planning.jobs; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "pandas", "pyarrow"} & set(done.stdout.split())


# ── The verb ──


def said(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cryodrgn_pipeline", "plan", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_verb_prints_a_line_per_job_and_the_totals(rich: Path) -> None:
    done = said("--directory", rich, "--configfile", rich / "config.yaml", cwd=rich.parent)
    assert done.returncode == 0, done.stderr
    jobs = Plan(Config.model_validate(_loaded(rich / "config.yaml")), rich / "results", rich).jobs()
    rows = [line for line in done.stdout.splitlines() if line.startswith(tuple(RULES.values()))]
    assert [line.split()[0] for line in rows] == [job.rule for job in jobs]
    assert "mine: 600 particles of 16 px" in done.stdout
    assert "assumed: results/live/cryosparc/particles.cs does not tell yet" in done.stdout.replace(
        f"{rich}/", ""
    )
    assert f"of results in {rich}/results" in done.stdout
    assert not (rich / "results").exists()


def test_the_verb_says_as_json_what_the_jobs_add_up_to(rich: Path) -> None:
    folder = rich / "results" / "mine" / "all"
    folder.mkdir(parents=True)
    (folder / "there.bin").write_bytes(bytes(3_000_000))
    planned = json.loads(said("--json", cwd=rich).stdout)
    jobs, totals = planned["jobs"], planned["totals"]
    assert totals["disk_mb"] == sum(job["disk_mb"] for job in jobs)
    assert totals["there_mb"] == 3
    assert totals["enough_disk"] is True
    gpu_minutes = sum(job["gpus"] * job["runtime_min"] for job in jobs)
    assert totals["gpu_hours_at_most"] == pytest.approx(gpu_minutes / 60)
    assert 0 < totals["cpu_hours"] < totals["cpu_hours_at_most"]
    longest = max(jobs, key=lambda job: job["expected"]["runtime_min"])
    assert totals["longest"] == longest
    assert planned["datasets"]["mine"] == {
        "particles": 600,
        "box_size_px": 16,
        "origin": "p.star",
        "assumed": "",
        "sampled": False,
    }


def test_a_disk_that_is_too_small_is_said(rich: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan_workflow(rich / "config.yaml", rich)
    assert not any("TOO LITTLE" in line for line in planned.lines())
    monkeypatch.setattr(table, "_free_bytes", lambda _: planned.totals.disk_mb * 10**6 - 10**6)
    short = plan_workflow(rich / "config.yaml", rich)
    assert any("TOO LITTLE" in line for line in short.lines())
    assert short.as_json()["totals"]["enough_disk"] is False


def test_a_configuration_with_mistakes_or_without_datasets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("datasets: {}\n", encoding="utf-8")
    assert said(cwd=tmp_path).returncode == 2
    (tmp_path / "config.yaml").write_text("trian: {}\n", encoding="utf-8")
    done = said(cwd=tmp_path)
    assert done.returncode == 2
    assert "trian" in done.stderr
