"""RELION's External job: the workflow on one of its particle files, the states handed back as output nodes.

RELION calls the command in its project folder, never looks at the exit code, and learns from files in the
job's folder how it went: RELION_OUTPUT_NODES.star, then one of three empty files; with a fourth it asks for
an end.
"""

from __future__ import annotations

import fcntl
import logging
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cryodrgn_pipeline.errors import ConfigError, CryodrgnPipelineError, ExternalJobError
from cryodrgn_pipeline.interop.relion_parameters import DATASET, RUN, SUBSET, configuration

if TYPE_CHECKING:
    from cryodrgn_pipeline.interop.relion_states import State

SUCCESS, FAILURE, ABORTED = (f"RELION_JOB_EXIT_{word}" for word in ("SUCCESS", "FAILURE", "ABORTED"))
ABORT_NOW = "RELION_JOB_ABORT_NOW"
NODES = "RELION_OUTPUT_NODES.star"
RELIONS_OWN = ("o", "pipeline_control", "in_parts", "in_3dref", "in_mask", "j")

# Node types by their label (RELION 4 and 5) and by their number (3.1).
PARTICLES = ("ParticleGroupMetadata.star.relion", 3)
MAP = ("DensityMap.mrc", 6)
HALF_MAP = ("DensityMap.mrc.halfmap", 10)

HELP = """\
usage: cryodrgn-pipeline-relion --o External/jobNNN/ --in_parts FILE [--in_3dref MAP] [--in_mask MASK]
                                [--SECTION.KEY VALUE ...] --j THREADS [--pipeline_control DIR]

RELION calls this for an External job. In its window: External executable: the full path of this command;
Input particles: the particle file of a 3D refinement; Input 3D reference, mask: its map and mask, if wanted.
On the tab Params, any key of config.yaml, such as
  preprocess.box_size_px 128    train.latent_dim 4    volumes.source decoder    conventions.negate_shifts
and for one more particle file, subset.star:
  subset.clusters 0,3    subset.where 'z_0 > 1'    subset.ranges z_0:-1:2    subset.without_junk
"""


class Stopped(Exception):  # noqa: N818  (no error: somebody asked for it)
    """The job was told to end; `outcome` is the exit file that says so."""

    def __init__(self, outcome: str, by: str) -> None:
        super().__init__(f"ended by {by}; Continue goes on from what is done")
        self.outcome = outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalJob:
    """What RELION's command line says.

    `output` is the job's folder and `control` that of the exit and abort files; paths are relative to the
    project folder, which is the working directory. `parameters` are the words after each further label.
    """

    output: Path
    control: Path
    particles: Path
    reference: Path | None
    mask: Path | None
    threads: int
    parameters: Mapping[str, Sequence[str]]


def main() -> None:
    """Run as RELION's External job; the exit code is 0 only on success."""
    words = sys.argv[1:]
    if "--help" in words or "-h" in words:
        print(HELP, end="")
        return
    logger = logging.getLogger("cryodrgn_pipeline")
    handler = logging.StreamHandler(sys.stdout)  # run.out; run.err is for what went wrong
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    sys.exit(run_external_job(words))


def run_external_job(words: Sequence[str]) -> int:
    """Do the job of a command line and leave exactly one exit file; returns an exit code.

    Without a folder (`--o`), or when the same job is running already, nothing is written.
    """
    options = split_options(words)
    folders = [values[0] for name, values in options if name == "o" and values]
    controls = [values[0] for name, values in options if name == "pipeline_control" and values]
    if not folders:
        print("error: --o External/jobNNN/ is missing: RELION gives the folder of the job", file=sys.stderr)
        return ConfigError.exit_code
    output = Path(folders[0])
    control = Path(controls[0]) if controls else output
    try:
        with only_instance(output) as lock, reported(control):
            run_states(external_job(options, output, control), lock)
    except CryodrgnPipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def split_options(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each `--label` with the words after it, none where RELION left a bare one."""
    options: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") or not options:
            options.append((word.removeprefix("--"), []))
        else:
            options[-1][1].append(word)
    return options


def external_job(options: Sequence[tuple[str, Sequence[str]]], output: Path, control: Path) -> ExternalJob:
    """Take RELION's own labels out of the options; the others are parameters.

    Raises
    ------
    ConfigError
        If particles are missing, another kind of input is given, or a label stands twice.
    """
    given = dict(options)
    if len(given) < len(options):
        twice = next(name for name in given if [label for label, _ in options].count(name) > 1)
        raise ConfigError(f"--{twice} is given twice")
    strange = [name for name in ("in_movies", "in_mics", "in_coords") if name in given]
    if strange:
        raise ConfigError(f"--{strange[0]}: this job reads particles only; leave the other inputs empty")
    particles, reference, mask, threads = (
        _one(given, name) for name in ("in_parts", "in_3dref", "in_mask", "j")
    )
    if particles is None:
        raise ConfigError("--in_parts: choose Input particles, the particle file of a 3D refinement")
    if threads is not None and not (threads.isdecimal() and int(threads) > 0):
        raise ConfigError(f"--j {threads}: a number of threads expected")
    return ExternalJob(
        output=output,
        control=control,
        particles=Path(particles),
        reference=Path(reference) if reference else None,
        mask=Path(mask) if mask else None,
        threads=int(threads or 1),
        parameters={name: values for name, values in options if name not in RELIONS_OWN},
    )


def _one(given: Mapping[str, Sequence[str]], name: str) -> str | None:
    values = given.get(name, ())
    if len(values) > 1:
        raise ConfigError(f"--{name} {' '.join(values)}: one value expected; no blanks in file names")
    return values[0] if values else None


@contextmanager
def only_instance(output: Path) -> Iterator[int]:
    """Hold the job's lock; its descriptor is handed to Snakemake, so that it lives as long as either.

    Raises
    ------
    ExternalJobError
        The same job is running; its files are left alone.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".cryodrgn-pipeline.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExternalJobError(
                f"{output}: this job is running already; wait for it or abort it"
            ) from None
        yield handle.fileno()


