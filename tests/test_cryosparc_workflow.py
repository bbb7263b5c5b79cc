"""From a job in cryoSPARC and back into it, through Snakemake, against the stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
import yaml
from cryosparc.dataset import Dataset
from cryosparc_instance import PROJECT, REFINEMENT, WORKSPACE, Instance, instance
from test_workflow import SNAKEFILE, TINY, commands

from cryodrgn_pipeline.cli import app
from cryodrgn_pipeline.io.cs import load_dataset
from cryodrgn_pipeline.io.mrc import read_volume
from cryodrgn_pipeline.io.runs import read_columns, read_latents

N = 2000
RUN = Path("results/mine/all/vae")
MODES = 2


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "set"
    words = f"simulate --particles {N} --box-size 16 --pixel-size 12 -o {folder}".split()
    subprocess.run([sys.executable, "-m", "cryodrgn_pipeline", *words], check=True, capture_output=True)
    return folder


def refinement(simulated: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The simulated particles as cryoSPARC has them, uids beyond 2^53, and their map and mask."""
    dataset = load_dataset(simulated / "particles.cs")
    columns = {name: np.array(dataset[name]) for name in dataset.fields()}
    drawn = np.random.default_rng(3).choice(2**62, size=N, replace=False).astype(np.uint64)
    columns["uid"] = drawn + np.uint64(2**63)
    density, _ = read_volume(simulated / "consensus.mrc")
    grid = np.arange(16) - 8
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(grid, grid, grid)))
    return columns, {"map": density, "mask": np.clip(8 - radius, 0, 1).astype(np.float32)}


