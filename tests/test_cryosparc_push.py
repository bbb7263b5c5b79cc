"""`push`: what stands in cryoSPARC afterwards: when all goes well, the run changes, or something breaks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cryosparc_instance import PROJECT, REFINEMENT, WORKSPACE, Instance, instance
from particle_files import cs_columns
from standin.state import EMAIL, PASSWORD, Fault
from tiny_run import make_latent, make_volumes, write_map

from cryodrgn_pipeline.errors import ConfigError, CryodrgnPipelineError, ExternalJobError, InputFormatError
from cryodrgn_pipeline.interop import cryosparc_client
from cryodrgn_pipeline.interop.cryosparc_client import Connection
from cryodrgn_pipeline.interop.cryosparc_content import gather
from cryodrgn_pipeline.interop.cryosparc_push import Target, push
from cryodrgn_pipeline.io.atomic import write_json
from cryodrgn_pipeline.io.ids import write_ids
from cryodrgn_pipeline.io.runs import Latents, read_latents

# as outside of pytest, where the client's warning about its retry is no error by itself
pytestmark = pytest.mark.filterwarnings(r"ignore:\*\*\* API client")

N = 40
TARGET = Target(project=PROJECT, workspace=WORKSPACE, job=REFINEMENT)
REAL_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f64540"
    "0000000049454e44ae426082"
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of particles of the refinement: latents, two clusters, two volumes, two figures."""
    folder = tmp_path / "run"
    frame = make_latent(folder, n=N, ids="cs")
    (folder / "analysis").mkdir()
    pd.DataFrame({"particle_id": frame["particle_id"], "cluster": np.arange(N) % 2}).to_parquet(
        folder / "analysis" / "particles.parquet", index=False
    )
    make_volumes(folder / "volumes" / "centers", frame[["z_0", "z_1", "z_2"]].to_numpy("f4")[:2])
    (folder / "report").mkdir()
    for name in ("latent_pca.png", "loss.png"):
        (folder / "report" / name).write_bytes(REAL_PNG)
    write_ids(tmp_path / "few.txt", frame["particle_id"].to_numpy()[3:10])
    return folder


@pytest.fixture
def there(run: Path, tmp_path: Path) -> Iterator[Instance]:
    with served(run, tmp_path, Path(sys.executable), "5") as instance:
        yield instance


def served(run: Path, tmp_path: Path, python: Path, major: str) -> Any:
    columns = cs_columns(N)
    columns["uid"] = read_latents(run).particle_id[::-1].copy()
    return instance(tmp_path, columns, python, major)


@pytest.fixture
def connected(there: Instance, monkeypatch: pytest.MonkeyPatch) -> Iterator[Instance]:
    """The instance, with `push` in this process connected to it."""
    from cryosparc import __version__
    from cryosparc.tools import CryoSPARC

    clients: list[Any] = []

    def open_connection() -> Connection:
        with cryosparc_client.talking("connecting"):
            client = CryoSPARC(there.environment["CRYOSPARC_BASE_URL"], email=EMAIL, password=PASSWORD)
        clients.append(client)
        return Connection(client, __version__)

    monkeypatch.setattr(Connection, "open", open_connection)
    monkeypatch.setattr(cryosparc_client, "PAUSE_S", 0)
    yield there
    for client in clients:
        client.api._client.close()


def pushed(run: Path, subsets: dict[str, Path] | None = None, clusters: bool = True) -> str:
    volumes = tuple(sorted((run / "volumes").iterdir()))
    return push(gather(run, volumes, subsets or {}, clusters=clusters), TARGET, run / "cryosparc")


def words(run: Path) -> list[object]:
    volumes = [word for folder in sorted((run / "volumes").iterdir()) for word in ("--volumes", folder)]
    target = ["--project", PROJECT, "--workspace", WORKSPACE, "--job", REFINEMENT]
    return ["push", run, *target, *volumes]


def external_jobs(there: Instance) -> list[Any]:
    return [job for job in there.state.jobs.values() if job.spec.type == "snowflake"]


def texts(there: Instance, uid: str) -> list[str]:
    return [getattr(event, "text", "") for event in there.state.events[PROJECT, uid]]


