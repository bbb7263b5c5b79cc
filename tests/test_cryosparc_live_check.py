"""`live-check` answers every question against the stand-in, and tells differences from failures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryosparc_instance import PROJECT, REFINEMENT, WORKSPACE, Instance, instance
from particle_files import cs_columns, write_stack
from standin import operations
from standin.state import Fault

from cryodrgn_pipeline.interop.cryosparc_live_check import AFTERWARDS, WHILE_FILLING

N = 8
CHECK = ("live-check", "--project", PROJECT, "--workspace", WORKSPACE, "--job", REFINEMENT)
QUESTIONS = [*WHILE_FILLING, *AFTERWARDS]


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Instance]:
    with instance(tmp_path, cs_columns(N), Path(sys.executable), "5") as instance_:
        write_stack(instance_.project / "J1" / "stack.mrc", N)
        yield instance_


def answers(output: str) -> dict[str, str]:
    lines = [line for line in output.splitlines() if not line.startswith("made ")]
    found = {question: line[:6].strip() for line in lines for question in QUESTIONS if question in line}
    assert len(found) == len(lines)
    return found


def test_every_question_is_answered_with_yes(there: Instance) -> None:
    done = there.run(*CHECK)
    assert done.returncode == 0, done.stderr
    assert answers(done.stdout) == dict.fromkeys(QUESTIONS, "yes")
    assert "made P3 J2" in done.stdout
    assert there.state.job(PROJECT, "J2").status == "completed"


@pytest.mark.cryosparc4
@pytest.mark.heavy
def test_the_client_of_4_7_cannot_look_for_descriptions(cryosparc4: Path, tmp_path: Path) -> None:
    with instance(tmp_path, cs_columns(N), cryosparc4, "4") as there:
        write_stack(there.project / "J1" / "stack.mrc", N)
        done = there.run(*CHECK)
    assert done.returncode == 0, done.stderr
    found = answers(done.stdout)
    assert found.pop("is a job found by its description?") == "no"
    assert set(found.values()) == {"yes"}
    assert len(found) == len(QUESTIONS) - 1


def without_check_of_uids(save: Callable[..., Any]) -> Callable[..., Any]:
    def lax(state: Any, project: str, job: str, name: str, dataset: Any, **named: Any) -> Any:
        if set(dataset["uid"].tolist()) <= {1, 2}:
            state.output(project, job, name).num_items = len(dataset)
            return state.job(project, job)
        return save(state, project, job, name, dataset, **named)

    return lax


def test_what_works_otherwise_is_a_no_and_no_failure(
    there: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = operations.OPERATIONS["jobs.save_output"]
    monkeypatch.setitem(operations.OPERATIONS, "jobs.save_output", without_check_of_uids(save))
    (there.project / "J1" / "stack.mrc").unlink()
    done = there.run(*CHECK)
    assert done.returncode == 0, done.stderr
    noes = {question for question, answer in answers(done.stdout).items() if answer == "no"}
    assert noes == {"are foreign uids refused?", "are image stacks visible on this machine?"}


def test_an_import_that_cannot_be_queued_is_a_no(there: Instance) -> None:
    there.state.faults[:] = [Fault("jobs.enqueue", "error")]
    done = there.run(*CHECK)
    assert done.returncode == 0, done.stderr
    assert {question for question, answer in answers(done.stdout).items() if answer == "no"} == {
        "do its maps come in by Import 3D Volumes?"
    }
    assert "without --import-volumes" in done.stdout


def test_a_failure_ends_the_check_and_the_job_is_marked_as_failed(there: Instance) -> None:
    there.state.faults[:] = [Fault("projects.mkdir", "error")]
    done = there.run(*CHECK)
    assert done.returncode == 1
    found = answers(done.stdout)
    assert list(found)[-1] == "does the job take maps and half maps?"
    assert found["does the job take maps and half maps?"] == "failed"
    assert there.state.job(PROJECT, "J2").status == "failed"


def test_without_a_refinement_nothing_is_made(there: Instance) -> None:
    done = there.run(*CHECK, "--output-name", "mask")
    assert done.returncode == 1
    assert "no particle output mask" in done.stderr
    assert len(there.state.jobs) == 1
