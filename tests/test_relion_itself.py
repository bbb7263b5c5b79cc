"""RELION's own programs run the External job and read our files; skipped where they are not installed."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile

from cryodrgn_pipeline.exporting import export_particles
from cryodrgn_pipeline.importing import ImportOptions, import_particles

pytestmark = pytest.mark.skipif(
    shutil.which("relion_pipeliner") is None, reason="RELION is not installed (relion_pipeliner not on PATH)"
)
EXTERNAL = 99
FINISHED, ABORTED = 2, 4
PARAMETERS = {
    "preprocess.box_size_px": "16",
    "consensus.check": "off",
    "train.latent_dim": "2",
    "analyze.clusters": "2",
    "analyze.umap": "no",
    "subset.clusters": "1",
    "subset.without_junk": "",  # RELION leaves a bare label
}


def relion(*words: object, cwd: Path) -> str:
    done = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RELION project with an empty pipeline, particles in two optics groups, and the command of the job."""
    folder = tmp_path_factory.mktemp("relion") / "project"
    simulate = f"simulate -o {folder} --particles 96 --box-size 16 --pixel-size 12 --snr 0.5"
    relion(sys.executable, "-m", "cryodrgn_pipeline", *simulate.split(), cwd=folder.parent)
    (folder / "default_pipeline.star").write_text("\ndata_pipeline_general\n\n_rlnPipeLineJobCounter 1\n \n")
    (folder / "command.sh").write_text(
        "#!/bin/sh\nexport OMP_NUM_THREADS=1\n"
        f"exec {shlex.quote(sys.executable)} -m cryodrgn_pipeline.interop.relion_external "
        '"$@"\n'
    )
    (folder / "command.sh").chmod(0o755)
    return folder


def add_job(project: Path, parameters: dict[str, str]) -> None:
    options = {"fn_exe": "./command.sh", "in_part": "particles.star", "in_3dref": "consensus.mrc"}
    options |= dict.fromkeys(["in_mask", "in_mic", "in_mov", "in_coords", "other_args"], "")
    options |= {"nr_threads": "1", "do_queue": "No", "min_dedicated": "1"}
    for number, (label, value) in enumerate(parameters.items(), start=1):
        options |= {f"param{number}_label": label, f"param{number}_value": value}
    rows = "".join(f"{name} {value or chr(34) * 2}\n" for name, value in options.items())
    (project / "external.star").write_text(
        f"\ndata_job\n\n_rlnJobType {EXTERNAL}\n_rlnJobIsContinue 0\n\ndata_joboptions_values\n\nloop_\n"
        f"_rlnJobOptionVariable #1\n_rlnJobOptionValue #2\n{rows} \n"
    )
    relion("relion_pipeliner", "--addJobFromStar", "external.star", cwd=project)


def pipeline(project: Path) -> tuple[dict[str, int], dict[str, int], set[tuple[str, str]]]:
    """RELION's record: status by process, type by node, and which process made which node."""
    blocks = starfile.read(project / "default_pipeline.star", always_dict=True)
    processes, nodes = blocks["pipeline_processes"], blocks["pipeline_nodes"]
    status = dict(
        zip(processes["rlnPipeLineProcessName"], processes["rlnPipeLineProcessStatus"], strict=True)
    )
    types = dict(zip(nodes["rlnPipeLineNodeName"], nodes["rlnPipeLineNodeType"], strict=True))
    edges = blocks.get("pipeline_output_edges")
    made = (
        set()
        if edges is None
        else {*zip(edges["rlnPipeLineEdgeProcess"], edges["rlnPipeLineEdgeToNode"], strict=True)}
    )
    return status, types, made


def test_relion_runs_the_job_and_lists_its_particles_and_maps(project: Path) -> None:
    add_job(project, PARAMETERS)
    relion("relion_pipeliner", "--RunJobs", "External/job001/", "--schedule", "first", cwd=project)
    status, types, made = pipeline(project)
    job = project / "External" / "job001"
    assert status["External/job001/"] == FINISHED, (job / "run.err").read_text()
    assert (job / "run.err").read_text() == ""
    for k in range(2):
        for name, kind in (("", 6), ("_half1", 10), ("_half2", 10)):
            assert types[f"External/job001/cluster_{k:03d}{name}.mrc"] == kind
        assert types[f"External/job001/cluster_{k:03d}.star"] == 3
        assert ("External/job001/", f"External/job001/cluster_{k:03d}.star") in made
    subset = starfile.read(job / "subset.star")["particles"]
    cluster = starfile.read(job / "cluster_001.star")["particles"]
    assert set(subset["rlnImageName"]) <= set(cluster["rlnImageName"])


def test_relion_aborts_the_job(project: Path) -> None:
    network = {"train.encoder": "image", "train.decoder": "mlp", "train.epochs": "100000"}
    add_job(project, PARAMETERS | network)
    number = len(list((project / "External").glob("job*")))
    job = project / "External" / f"job{number:03d}"
    command = ["relion_pipeliner", "--RunJobs", f"External/{job.name}/", "--schedule", "second"]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as runs:
        while not (job / "logs").is_dir():  # RELION removes an older abort file before it starts the job
            with suppress(subprocess.TimeoutExpired):
                runs.wait(timeout=0.2)
        (job / "RELION_JOB_ABORT_NOW").touch()  # what Abort of the GUI does
        runs.wait()
    status, _, _ = pipeline(project)
    assert status[f"External/{job.name}/"] == ABORTED
    assert not (job / "RELION_JOB_ABORT_NOW").exists()
    assert not (job / "RELION_OUTPUT_NODES.star").exists()


def test_relion_reads_a_subset_to_the_same_rows(project: Path) -> None:
    import_particles(project / "particles.star", project / "import")
    ids = starfile.read(project / "particles.star")["particles"]["rlnImageName"]
    export_particles(project / "import", project / "part.star", np.array(ids[::3], dtype=object))
    relion("relion_star_handler", "--i", "part.star", "--o", "read.star", cwd=project)
    ours, theirs = (starfile.read(project / name) for name in ("part.star", "read.star"))
    assert ours["particles"]["rlnImageName"].tolist() == theirs["particles"]["rlnImageName"].tolist()
    assert ours["optics"]["rlnOpticsGroup"].tolist() == theirs["optics"]["rlnOpticsGroup"].tolist()
    for name in ("rlnDefocusU", "rlnAngleRot", "rlnOriginXAngst"):
        np.testing.assert_allclose(ours["particles"][name], theirs["particles"][name], atol=1e-5)


def test_relion_reconstructs_the_same_map_from_a_cs_file_as_from_the_star_file(project: Path) -> None:
    options = ImportOptions(metadata_only=True, passthrough=(project / "particles_passthrough.cs",))
    import_particles(project / "particles.cs", project / "import_cs", options)
    export_particles(project / "import_cs", project / "from_cs.star")
    table = starfile.read(project / "from_cs.star")
    wrong = table["particles"].assign(rlnOriginXAngst=-table["particles"]["rlnOriginXAngst"])
    starfile.write({"optics": table["optics"], "particles": wrong}, project / "wrong.star")
    maps = {}
    for name in ("particles", "from_cs", "wrong"):
        relion("relion_reconstruct", "--i", f"{name}.star", "--o", f"{name}.mrc", "--ctf", cwd=project)
        maps[name] = mrcfile.read(project / f"{name}.mrc").ravel()
    assert np.corrcoef(maps["particles"], maps["from_cs"])[0, 1] > 0.98
    assert np.corrcoef(maps["particles"], maps["wrong"])[0, 1] < 0.9
