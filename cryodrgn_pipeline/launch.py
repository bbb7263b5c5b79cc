"""The same command in several processes, one for each GPU, by torchrun: on one node, or several of Slurm."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from typing import Any

from cryodrgn_pipeline.errors import ConfigError, LostRankError

log = logging.getLogger(__name__)

SAVING_TAKES_S = 300  # at most, from SIGTERM to the end of a process; then it is killed
PORTS = range(29500, 31500)  # of the rendezvous of several nodes; the job's number chooses


def run_in_processes(processes: int, nodes: int) -> int:
    """Run this command line in so many processes a node; the exit code is that of the first one that failed.

    Each of several nodes calls this, started by srun with one task a node.

    Raises
    ------
    ConfigError
        If several nodes are asked for outside such a step.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="cryodrgn-pipeline-") as logs:
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes,
            max_restarts=0,  # a resume is for the user or the workflow to start
            shutdown_timeout=SAVING_TAKES_S,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            **_rendezvous(nodes),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "cryodrgn_pipeline", *sys.argv[1:])
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
        except ChildFailedError as failed:
            by_time = sorted(failed.failures.values(), key=lambda one: one.timestamp)
            first = next((one for one in by_time if one.exitcode != LostRankError.exit_code), by_time[0])
            if first.exitcode == LostRankError.exit_code:
                log.error("the processes on another node were lost")
                return 1
            if first.exitcode > 0:  # it has said why
                return int(first.exitcode)
            log.error(
                "process %d of %d on this node was killed by signal %d%s; the others were stopped. Start the "
                "command again: train goes on from its last checkpoint with --resume.",
                *(first.local_rank + 1, processes, -first.exitcode),
                " (the memory may have run out)" if first.exitcode == -9 else "",
            )
            return 1
    return 0


def _rendezvous(nodes: int) -> dict[str, Any]:
    """Where the processes meet: on a free port of this node, or at the first node of the Slurm step."""
    if nodes == 1:
        return {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    listed, number = os.environ.get("SLURM_STEP_NODELIST"), os.environ.get("SLURM_NODEID")
    if listed is None or number is None or os.environ.get("SLURM_STEP_NUM_NODES") != str(nodes):
        raise ConfigError(
            f"--nodes {nodes}: start it on each of them by `srun --nodes {nodes} --ntasks {nodes} "
            "cryodrgn-pipeline train …` inside a Slurm job"
        )
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    port = PORTS[int(os.environ["SLURM_JOB_ID"]) % len(PORTS)]
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{_address_of_first(listed)}:{port}",
        "rdzv_configs": {"rank": int(number)},
        "run_id": step,
    }


def _address_of_first(nodes: str) -> str:
    """The address of the first node of a Slurm list such as `gpu[03,07-09]`."""
    first = _said_by_scontrol("show", "hostnames", nodes).split()[0]
    record = _said_by_scontrol("-o", "show", "node", first).split()
    return next(word.removeprefix("NodeAddr=") for word in record if word.startswith("NodeAddr="))


def _said_by_scontrol(*words: str) -> str:
    done = subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"scontrol {' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout
