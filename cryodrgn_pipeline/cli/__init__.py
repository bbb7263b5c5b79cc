"""The command line: parse, call one function, turn errors into one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from types import FrameType

from cryodrgn_pipeline.cli import data, model, results, with_cryosparc, workflow  # noqa: F401  (they add their verbs)
from cryodrgn_pipeline.cli._app import app, leads
from cryodrgn_pipeline.errors import CryodrgnPipelineError, Interrupted, LostRankError

FULL = ". Make room, then run the same command again; nothing that was whole before is lost"
STARTS_OVER = "what was not whole is removed, and the same command starts over"


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 our failure, 2 usage, 3 bad input, 143 and 130 stopped.

    Those two are of SIGTERM and SIGINT (Ctrl-C): what was not whole has been removed, checkpoints are kept.
    """
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    if debug and arguments[0] != "--debug":  # welcome after the verb as well
        arguments.remove("--debug")
        arguments.insert(0, "--debug")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        try:
            app(args=arguments, prog_name="cryodrgn-pipeline")
        finally:
            _stop_no_more()
    except Interrupted as stopped:
        if leads():
            print(f"{stopped}: {stopped.saved or STARTS_OVER}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except CryodrgnPipelineError as error:
        if debug:
            raise
        if leads():
            print(f"error: {error}", file=sys.stderr)
        elif not isinstance(error, LostRankError):
            print(f"error in process {os.environ['RANK']}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a file without permission: the system's words name the file
        if debug:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"error: {error}{FULL if full else ''}", file=sys.stderr)
        sys.exit(1)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _stop_no_more()
    raise Interrupted(number)


def _stop_no_more() -> None:
    """The command is ending: what tells it to comes too late, and must not disturb what Python cleans up."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends two, Snakemake one after Ctrl-C
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once
