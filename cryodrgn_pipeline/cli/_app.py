"""The one Typer application; importing it costs no science library."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from cryodrgn_pipeline import __version__

app = typer.Typer(
    name="cryodrgn-pipeline",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a consensus refinement in RELION or cryoSPARC to the motions and states hidden in it.",
)

DATA, MODEL, RESULTS, WORKFLOW = "The data", "The model", "The results", "The workflow"
CRYOSPARC = "cryoSPARC"

Processes = Annotated[
    int, typer.Option(min=1, help="Processes on each node that work together: one for each GPU.")
]
Nodes = Annotated[int, typer.Option(min=1, help="Nodes that work together; srun starts the command on each.")]


class _StderrHandler(logging.Handler):
    """Writes to what sys.stderr is at the time, so that a caller may redirect it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def in_processes(processes: int, nodes: int) -> None:
    """Where several are asked for, run this command line in them by torchrun and end with its exit code."""
    if processes * nodes > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        from cryodrgn_pipeline.launch import run_in_processes

        raise typer.Exit(run_in_processes(processes, nodes))


def say(result: object) -> None:
    """Print a result on stdout: of several processes the first one does."""
    if leads():
        typer.echo(result)


def leads() -> bool:
    """Whether this is the first process of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cryodrgn-pipeline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log more.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Log warnings and errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    level = logging.WARNING if quiet or not leads() else logging.DEBUG if verbose or debug else logging.INFO
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("cryodrgn_pipeline")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