def project_with(folder: Path, executable: object, **dataset: Any) -> Path:
    content = TINY | {
        "cryosparc": {"executable": str(executable)},
        "datasets": {
            "mine": {
                "cryosparc": {"project": PROJECT, "job": REFINEMENT},
                "push": {"workspace": WORKSPACE, "subsets": ["few"]},
                "subsets": {"few": {"ids": "few.txt"}},
                **dataset,
            }
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def snakemake(instance: Instance, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "-s", str(SNAKEFILE), *words],
        cwd=folder,
        env=instance.environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("major", ["5", pytest.param("4", marks=[pytest.mark.cryosparc4, pytest.mark.heavy])])
def test_a_jobs_particles_come_back_with_the_same_uids_and_the_same_z(
    major: str, simulated: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python = Path(sys.executable) if major == "5" else request.getfixturevalue("cryosparc4")
    columns, maps = refinement(simulated, tmp_path)
    folder = project_with(tmp_path, python.parent / "cryodrgn-pipeline")
    few = columns["uid"][:123]
    (folder / "few.txt").write_text("".join(f"{uid}\n" for uid in few), encoding="utf-8")
    with instance(tmp_path, columns, python, major, maps) as there:
        for name in set(columns["blob/path"].tolist()):
            place = there.project / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(simulated / name)
        done = snakemake(there, folder)
        assert done.returncode == 0, done.stdout + done.stderr
        receipt = json.loads((folder / RUN / "cryosparc/pushed.json").read_text(encoding="utf-8"))
        assert receipt["cryosparc_tools"].startswith(f"{major}.")
        check_content(there, receipt["external_job"], folder, columns, few)
        calls = len(there.state.calls)
        assert "Nothing to be done" in (again := snakemake(there, folder)).stdout + again.stderr
        assert len(there.state.calls) == calls
    consensus = json.loads((folder / "results/mine/consensus_16/consensus.json").read_text(encoding="utf-8"))
    verdicts = {test["name"]: test["verdict"] for test in consensus["convention_check"]["tests"]}
    assert verdicts["hand"] != "not_determinable"  # the job's own map was compared


def check_content(there: Instance, uid: str, folder: Path, columns: dict[str, Any], few: Any) -> None:
    state = there.state
    latents = read_latents(folder / RUN)
    assert set(latents.particle_id.tolist()) == set(columns["uid"].tolist())
    job = state.job(PROJECT, uid)
    assert job.status == "completed"
    assert job.parents == [REFINEMENT]
    rows = {name: read_back(there, uid, name) for name in job.spec.outputs.root if name.startswith("part")}
    check_rows(rows["particles"], latents, columns)
    clusters = read_columns(folder / RUN / "analysis/particles.parquet", "")["cluster"]
    sizes = {f"particles_cluster_{label}": int((clusters == label).sum()) for label in np.unique(clusters)}
    sizes |= {"particles": N, "particles_few": len(few)}
    assert {name: len(dataset) for name, dataset in rows.items()} == sizes
    assert set(rows["particles_few"]["uid"].tolist()) == set(few.tolist())
    for dataset in rows.values():
        check_rows(dataset, latents, columns)
    volumes = [name for name, output in job.spec.outputs.root.items() if output.type == "volume"]
    assert len(volumes) == 3
    for number, name in enumerate(sorted(volumes)):
        (path,) = read_back(there, uid, name)["map/path"]
        pushed, voxel_a = read_volume(there.project / path)
        made, made_voxel_a = read_volume(folder / RUN / f"volumes/centers/vol_{number:03d}.mrc")
        assert np.array_equal(pushed, made)
        assert voxel_a == made_voxel_a
    images = [event for event in state.events[PROJECT, uid] if event.type == "image"]
    assert {"training", "volumes"} <= {event.text for event in images}


def read_back(there: Instance, uid: str, name: str) -> Any:
    output = there.state.output(PROJECT, uid, name)
    return there.state.joined(PROJECT, output, "all")


def check_rows(dataset: Dataset, latents: Any, columns: dict[str, Any]) -> None:
    """By uid: z bit for bit, and the poses and images of the refinement."""
    mine = {identity: row for row, identity in enumerate(latents.particle_id.tolist())}
    row = np.array([mine[identity] for identity in dataset["uid"].tolist()])
    for mode in range(MODES):
        values = np.asarray(dataset[f"components_mode_{mode}/value"])
        assert values.dtype == np.float32
        assert values.tobytes() == np.ascontiguousarray(latents.z[row, mode]).tobytes()
        assert (dataset[f"components_mode_{mode}/component"] == mode).all()
    theirs = {identity: row for row, identity in enumerate(columns["uid"].tolist())}
    row = np.array([theirs[identity] for identity in dataset["uid"].tolist()])
    for name in ("alignments3D/pose", "blob/path", "blob/idx", "ctf/df1_A"):
        assert np.array_equal(np.asarray(dataset[name]), columns[name][row])


def test_every_setting_reaches_a_command_that_the_verbs_understand(tmp_path: Path) -> None:
    (tmp_path / "few.txt").touch()
    project_with(
        tmp_path,
        "cryodrgn-pipeline",
        cryosparc={
            "project": "P3",
            "job": "J1",
            "output": "particles_selected",
            "volume": "volume_class_0",
            "mask": None,
            "project_folder": "/mnt/project",
        },
        push={
            "workspace": "W2",
            "project": "P4",
            "job": "J5",
            "output": "particles",
            "clusters": False,
            "subsets": ["few"],
            "volumes": ["pc1"],
            "import_volumes": True,
        },
        runs={"vae": {"subsets": ["all", "few"]}},
    )
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    given: dict[str, list[dict[str, Any]]] = {}
    for verb, *words in commands("-s", SNAKEFILE, cwd=tmp_path):
        given.setdefault(verb, []).append(verbs[verb].make_context(verb, words).params)
    (read,) = given["read-cryosparc"]
    assert read == {
        "project": "P3",
        "job": "J1",
        "output_name": "particles_selected",
        "volume": "volume_class_0",
        "mask": None,
        "project_folder": Path("/mnt/project"),
        "output": Path("results/mine/cryosparc"),
    }
    (taken,) = given["import"]
    assert taken["particles"] == Path("results/mine/cryosparc/particles.cs")
    assert taken["datadir"] == Path("results/mine/cryosparc/project")
    (consensus,) = given["consensus"]
    assert consensus["reference"] == Path("results/mine/cryosparc/map.mrc")
    assert consensus["mask"] is None
    on_all, on_few = sorted(given["push"], key=lambda push: str(push["run"]))
    for push in (on_all, on_few):
        assert (push["project"], push["workspace"], push["job"]) == ("P4", "W2", "J5")
        assert push["clusters"] is False
        assert push["import_volumes"] is True
        assert push["volumes"] == [push["run"] / "volumes/pc1"]
        assert push["output"] == push["run"] / "cryosparc"
    assert on_all["subset"] == ["few=few.txt"]
    assert not on_few["subset"]


def test_a_series_that_no_run_makes_cannot_be_pushed(tmp_path: Path) -> None:
    (tmp_path / "few.txt").touch()
    project_with(tmp_path, "cryodrgn-pipeline", push={"workspace": "W1", "volumes": ["graph"]})
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "-s", str(SNAKEFILE)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "push.volumes: graph; run vae makes the series centers, pc1" in done.stdout + done.stderr


def test_nothing_of_cryosparc_is_in_the_workflow_unless_configured(tmp_path: Path) -> None:
    (tmp_path / "p.star").touch()
    config = TINY | {"datasets": {"mine": {"particles": "p.star"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    verbs = {line[0] for line in commands("-s", SNAKEFILE, cwd=tmp_path)}
    assert not verbs & {"read-cryosparc", "push"}