def assert_whole(
    there: Instance,
    run: Path,
    uid: str,
    groups: dict[str, int] | None = None,
    latents: Latents | None = None,
) -> None:
    """The job is completed and holds the run: rows, z bit for bit, maps byte for byte."""
    job = there.state.job(PROJECT, uid)
    assert job.status == "completed"
    filled = {name: output for name, output in job.spec.outputs.root.items() if output.num_items}
    wanted = groups or {"particles": N, "particles_cluster_0": N // 2, "particles_cluster_1": N // 2}
    found = {name: output.num_items for name, output in filled.items() if output.type == "particle"}
    assert found == wanted
    latents = latents or read_latents(run)
    rows = {identity: row for row, identity in enumerate(latents.particle_id.tolist())}
    for name in wanted:
        dataset = there.state.joined(PROJECT, filled[name], "all")
        row = np.array([rows[identity] for identity in dataset["uid"].tolist()])
        for mode in range(3):
            assert np.array_equal(dataset[f"components_mode_{mode}/value"], latents.z[row, mode])
    maps = sorted(name for name, output in filled.items() if output.type == "volume")
    made = sorted((run / "volumes").rglob("vol_*.mrc"))
    assert len(maps) == len(made)
    for name, path in zip(maps, made, strict=True):
        (stored,) = there.state.joined(PROJECT, filled[name], "all")["map/path"]
        assert (there.project / stored).read_bytes() == path.read_bytes()


# ── When all goes well ──


def test_the_job_holds_particles_clusters_subsets_volumes_figures_and_progress(
    connected: Instance, run: Path, tmp_path: Path
) -> None:
    uid = pushed(run, {"few": tmp_path / "few.txt"})
    sizes = {"particles": N, "particles_cluster_0": 20, "particles_cluster_1": 20, "particles_few": 7}
    assert_whole(connected, run, uid, sizes)
    job = connected.state.job(PROJECT, uid)
    assert job.parents == [REFINEMENT]
    events = connected.state.events[PROJECT, uid]
    assert [event.text for event in events if event.type == "image"] == [
        "latent space, principal components",
        "training",
    ]
    assert "volume 2 of 2" in " ".join(texts(connected, uid))
    assert len(job.ui_tile_images) == 1
    poses = connected.state.joined(PROJECT, job.spec.outputs.root["particles"], ["alignments3D"])
    assert len(poses) == N  # the refinement's, passed through
    receipt = json.loads((run / "cryosparc" / "pushed.json").read_text(encoding="utf-8"))
    assert receipt["external_job"] == uid
    assert receipt["particles"] == sizes


def test_half_maps_go_along_only_where_they_are_independent(connected: Instance, run: Path) -> None:
    folder = run / "volumes" / "centers"
    halves = [f"halves/vol_{row:03d}_half{half}.mrc" for row in range(2) for half in (1, 2)]
    for number, name in enumerate(halves):
        write_map(folder / name, np.full((24, 24, 24), number, dtype=np.float32))
    table = pd.read_parquet(folder / "volumes.parquet")
    table["half1_path"], table["half2_path"] = halves[::2], halves[1::2]
    table["resolution_fsc0143_a"] = [9.5, 9.5]
    table["fsc_independent"] = [True, False]
    table.to_parquet(folder / "volumes.parquet", index=False)
    uid = pushed(run)
    outputs = connected.state.job(PROJECT, uid).spec.outputs.root
    first, second = (outputs[f"volume_centers_{row:03d}"] for row in range(2))
    assert [result.name for result in first.results] == ["map", "map_half_A", "map_half_B"]
    assert [result.name for result in second.results] == ["map"]
    stored = connected.state.joined(PROJECT, first, "all")
    for slot, name in (("map_half_A", halves[0]), ("map_half_B", halves[1])):
        assert (connected.project / stored[f"{slot}/path"][0]).read_bytes() == (folder / name).read_bytes()
    assert first.title.endswith(", 9.5 Å")
    assert second.title.endswith(", 9.5 Å (optimistic)")


def test_the_same_content_again_changes_nothing(connected: Instance, run: Path) -> None:
    uid = pushed(run)
    before, calls = connected.state.job(PROJECT, uid).model_dump(), len(connected.state.calls)
    (run / "cryosparc" / "pushed.json").unlink()  # as Snakemake does before it runs a rule
    assert pushed(run) == uid
    assert connected.state.job(PROJECT, uid).model_dump() == before
    made = {name for name, _ in connected.state.calls[calls:]}
    assert made <= {
        "login", "users.me", "config.get_version", "jobs.find_one", "jobs.load_output",
    }  # fmt: skip
    assert (run / "cryosparc" / "pushed.json").is_file()


def test_changed_content_refills_the_same_job(connected: Instance, run: Path, tmp_path: Path) -> None:
    uid = pushed(run, {"few": tmp_path / "few.txt"})
    shift_latents(run)
    assert pushed(run) == uid
    assert_whole(connected, run, uid)
    assert len(external_jobs(connected)) == 1
    left = connected.state.job(PROJECT, uid).spec.outputs.root["particles_few"]
    assert left.num_items == 0  # cryoSPARC cannot take an output away again
    assert any("stay empty: particles_few" in text for text in texts(connected, uid))


def test_a_job_that_was_cleared_by_hand_is_filled_again(connected: Instance, run: Path) -> None:
    uid = pushed(run)
    connected.state.clear(PROJECT, uid)
    assert pushed(run) == uid
    assert_whole(connected, run, uid)


def test_a_job_that_was_deleted_is_made_anew(connected: Instance, run: Path) -> None:
    first = pushed(run)
    connected.state.job(PROJECT, first).deleted = True
    second = pushed(run)
    assert second != first
    assert_whole(connected, run, second)


def test_another_target_gets_a_job_of_its_own(connected: Instance, run: Path) -> None:
    first = pushed(run)
    connected.state.add_workspace(PROJECT, "W2")
    content = gather(run, (), {})
    second = push(content, Target(project=PROJECT, workspace="W2", job=REFINEMENT), run / "cryosparc")
    assert second != first
    assert connected.state.job(PROJECT, second).workspace_uids == ["W2"]
    assert connected.state.job(PROJECT, first).status == "completed"


def imported(run: Path) -> str:
    volumes = (run / "volumes" / "centers",)
    return push(gather(run, volumes, {}, import_maps=True), TARGET, run / "cryosparc")


def import_jobs(there: Instance) -> list[Any]:
    return [job for job in there.state.jobs.values() if job.spec.type == "import_volumes"]


def test_maps_may_go_through_cryosparcs_own_import_job(connected: Instance, run: Path) -> None:
    uid = imported(run)
    outputs = connected.state.job(PROJECT, uid).spec.outputs.root
    assert {output.type for output in outputs.values()} == {"particle"}
    (job,) = import_jobs(connected)
    receipt = json.loads((run / "cryosparc" / "pushed.json").read_text(encoding="utf-8"))
    assert receipt["import_job"] == job.uid
    assert set(receipt["volumes"]) == set(job.spec.outputs.root)
    for name, made in receipt["volumes"].items():
        (stored,) = connected.state.joined(PROJECT, job.spec.outputs.root[name], "all")["map/path"]
        assert (connected.project / stored).read_bytes() == Path(made).read_bytes()
    calls = len(connected.state.calls)
    assert imported(run) == uid
    assert not {name for name, _ in connected.state.calls[calls:]} & {"jobs.create", "jobs.enqueue"}


@pytest.mark.parametrize("function", ["jobs.enqueue", "jobs.create", "jobs.clear"])
def test_an_import_job_that_could_not_be_run_is_taken_up_again(
    connected: Instance, run: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported(run)
    shift_latents(run)
    if function == "jobs.create":
        connected.state.job(PROJECT, import_jobs(connected)[0].uid).deleted = True
    order = Fault(function, "error", skip=1 if function == "jobs.clear" else 0)
    connected.state.faults[:] = [order]
    with pytest.raises(ExternalJobError, match="ordered failure"):
        imported(run)
    assert not (run / "cryosparc" / "pushed.json").exists()
    uid = imported(run)
    jobs = [job for job in import_jobs(connected) if not job.deleted]
    assert [job.status for job in jobs] == ["completed"]
    assert connected.state.job(PROJECT, uid).status == "completed"
    assert len(external_jobs(connected)) == 1


def test_an_import_that_finds_other_maps_than_were_sent_is_an_error(connected: Instance, run: Path) -> None:
    from standin import operations

    upload = operations.OPERATIONS["projects.upload_file"]

    def and_another(state: Any, project: str, stream: bytes, path: str = "", **named: Any) -> Any:
        upload(state, project, stream, path=path.replace("_000_", "_999_"), **named)
        return upload(state, project, stream, path=path, **named)

    operations.OPERATIONS["projects.upload_file"] = and_another
    try:
        with pytest.raises(ExternalJobError, match="is completed with 3 of 2 maps"):
            imported(run)
    finally:
        operations.OPERATIONS["projects.upload_file"] = upload
    assert not (run / "cryosparc" / "pushed.json").exists()


# ── Refusals: nothing is made in cryoSPARC ──


def test_particles_that_are_no_cryosparc_uids_are_refused(connected: Instance, run: Path) -> None:
    make_latent(run, n=N, ids="star")
    with pytest.raises(InputFormatError, match="not uids of cryoSPARC"):
        pushed(run, clusters=False)
    assert not external_jobs(connected)


def test_particles_that_the_job_does_not_have_are_refused(connected: Instance, run: Path) -> None:
    make_latent(run, n=N + 2, ids="cs")
    with pytest.raises(InputFormatError, match=r"of its 42 particles are not in particles of P3 J1"):
        pushed(run, clusters=False)
    assert not external_jobs(connected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"job": "J99"}, "job .*J99.* not found"),
        ({"output": "volume"}, r"no particle output volume; its outputs are particles \(particle\), volume"),
        ({"project": "P9"}, "P9"),
        ({"workspace": "W9"}, "W9"),
    ],
)
def test_a_target_that_is_not_there_is_named(
    connected: Instance, run: Path, change: dict[str, str], message: str
) -> None:
    given = {"project": PROJECT, "workspace": WORKSPACE, "job": REFINEMENT, "output": "particles"} | change
    with pytest.raises(ExternalJobError, match=message):
        push(gather(run, (), {}), Target(**given), run / "cryosparc")
    assert not external_jobs(connected)
    assert not (run / "cryosparc" / "pushed.json").exists()


