"""`read-cryosparc`: a job's particles as plain files, or one clear refusal and no files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryosparc_instance import PROJECT, REFINEMENT, Instance, instance
from particle_files import cs_columns, write_stack
from standin.state import Fault

from cryodrgn_pipeline.importing import ImportOptions, import_particles
from cryodrgn_pipeline.io.cs import load_dataset
from cryodrgn_pipeline.io.mrc import read_volume
from cryodrgn_pipeline.io.runs import read_json

N = 12
READ = ("read-cryosparc", "--project", PROJECT, "--job", REFINEMENT)


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Instance]:
    columns = cs_columns(N)
    with instance(tmp_path, columns, Path(sys.executable), "5") as instance_:
        write_stack(instance_.project / "J1" / "stack.mrc", N)
        yield instance_


def test_particles_map_and_mask_become_files_that_the_import_takes(there: Instance, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    done = there.run(*READ, "--volume", "volume", "--mask", "mask", "-o", folder)
    assert (done.returncode, done.stdout) == (0, f"{folder / 'particles.cs'}\n"), done.stderr
    dataset = load_dataset(folder / "particles.cs")
    columns = cs_columns(N)
    assert np.array_equal(np.asarray(dataset["uid"]), columns["uid"])
    for name in ("alignments3D/pose", "ctf/df1_A", "blob/path"):  # own and passthrough slots
        assert np.array_equal(np.asarray(dataset[name]), columns[name])
    assert read_volume(folder / "map.mrc")[1] == pytest.approx(1.25)
    assert (folder / "mask.mrc").is_file()
    assert read_json(folder / "cryosparc.json")["n_particles"] == N
    particles = import_particles(
        folder / "particles.cs", tmp_path / "import", ImportOptions(datadir=folder / "project")
    )
    assert set(particles.particle_id.tolist()) == set(columns["uid"].tolist())
    assert not list(folder.rglob("*.mrcs"))
    assert ("projects.download_file", 200) not in there.state.calls  # nothing is fetched over the network


def test_without_map_and_mask_only_particles_are_read(there: Instance, tmp_path: Path) -> None:
    assert there.run(*READ, "-o", tmp_path / "source").returncode == 0
    names = {path.name for path in (tmp_path / "source").iterdir()}
    assert names == {"particles.cs", "cryosparc.json", "project"}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--job", "J7"), 1, "J7"),
        (("--output-name", "volume"), 1, "no particle output volume; its outputs are particles (particle)"),
        (("--volume", "volume_class_0"), 1, "no volume output volume_class_0"),
        (("--volume", "volume_class_0"), 1, "`volume: null`"),
        (("--mask", "particles"), 1, "no mask output particles"),
        (("--project-folder", "/no/such/mount"), 3, "folder of project P3 is not visible on this machine"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_is_written(
    there: Instance, tmp_path: Path, words: tuple[str, str], code: int, message: str
) -> None:
    done = there.run(*READ, *words, "-o", tmp_path / "source")
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "source").exists()


def test_image_stacks_that_are_not_visible_here_are_refused(there: Instance, tmp_path: Path) -> None:
    (there.project / "J1" / "stack.mrc").unlink()
    (there.project / "J1" / "stack.mrc").symlink_to("/not/mounted/here.mrc")
    done = there.run(*READ, "-o", tmp_path / "source")
    assert done.returncode == 3
    assert "stack.mrc: not visible on this machine, like 1 of 1 files" in done.stderr
    assert not (tmp_path / "source").exists()


def test_a_map_that_is_not_visible_here_is_refused(there: Instance, tmp_path: Path) -> None:
    (there.project / "J1" / "J1_volume_map.mrc").unlink()
    done = there.run(*READ, "--volume", "volume", "-o", tmp_path / "source")
    assert done.returncode == 3
    assert "J1_volume_map.mrc: not visible" in done.stderr
    assert not (tmp_path / "source").exists()


def test_a_project_that_is_mounted_elsewhere_is_read_from_there(there: Instance, tmp_path: Path) -> None:
    elsewhere = there.project.rename(tmp_path / "mounted")
    moved = there.project
    moved.mkdir()
    for file in elsewhere.rglob("*.cs"):  # what the server itself still has
        (moved / file.relative_to(elsewhere)).parent.mkdir(exist_ok=True)
        (moved / file.relative_to(elsewhere)).write_bytes(file.read_bytes())
    done = there.run(*READ, "--project-folder", elsewhere, "-o", tmp_path / "source")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "source" / "project").resolve() == elsewhere


@pytest.mark.parametrize("fault", ["drop", "lost_reply"])
def test_a_broken_connection_is_tried_again(there: Instance, tmp_path: Path, fault: str) -> None:
    there.state.faults[:] = [Fault("jobs.load_output", fault)]
    assert there.run(*READ, "-o", tmp_path / "source").returncode == 0
    assert len(load_dataset(tmp_path / "source" / "particles.cs")) == N


@pytest.mark.parametrize(("fault", "message"), [("error", "ordered failure"), ("expire", "login")])
def test_a_failure_while_reading_leaves_no_files(
    there: Instance, tmp_path: Path, fault: str, message: str
) -> None:
    there.state.faults[:] = [Fault("jobs.load_output", fault)]
    done = there.run(*READ, "-o", tmp_path / "source")
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "source").exists()