@contextmanager
def reported(control: Path) -> Iterator[None]:
    """Leave one exit file, whatever happens in the block: success, an error, a signal, RELION's abort."""
    control.mkdir(parents=True, exist_ok=True)
    for name in (SUCCESS, FAILURE, ABORTED, NODES):
        (control / name).unlink(missing_ok=True)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # once is enough: what is being saved is not to be cut short
        raise Stopped(FAILURE, signal.Signals(number).name)

    former = {number: signal.signal(number, stop) for number in numbers}
    outcome = FAILURE
    try:
        yield
        outcome = SUCCESS
    except Stopped as stopped:
        outcome = stopped.outcome
        raise
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        (control / outcome).touch()
        (control / ABORT_NOW).unlink(missing_ok=True)
        for number, handler in former.items():
            signal.signal(number, handler)


def run_states(job: ExternalJob, lock: int) -> None:
    """Run the workflow on the job's particles, then write the particles and maps of its states and list them.

    Parameters
    ----------
    lock
        Descriptor that Snakemake keeps open.

    Raises
    ------
    ExternalJobError
        If a step failed; the message repeats what its log says.
    Stopped
        If RELION asks for an end.
    """
    from cryodrgn_pipeline.config.check import load_config
    from cryodrgn_pipeline.interop.relion_states import write_states
    from cryodrgn_pipeline.io.atomic import replacing
    from cryodrgn_pipeline.workflow import Host, run_workflow

    def check() -> None:
        if (job.control / ABORT_NOW).exists():
            raise Stopped(ABORTED, "RELION")

    check()
    configfile = job.output / "config.yaml"
    text = configuration(job.output, job.particles, job.reference, job.mask, job.parameters)
    with replacing(configfile) as temporary:
        temporary.write_text(text, encoding="utf-8")
    subset = load_config(configfile).datasets[DATASET].subsets.get(SUBSET)
    started = time.time()
    extra = ["--directory", str(job.output), "--nolock", "--resources", "gpu=1"]
    host = Host(check=check, keep_open=(lock,))
    code = run_workflow(configfile, cores=str(job.threads), extra=extra, host=host)
    if code:
        raise ExternalJobError(f"the workflow failed: {_reasons(job.output / 'logs', started)}")
    results = job.output / "results" / DATASET
    states = write_states(results, results / "all" / RUN, job.output, subset, check)
    write_nodes(job.control / NODES, states)


def _reasons(logs: Path, since: float) -> str:
    """What the logs of failed steps say, for run.err; the whole is in run.out."""
    found = []
    for path in sorted(logs.rglob("*.log")):
        if path.stat().st_mtime >= since:
            text = "\n" + path.read_text(encoding="utf-8", errors="replace")
            _, error, reason = text.rpartition("\nerror: ")
            if error:
                found.append(f"{path.relative_to(logs).with_suffix('')}: {reason.strip()}")
    return "\n".join(found) or f"see run.out and {logs}"


def write_nodes(path: Path, states: Sequence[State]) -> None:
    """Tell RELION which files it may use: particle files, maps and half maps."""
    from cryodrgn_pipeline.io.star import write_tables

    nodes: list[tuple[Path, tuple[str, int]]] = []
    for state in states:
        nodes.append((state.particles, PARTICLES))
        nodes += [(file, HALF_MAP if number else MAP) for number, file in enumerate(state.maps)]
    table = {
        "rlnPipeLineNodeName": [str(file) for file, _ in nodes],
        "rlnPipeLineNodeTypeLabel": [label for _, (label, _) in nodes],
        "rlnPipeLineNodeType": [number for _, (_, number) in nodes],
    }
    write_tables({"output_nodes": table}, path)


if __name__ == "__main__":
    main()