def test_subsets_whose_names_become_the_same_output_are_refused(run: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    with pytest.raises(ConfigError, match="particles_a_b"):
        gather(run, (), {"a.b": few, "a-b": few})
    with pytest.raises(ConfigError, match="particles_cluster_0"):
        gather(run, (), {"cluster_0": few})


def test_an_analysis_of_other_particles_is_refused(run: Path) -> None:
    table = pd.read_parquet(run / "analysis" / "particles.parquet")
    table.iloc[::-1].to_parquet(run / "analysis" / "particles.parquet", index=False)
    with pytest.raises(InputFormatError, match=r"not the particles of latent\.parquet"):
        gather(run, (), {})


def test_two_pushes_at_once_are_refused(connected: Instance, run: Path) -> None:
    from cryodrgn_pipeline.io.output_lock import sole_writer

    with sole_writer(run / "cryosparc" / "job.json"), pytest.raises(CryodrgnPipelineError, match="another"):
        pushed(run)
    assert not external_jobs(connected)


def test_a_journal_that_is_none_is_refused(connected: Instance, run: Path) -> None:
    write_json(run / "cryosparc" / "job.json", {"job": "J5"})
    with pytest.raises(InputFormatError, match=r"job.json: not what push writes"):
        pushed(run)
    assert not external_jobs(connected)


# ── Faults: the job ends failed, or the same command takes it up; never completed without being whole ──


def interrupted_by(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


FAULTS: dict[str, Any] = {
    "Ctrl-C": interrupted_by(signal.SIGINT),
    "SIGTERM": interrupted_by(signal.SIGTERM),
    "dropped connection": "drop",
    "500": "error",
    "lost reply": "lost_reply",
    "expired token": "expire",
}


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_request_leaves_no_half_filled_job_completed_and_none_running(
    connected: Instance, run: Path, fault: str, every: int
) -> None:
    state = connected.state
    contents = [read_latents(run)]
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as it ends a process outside a job
    try:
        for request in range(0, 100, every):
            order = Fault("*", FAULTS[fault], skip=request)
            state.faults[:] = [order]
            with contextlib.suppress(ExternalJobError, KeyboardInterrupt, SystemExit):
                pushed(run)
            reached = order not in state.faults
            state.faults.clear()
            for job in external_jobs(connected):
                if job.status == "completed":  # with this content, or untouched with an earlier one
                    assert any(is_whole(connected, run, job.uid, latents) for latents in contents[::-1])
                elif fault != "expired token":  # then nobody can tell cryoSPARC anything
                    assert job.status in ("building", "failed")
            if not reached:
                break
            shift_latents(run)  # so that the next push fills the job anew
            contents.append(read_latents(run))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert request > 30
    (job,) = external_jobs(connected)
    assert_whole(connected, run, job.uid)


def is_whole(there: Instance, run: Path, uid: str, latents: Latents) -> bool:
    try:
        assert_whole(there, run, uid, latents=latents)
    except AssertionError:
        return False
    return True


def shift_latents(run: Path) -> None:
    """Change the run's content."""
    frame = pd.read_parquet(run / "latent.parquet")
    frame["z_0"] += np.float32(1)
    frame.to_parquet(run / "latent.parquet", index=False)


def test_a_job_that_fails_says_why_in_its_log(connected: Instance, run: Path) -> None:
    connected.state.faults[:] = [Fault("jobs.save_output", "error", skip=1)]
    with pytest.raises(ExternalJobError, match="saving particles_cluster_0 of P3 J2: ordered failure"):
        pushed(run)
    (job,) = external_jobs(connected)
    assert job.status == "failed"
    assert any("ordered failure" in text for text in texts(connected, job.uid))
    assert not (run / "cryosparc" / "pushed.json").exists()


def test_an_upload_that_broke_off_is_sent_again_whole(connected: Instance, run: Path) -> None:
    connected.state.faults[:] = [Fault("projects.upload_file", "drop"), Fault("projects.upload_file", "drop")]
    assert_whole(connected, run, pushed(run))
    assert connected.state.calls.count(("projects.upload_file", 0)) == 2


def test_an_upload_that_always_breaks_off_fails_after_three_attempts(connected: Instance, run: Path) -> None:
    connected.state.faults[:] = [Fault("projects.upload_file", "drop") for _ in range(9)]
    with pytest.raises(ExternalJobError, match=r"uploading volumes/volume_centers_000_map\.mrc"):
        pushed(run)
    assert len(connected.state.faults) == 9 - 3
    (job,) = external_jobs(connected)
    assert job.status == "failed"


def test_a_file_that_is_shorter_in_cryosparc_is_an_error(connected: Instance, run: Path) -> None:
    from standin import operations

    whole = operations.OPERATIONS["projects.upload_file"]

    def cut(state: Any, project: str, stream: bytes, **named: Any) -> Any:
        return whole(state, project, stream[:-1], **named)

    operations.OPERATIONS["projects.upload_file"] = cut
    try:
        with pytest.raises(ExternalJobError, match=r"holds \d+ bytes of volumes/"):
            pushed(run)
    finally:
        operations.OPERATIONS["projects.upload_file"] = whole
    (job,) = external_jobs(connected)
    assert job.status == "failed"


def test_a_save_that_loses_rows_is_an_error(connected: Instance, run: Path) -> None:
    from standin import operations

    whole = operations.OPERATIONS["jobs.save_output"]

    def cut(state: Any, project: str, job: str, name: str, dataset: Any, **named: Any) -> Any:
        return whole(state, project, job, name, dataset.slice(0, len(dataset) - 1), **named)

    operations.OPERATIONS["jobs.save_output"] = cut
    try:
        with pytest.raises(ExternalJobError, match="holds 39 rows of output particles"):
            pushed(run)
    finally:
        operations.OPERATIONS["jobs.save_output"] = whole
    (job,) = external_jobs(connected)
    assert job.status == "failed"


def killed_at(there: Instance, run: Path, function: str, number: signal.Signals) -> int:
    """Run the command and send it a signal when cryoSPARC gets the named request; its exit code."""
    process = subprocess.Popen(
        there.command(*words(run)), env=there.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )

    def kill() -> None:
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.wait()

    there.state.faults[:] = [Fault(function, kill)]
    process.communicate(timeout=120)
    assert not there.state.faults
    return process.returncode


@pytest.mark.parametrize(
    "function",
    ["jobs.create", "jobs.connect", "jobs.mark_running", "jobs.save_output", "projects.upload_file"],
)
def test_a_killed_push_is_taken_up_by_the_next(connected: Instance, run: Path, function: str) -> None:
    code = killed_at(connected, run, function, signal.SIGKILL)
    assert code == -signal.SIGKILL
    wait_until_quiet(connected)
    (job,) = external_jobs(connected)
    assert job.status in ("building", "running")
    assert pushed(run) == job.uid
    assert len(external_jobs(connected)) == 1
    assert_whole(connected, run, job.uid)


def wait_until_quiet(there: Instance) -> None:
    """Until the request of the killed process has been dealt with."""
    for _ in range(200):
        if there.state.calls and there.state.lock.acquire(blocking=False):
            there.state.lock.release()
            if external_jobs(there):
                return
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_marks_its_job_as_failed(
    there: Instance, run: Path, number: signal.Signals
) -> None:
    assert killed_at(there, run, "jobs.save_output", number) != 0
    (job,) = external_jobs(there)
    assert job.status == "failed"


def test_wrong_credentials_and_no_credentials_say_how_to_log_in(there: Instance, run: Path) -> None:
    there.environment["CRYOSPARC_PASSWORD"] = "wrong"
    done = there.run(*words(run))
    assert (done.returncode, "Incorrect email or password" in done.stderr) == (1, True)
    for name in ("CRYOSPARC_PASSWORD", "CRYOSPARC_BASE_URL"):
        del there.environment[name]
    done = there.run(*words(run))
    assert done.returncode == 1
    assert "python -m cryosparc.tools login" in done.stderr
    assert not external_jobs(there)


def test_the_clients_own_login_is_enough(there: Instance, run: Path) -> None:
    url = there.environment.pop("CRYOSPARC_BASE_URL")
    login = [sys.executable, "-m", "cryosparc.tools", "login", "--url", url, "--email", EMAIL]
    subprocess.run([*login, "--password", PASSWORD], env=there.environment, check=True, capture_output=True)
    for name in ("CRYOSPARC_EMAIL", "CRYOSPARC_PASSWORD"):
        del there.environment[name]
    done = there.run(*words(run))
    assert (done.returncode, done.stdout) == (0, "P3 J2\n")
    assert_whole(there, run, "J2")


def test_several_logins_ask_for_an_address(there: Instance, run: Path) -> None:
    token = {"access_token": "a", "token_type": "bearer"}
    session = {EMAIL: {"token": token, "expires": "2999-01-01T00:00:00Z"}}
    path = Path(there.environment["XDG_CONFIG_HOME"]) / "cryosparc-tools" / "auth.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"http://a:39000": session, "http://b:39000": session}), encoding="utf-8")
    del there.environment["CRYOSPARC_BASE_URL"]
    done = there.run(*words(run))
    assert done.returncode == 1
    assert "logins for http://a:39000, http://b:39000: choose one; set CRYOSPARC_BASE_URL" in done.stderr


def test_a_cryosparc_of_another_version_is_refused(there: Instance, run: Path) -> None:
    there.state.version = "v4.6.2"
    done = there.run(*words(run))
    assert done.returncode == 1
    assert "may not be compatible" in done.stderr
    assert "executable" in done.stderr
    assert not external_jobs(there)


# ── The client of 4.7 ──


@pytest.mark.cryosparc4
@pytest.mark.heavy
def test_no_password_is_in_what_is_printed(cryosparc4: Path, run: Path, tmp_path: Path) -> None:
    with served(run, tmp_path, cryosparc4, "4") as there:
        there.environment["CRYOSPARC_PASSWORD"] = "not to be seen"
        done = there.run("--debug", *words(run))
        assert done.returncode == 1
        assert "authentication" in done.stderr
        assert "not to be seen" not in done.stderr + done.stdout
        assert not external_jobs(there)


@pytest.mark.cryosparc4
@pytest.mark.heavy
def test_the_client_of_4_7_runs_the_import_job_too(cryosparc4: Path, run: Path, tmp_path: Path) -> None:
    with served(run, tmp_path, cryosparc4, "4") as there:
        for _ in range(2):
            done = there.run(*words(run), "--import-volumes")
            assert done.returncode == 0, done.stderr
            shift_latents(run)
        (job,) = import_jobs(there)
        assert (job.status, len(job.spec.outputs.root)) == ("completed", 2)


@pytest.mark.cryosparc4
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("function", "fault", "status"),
    [
        ("jobs.save_output", signal.SIGINT, "failed"),
        ("jobs.save_output", signal.SIGTERM, "failed"),
        ("projects.upload_file", signal.SIGKILL, "running"),
        ("jobs.save_output", "error", "failed"),
        ("job_send_streamlog", "error", "failed"),
        ("projects.upload_file", "drop", "completed"),
        ("jobs.save_output", "drop", "completed"),
    ],
)
def test_the_client_of_4_7_comes_through_the_same_faults(
    cryosparc4: Path, run: Path, tmp_path: Path, function: str, fault: Any, status: str
) -> None:
    with served(run, tmp_path, cryosparc4, "4") as there:
        if isinstance(fault, signal.Signals):
            killed_at(there, run, function, fault)
        else:
            there.state.faults[:] = [Fault(function, fault)]
            done = there.run(*words(run))
            assert (done.returncode == 0) is (status == "completed"), done.stderr
        (job,) = external_jobs(there)
        assert job.status == status
        done = there.run(*words(run))
        assert (done.returncode, done.stdout) == (0, f"P3 {job.uid}\n"), done.stderr
        assert len(external_jobs(there)) == 1
        assert_whole(there, run, job.uid)
