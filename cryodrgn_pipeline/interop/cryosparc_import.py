"""Maps into cryoSPARC by its own job, Import 3D Volumes, instead of outputs of the external job."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from cryodrgn_pipeline.errors import ExternalJobError
from cryodrgn_pipeline.interop.cryosparc_client import Connection, outputs_of, talking
from cryodrgn_pipeline.interop.cryosparc_job import BUILDING, COMPLETED, MAP_FOLDER, ExternalJob

log = logging.getLogger(__name__)

JOB_TYPE = "import_volumes"
ENDED = ("completed", "failed", "killed")
WAIT_S, POLL_S = 900.0, 3.0


def import_maps(
    connection: Connection,
    workspace: str,
    external: ExternalJob,
    expected: int,
    known: str | None,
    remember: Callable[[str], None],
) -> str:
    """Run Import 3D Volumes on the maps in an external job's folder, and wait until it has ended.

    Parameters
    ----------
    expected
        How many maps there are.
    known
        The import job of an earlier push, which is cleared and run again; None makes one.
    remember
        Called with the uid of a new job as soon as it exists.

    Returns
    -------
    The uid of the import job; its outputs are imported_volume_1 … in the order of the maps' names.

    Raises
    ------
    ExternalJobError
        If it does not complete within 15 minutes, or holds another number of maps.
    """
    project = external.project
    job = None if known is None else connection.find_job(project, known)
    if job is None:
        folder = connection.project_folder(project) / external.uid / MAP_FOLDER
        job = connection.create_job(
            project,
            workspace,
            JOB_TYPE,
            {"volume_blob_path": f"{folder}/*_map.mrc"},
            f"cryodrgn_pipeline volumes of {external.uid}",
        )
        remember(job.uid)
    name = f"{project} {job.uid}"
    with talking(f"running {name}, {JOB_TYPE}"):
        if job.refresh().status != BUILDING:
            _wait(job)
            job.clear()
        job.queue()
        status = _wait(job)
    found = [o for o in outputs_of(job, connection.is_4).values() if o.kind == "volume" and o.rows]
    if status != COMPLETED or len(found) != expected:
        raise ExternalJobError(
            f"{name}, {JOB_TYPE}, is {status} with {len(found)} of {expected} maps; see its event log, then "
            "push again"
        )
    log.info("%d maps are in %s", expected, name)
    return str(job.uid)


def _wait(job: Any) -> str:
    """The status once the job has ended, or at the latest after `WAIT_S`."""
    until = time.monotonic() + WAIT_S
    while (status := str(job.refresh().status)) not in ENDED and time.monotonic() < until:
        time.sleep(POLL_S)
    return status
