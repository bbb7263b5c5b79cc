"""RELION's External job, as RELION starts it: in the project folder, with its command line, told by files."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mrcfile
import numpy as np
import psutil
import pytest
import starfile

from cryodrgn_pipeline.config.check import load_config
from cryodrgn_pipeline.config.models import Config, Dataset, Subset
from cryodrgn_pipeline.errors import ConfigError
from cryodrgn_pipeline.interop.relion_external import external_job, split_options
from cryodrgn_pipeline.interop.relion_parameters import LISTS, OF_DATASET, OF_SUBSET, configuration

MODULE = [sys.executable, "-m", "cryodrgn_pipeline.interop.relion_external"]
EXIT_FILES = {f"RELION_JOB_EXIT_{word}" for word in ("SUCCESS", "FAILURE", "ABORTED")}
SMALL = "--preprocess.box_size_px 16 --consensus.check off --train.latent_dim 2"
SMALL += " --analyze.clusters 3 --analyze.umap no"
NETWORK = (  # the model whose training can be cut short
    f"{SMALL} --train.encoder image --train.decoder mlp --train.encoder_layers 1 --train.decoder_layers 1 "
    "--train.encoder_width 16 --train.decoder_width 16 --volumes.source decoder"
)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RELION project with a refined particle file, its map, and a mask in the box of the images."""
    folder = tmp_path_factory.mktemp("relion") / "project"
    simulate = (
        f"simulate -o {folder} --particles 96 --box-size 20 --pixel-size 10 --snr 0.5 --optics-groups 3"
    )
    subprocess.run([sys.executable, "-m", "cryodrgn_pipeline", *simulate.split()], check=True)
    z, y, x = np.indices((20, 20, 20)) - 10
    with mrcfile.new(folder / "mask.mrc") as mrc:
        mrc.set_data(np.clip(9 - np.sqrt(x**2 + y**2 + z**2), 0, 1).astype(np.float32))
        mrc.voxel_size = 10
    return folder


