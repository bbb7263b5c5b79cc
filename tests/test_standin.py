"""The stand-in refuses what it must, or tests against it would prove nothing; asked by the real client."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryosparc.dataset import Dataset
from cryosparc.errors import APIError
from cryosparc_instance import PROJECT, REFINEMENT, WORKSPACE, Instance, instance
from particle_files import cs_columns
from standin.contract import published_functions
from standin.operations import OPERATIONS
from standin.state import EMAIL, PASSWORD

N = 6
COMPONENT = [{"name": "components_mode_0", "dtype": "components"}]
MAP = [{"name": "map", "dtype": "blob"}]


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Instance]:
    with instance(tmp_path, cs_columns(N), Path(sys.executable), "5") as instance_:
        yield instance_


@pytest.fixture
def client(there: Instance) -> Iterator[Any]:
    from cryosparc.tools import CryoSPARC

    client = CryoSPARC(there.environment["CRYOSPARC_BASE_URL"], email=EMAIL, password=PASSWORD)
    yield client
    client.api._client.close()


@pytest.fixture
def job(client: Any) -> Any:
    """A running external job with one output of each kind."""
    job = client.create_external_job(PROJECT, WORKSPACE, title="t")
    job.connect("particles", REFINEMENT, "particles", slots=["blob"])
    job.add_output("particle", "subset", slots=COMPONENT, passthrough="particles")
    job.add_output("volume", "volume", slots=MAP)
    job.start("running")
    return job


def volume_row(job: Any, path: str) -> Any:
    row = job.alloc_output("volume", 1)
    row["map/path"], row["map/shape"], row["map/psize_A"] = path, [[8] * 3], 1.0
    return row


def rows(uids: Any, value: str = "f4", component: str = "u4") -> Any:
    n = len(uids)
    return Dataset(
        {
            "uid": np.asarray(uids, dtype=np.uint64),
            "components_mode_0/component": np.zeros(n, component),
            "components_mode_0/value": np.zeros(n, value),
        }
    )


UIDS = cs_columns(N)["uid"]
REFUSED = {
    "saving rows of another dtype": (lambda job: job.save_output("subset", rows(UIDS, value="f8")), "dtypes"),
    "uids that are not in the input": (lambda job: job.save_output("subset", rows([1, 2])), "not in input"),
    "repeated uids": (lambda job: job.save_output("subset", rows([UIDS[0]] * 2)), "repeated"),
    "a missing column": (
        lambda job: job.save_output("subset", Dataset({"uid": UIDS})),
        "lacks the columns",
    ),
    "a map that is not there": (
        lambda job: job.save_output("volume", volume_row(job, f"{job.uid}/none.mrc")),
        "there is no",
    ),
    "a map outside of the project": (
        lambda job: job.save_output("volume", volume_row(job, "../../etc/passwd")),
        "not in the directory",
    ),
    "a file outside of the project": (lambda job: job.upload("../../evil", b"1"), "not in the directory"),
    "a file in no folder": (lambda job: job.upload("none/file", b"1"), "no directory"),
    "an unknown slot": (lambda job: job.add_output("particle", "p", slots=["poses"]), "unknown particle"),
    "an unknown volume slot": (lambda job: job.add_output("volume", "v", slots=["map"]), "unknown volume"),
    "a passthrough of another type": (
        lambda job: job.add_output("volume", "v", slots=MAP, passthrough="particles"),
        "is of type",
    ),
    "starting twice": (lambda job: job.start("running"), "must be building"),
    "clearing while it runs": (lambda job: job.clear(), "cannot be cleared"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_the_stand_in_refuses(job: Any, what: str) -> None:
    action, message = REFUSED[what]
    with pytest.raises(APIError, match=message):
        action(job)


def test_it_refuses_to_save_before_the_start_and_after_the_end(client: Any, job: Any) -> None:
    job.stop()
    with pytest.raises(APIError, match="must be running or waiting"):
        job.save_output("subset", rows(UIDS))
    early = client.create_external_job(PROJECT, WORKSPACE, title="early")
    early.add_output("particle", "subset", slots=COMPONENT)
    with pytest.raises(APIError, match="must be running or waiting"):
        early.save_output("subset", rows(UIDS))


def test_it_refuses_a_file_over_another(job: Any) -> None:
    job.upload("a.txt", b"1")
    with pytest.raises(APIError, match="is there already"):
        job.upload("a.txt", b"2")


def test_it_refuses_expired_tokens(there: Instance, job: Any) -> None:
    there.state.tokens.clear()
    with pytest.raises(APIError, match="expired"):
        job.log("hello")


def test_what_is_not_implemented_answers_501(client: Any) -> None:
    with pytest.raises(APIError, match=r"does not implement api\.jobs\.kill"):
        client.api.jobs.kill(PROJECT, REFINEMENT)


def test_every_implemented_function_is_a_published_one() -> None:
    assert set(OPERATIONS) <= set(published_functions())


def test_what_was_saved_is_read_back(client: Any, job: Any) -> None:
    saved = rows(UIDS[2:5])
    saved["components_mode_0/value"] = np.array([0.1, 1e-30, -7], dtype=np.float32)
    job.save_output("subset", saved)
    job.stop()
    back = client.find_external_job(PROJECT, job.uid).load_output("subset")
    assert np.array_equal(back["uid"], UIDS[2:5])
    assert np.array_equal(back["components_mode_0/value"], saved["components_mode_0/value"])
    assert np.array_equal(back["alignments3D/pose"], cs_columns(N)["alignments3D/pose"][2:5])


def test_the_clients_own_way_that_push_avoids_is_as_it_was(client: Any) -> None:
    """Where this fails, the client has changed, and push may become simpler."""
    job = client.create_external_job(PROJECT, WORKSPACE, title="run()")
    with pytest.raises(KeyboardInterrupt), job.run():
        raise KeyboardInterrupt
    assert job.refresh().status == "completed"