def relion_calls(words: str, project: Path) -> subprocess.Popen[str]:
    """Start the job as RELION does; its output can be read line by line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*MODULE, *shlex.split(words)],
        cwd=project,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finished(words: str, project: Path) -> tuple[int, str, str]:
    process = relion_calls(words, project)
    out, err = process.communicate()
    return process.returncode, out, err


def exit_files(job: Path) -> set[str]:
    return {path.name for path in job.glob("RELION_JOB_*")}


def read_until(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if wanted in line:
            return
    pytest.fail("".join(seen) + (process.stderr.read() if process.stderr else ""))


# ── What RELION gets back ──


@pytest.fixture(scope="session")
def done(project: Path) -> Path:
    """The folder of a job that ran to its end, with a bare label, a mask and one more choice of particles."""
    words = (
        f"--o External/job007/ --in_parts particles.star --in_3dref consensus.mrc --in_mask mask.mrc {SMALL} "
        "--subset.clusters 0,2 --subset.where 'z_0 > -99 and loss < 1e9' --subset.without_junk "
        "--j 2 --pipeline_control External/job007/"
    )
    job = project / "External" / "job007"
    job.mkdir(parents=True)
    (job / "RELION_JOB_EXIT_FAILURE").touch()  # of an earlier attempt
    code, out, err = finished(words, project)
    assert (code, err) == (0, ""), out + err
    return job


def test_a_finished_job_leaves_one_empty_exit_file_and_its_nodes(done: Path, project: Path) -> None:
    assert exit_files(done) == {"RELION_JOB_EXIT_SUCCESS"}
    assert (done / "RELION_JOB_EXIT_SUCCESS").stat().st_size == 0
    nodes = starfile.read(done / "RELION_OUTPUT_NODES.star", always_dict=True)["output_nodes"]
    labels = dict(zip(nodes["rlnPipeLineNodeName"], nodes["rlnPipeLineNodeTypeLabel"], strict=True))
    clusters = [f"External/job007/cluster_{k:03d}" for k in range(3)]
    expected = {f"{name}.star": "ParticleGroupMetadata.star.relion" for name in clusters}
    expected |= {f"{name}.mrc": "DensityMap.mrc" for name in clusters}
    expected |= {f"{name}_half{h}.mrc": "DensityMap.mrc.halfmap" for name in clusters for h in (1, 2)}
    assert expected.items() <= labels.items()
    assert "External/job007/subset.star" in labels
    assert all((project / name).is_file() for name in labels)
    numbers = {"ParticleGroupMetadata.star.relion": 3, "DensityMap.mrc": 6, "DensityMap.mrc.halfmap": 10}
    assert [numbers[label] for label in nodes["rlnPipeLineNodeTypeLabel"]] == (
        nodes["rlnPipeLineNodeType"].tolist()
    )


def test_the_clusters_hold_every_particle_once_as_refined(done: Path, project: Path) -> None:
    whole = starfile.read(project / "particles.star")
    parts = [starfile.read(done / f"cluster_{k:03d}.star") for k in range(3)]
    names = [name for part in parts for name in part["particles"]["rlnImageName"]]
    assert sorted(names) == sorted(whole["particles"]["rlnImageName"])
    for part in parts:
        same = whole["particles"]["rlnImageName"].isin(part["particles"]["rlnImageName"])
        expected = whole["particles"][same].reset_index(drop=True)
        assert part["particles"].equals(expected)
        groups = whole["optics"]["rlnOpticsGroup"].isin(expected["rlnOpticsGroup"])
        assert part["optics"].equals(whole["optics"][groups].reset_index(drop=True))


def test_the_chosen_subset_is_what_its_conditions_say(done: Path) -> None:
    names = [set(starfile.read(done / f"cluster_{k:03d}.star")["particles"]["rlnImageName"]) for k in (0, 2)]
    chosen = set(starfile.read(done / "subset.star")["particles"]["rlnImageName"])
    import pandas as pd

    analysis = pd.read_parquet(
        done / "results" / "particles" / "all" / "vae" / "analysis" / "particles.parquet"
    )
    junk = set(analysis.loc[analysis["junk"], "particle_id"])
    assert chosen == (names[0] | names[1]) - junk


def test_maps_carry_the_voxel_size_of_the_stack_and_halves_differ(done: Path) -> None:
    maps = []
    for suffix in ("", "_half1", "_half2"):
        with mrcfile.open(done / f"cluster_001{suffix}.mrc") as mrc:
            assert float(mrc.voxel_size.x) == pytest.approx(10 * 20 / 16)
            maps.append(mrc.data.copy())
    assert maps[0].shape == (16, 16, 16)
    assert not np.array_equal(maps[1], maps[2])


def test_the_same_call_again_trains_nothing_and_keeps_the_answer(done: Path, project: Path) -> None:
    run = done / "results" / "particles" / "all" / "vae"
    before = (run / "model.safetensors").stat().st_mtime_ns
    inputs = "--in_parts particles.star --in_3dref consensus.mrc --in_mask mask.mrc"
    assert finished(f"--o External/job007/ {inputs} {SMALL} --j 2", project)[0] == 0
    assert (run / "model.safetensors").stat().st_mtime_ns == before
    assert exit_files(done) == {"RELION_JOB_EXIT_SUCCESS"}
    assert not (done / "subset.star").exists()  # no longer asked for
    nodes = starfile.read(done / "RELION_OUTPUT_NODES.star")
    assert "External/job007/subset.star" not in set(nodes["rlnPipeLineNodeName"])


# ── How it ends otherwise ──


def long_job(number: int, epochs: int) -> str:
    return (
        f"--o External/job{number:03d}/ --in_parts particles.star {NETWORK} --train.epochs {epochs} "
        "--train.batch_size 8 --j 1"
    )


@pytest.fixture
def ended(request: pytest.FixtureRequest) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of a test; those that still run at its end are killed with all below them."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
            process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["SIGTERM", "abort"])
def test_a_job_that_is_stopped_saves_says_so_and_goes_on(
    project: Path, how: str, ended: list[subprocess.Popen[str]]
) -> None:
    number = {"SIGTERM": 11, "abort": 12}[how]
    job, words = project / "External" / f"job{number:03d}", long_job(number, epochs=300)
    process = relion_calls(words, project)
    ended.append(process)
    read_until(process, "of 300: reconstruction")
    assert exit_files(job) == set()
    if how == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        (job / "RELION_JOB_ABORT_NOW").touch()
    _, err = process.communicate()
    assert process.returncode == 1
    assert exit_files(job) == {f"RELION_JOB_EXIT_{'FAILURE' if how == 'SIGTERM' else 'ABORTED'}"}
    assert not (job / "RELION_OUTPUT_NODES.star").exists()
    assert "Continue goes on" in err
    run = job / "results" / "particles" / "all" / "vae"
    assert list((run / "checkpoints").glob("*.pt"))
    assert not (run / "latent.parquet").exists()
    if how == "SIGTERM":
        return
    code, out, err = finished(words, project)
    assert code == 0, out + err
    assert exit_files(job) == {"RELION_JOB_EXIT_SUCCESS"}
    log = (job / "logs" / "particles" / "all" / "vae" / "train.log").read_text(encoding="utf-8")
    assert "epoch 1 of 300" not in log
    assert "epoch 300 of 300" in log
    assert (job / "RELION_OUTPUT_NODES.star").is_file()


def test_a_second_call_leaves_a_running_job_alone_even_when_its_head_was_killed(
    project: Path, ended: list[subprocess.Popen[str]]
) -> None:
    job, words = project / "External" / "job013", long_job(13, epochs=100_000)
    process = relion_calls(words, project)
    ended.append(process)
    read_until(process, "of 100000: reconstruction")
    tree = psutil.Process(process.pid).children(recursive=True)
    for _ in range(2):
        code, _, err = finished(words, project)
        assert code == 1
        assert "is running already" in err
        assert exit_files(job) == set()
        process.kill()
        process.wait()
    for each in tree:
        each.kill()
    psutil.wait_procs(tree, timeout=60)
    assert exit_files(job) == set()  # a kill −9 can say nothing
    (job / "RELION_JOB_ABORT_NOW").touch()
    code, _, _ = finished(words, project)
    assert (code, exit_files(job)) == (1, {"RELION_JOB_EXIT_ABORTED"})


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--in_parts particles.star --box_size_px 16", "write preprocess.box_size_px"),
        ("--in_parts particles.star --nonsense 16", "no such parameter"),
        ("--in_parts particles.star --train.epoch 16", "did you mean epochs?"),
        ("--in_parts particles.star --train.epochs", "expected a whole number, found True"),
        ("--in_parts particles.star --subset.invert", "from_run needs a choice"),
        ("--in_parts particles.star --j 0", "a number of threads expected"),
        ("--in_parts particles.star --j 1 --j 2", "--j is given twice"),
        ("--in_parts my particles.star", "no blanks in file names"),
        ("--in_parts nowhere.star", "nowhere.star"),
        ("--in_mics mics.star", "reads particles only"),
        ("", "choose Input particles"),
    ],
)
def test_a_job_that_cannot_start_fails_with_a_reason(project: Path, words: str, reason: str) -> None:
    job = project / "External" / "job020"
    code, out, err = finished(f"--o External/job020/ {words}", project)
    assert code != 0
    assert reason in err
    assert "Traceback" not in out + err
    assert exit_files(job) == {"RELION_JOB_EXIT_FAILURE"}
    assert not (job / "RELION_OUTPUT_NODES.star").exists()
    shutil.rmtree(job)


def test_a_failed_step_is_named_in_run_err(project: Path) -> None:
    job = project / "External" / "job021"
    (project / "lost.star").write_text((project / "particles.star").read_text().replace("stacks/", "gone/"))
    code, _, err = finished(f"--o External/job021/ --in_parts lost.star {SMALL} --j 1", project)
    assert code == 1
    assert "particles/import:" in err
    assert "gone/stack_000.mrcs" in err
    assert exit_files(job) == {"RELION_JOB_EXIT_FAILURE"}


def test_a_real_refinement_comes_back_row_by_row(shared_data: Path, tmp_path: Path) -> None:
    for name in ("relion31.star", "relion31.mrcs"):
        shutil.copy(shared_data / name, tmp_path)
    words = SMALL.replace("clusters 3", "clusters 2") + " --volumes.source decoder --j 1"
    code, out, err = finished(f"--o External/job001/ --in_parts relion31.star {words}", tmp_path)
    assert code == 0, out + err
    job = tmp_path / "External" / "job001"
    assert exit_files(job) == {"RELION_JOB_EXIT_SUCCESS"}
    rows = [line for line in (tmp_path / "relion31.star").read_text().splitlines() if "@" in line]
    parts = [path.read_text().splitlines() for path in sorted(job.glob("cluster_???.star"))]
    assert sorted(line for part in parts for line in part if "@" in line) == sorted(rows)


def test_a_contradicted_convention_fails_the_job_with_its_remedy(project: Path) -> None:
    table = starfile.read(project / "particles.star")
    for name in ("rlnOriginXAngst", "rlnOriginYAngst"):
        table["particles"][name] *= -1
    starfile.write(table, project / "negated.star")
    words = SMALL.replace("--consensus.check off", "--consensus.check stop")
    code, _, err = finished(f"--o External/job024/ --in_parts negated.star {words} --j 1", project)
    assert code == 1
    assert "negate_shifts" in err
    assert exit_files(project / "External" / "job024") == {"RELION_JOB_EXIT_FAILURE"}


def test_without_a_folder_nothing_is_written(project: Path) -> None:
    before = set(project.iterdir())
    code, _, err = finished("--in_parts particles.star", project)
    assert code == 2
    assert "--o External/jobNNN/ is missing" in err
    assert set(project.iterdir()) == before


def test_exit_files_go_where_relion_looks_for_them(project: Path) -> None:
    code, _, _ = finished("--o External/job022/ --pipeline_control External/job023/", project)
    assert code == 2
    assert exit_files(project / "External" / "job022") == set()
    assert exit_files(project / "External" / "job023") == {"RELION_JOB_EXIT_FAILURE"}


# ── Parameters ──


def test_labels_are_keys_of_the_configuration(tmp_path: Path) -> None:
    words = (
        "--o J/ --in_parts Refine3D/job1/run_data.star --class 2 --set.voltage_kv 300 "
        "--conventions.negate_shifts --resources.train.threads 3 --volumes.source decoder "
        "--analyze.through 1,4 --train.learning_rate 1.0e-4 "
        "--consensus.check off --subset.clusters 5 --subset.ranges z_0:-1:2,loss::1 --subset.where z_0 == -1"
    )
    job = external_job(split_options(words.split()), Path("J"), Path("J"))
    text = configuration(job.output, job.particles, None, None, job.parameters)
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(tmp_path / "config.yaml")
    dataset = config.datasets["particles"]
    assert dataset.particles == "../Refine3D/job1/run_data.star"
    assert (dataset.datadir, dataset.class_, dataset.set_) == ("..", 2, {"voltage_kv": 300})
    assert dataset.conventions.negate_shifts
    assert config.resources.train.threads == 3
    assert (config.volumes.source, config.volumes.principal_components) == ("decoder", 0)
    assert (config.analyze.through, config.train.learning_rate, config.consensus.check) == (
        [1, 4],
        1e-4,
        False,
    )
    chosen = dataset.subsets["subset"]
    assert (chosen.clusters, chosen.ranges, chosen.where) == ([5], ["z_0:-1:2", "loss::1"], "z_0 == -1")


def test_labels_that_lists_are_written_for_are_the_lists_of_the_configuration() -> None:
    found = [
        f"subset.{name}" for name, field in Subset.model_fields.items() if isinstance(field.default, list)
    ]
    for section, field in Config.model_fields.items():
        for name, inner in getattr(type(field.default), "model_fields", {}).items():
            found += [f"{section}.{name}"] if isinstance(inner.default, list) else []
    assert sorted(found) == sorted(LISTS)
    assert set(OF_SUBSET) <= set(Subset.model_fields)
    assert set(OF_DATASET) <= {field.alias or name for name, field in Dataset.model_fields.items()}


def test_a_section_is_no_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a value of its own as well"):
        configuration(tmp_path, Path("p.star"), None, None, {"set": ["1"], "set.voltage_kv": ["300"]})
