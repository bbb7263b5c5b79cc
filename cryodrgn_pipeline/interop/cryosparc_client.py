"""A connection to cryoSPARC through its own client, cryosparc-tools 5 or 4.7.

Which of the two it is, only this module and `cryosparc_job` know.
Credentials never pass through here: the client takes them from its environment variables
(`CRYOSPARC_BASE_URL`, `CRYOSPARC_EMAIL`, `CRYOSPARC_PASSWORD`; 4.7: `CRYOSPARC_LICENSE_ID`,
`CRYOSPARC_MASTER_HOSTNAME`, `CRYOSPARC_BASE_PORT` and the two last) or, from 5 on, from its own login.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from cryodrgn_pipeline.errors import CryodrgnPipelineError, ExternalJobError

log = logging.getLogger(__name__)

T = TypeVar("T")
ATTEMPTS = 3
PAUSE_S = 1.0
BLOCK_BYTES = 2**20
JOBS_AT_MOST = 1000
SILENT_RETRY = r"\*\*\* "
CONNECTION_WORDS = ("*** API client", "URL Error", "did not reply")
NOT_AUTHORIZED = 401
LOG_IN = "log in with `python -m cryosparc.tools login`, or set CRYOSPARC_EMAIL and CRYOSPARC_PASSWORD"
OTHER_VERSION = r"(?s).*may not be compatible"


class ConnectionLostError(ExternalJobError):
    """The connection broke; whether the request was carried out is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """An output of a job: its type, such as `particle`; each slot's dtype by its name; its rows."""

    kind: str
    slots: dict[str, str]
    rows: int


@contextmanager
def talking(about: str) -> Iterator[None]:
    """Turn all that the client raises, and its silent retries, into one error that names the request.

    When a connection breaks, the client sends a stream that is half spent once more and returns as if all
    were well; the warning that it gives on the way counts as a failure here.

    Raises
    ------
    ConnectionLostError
        If the connection broke.
    ExternalJobError
        If cryoSPARC, or the client, refused.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=SILENT_RETRY)
        try:
            yield
        except CryodrgnPipelineError:
            raise
        except Exception as error:  # the client raises anything, from AssertionError to httpx's own
            kind = ConnectionLostError if _is_connection(error) else ExternalJobError
            raise kind(f"cryoSPARC, {about}: {_reason(error)}") from error


def _is_connection(error: Exception) -> bool:
    if isinstance(error, Warning):
        return any(word in str(error) for word in CONNECTION_WORDS)
    return isinstance(error, ConnectionError) or type(error).__module__.startswith("httpx")


def _reason(error: Exception) -> str:
    data, code = getattr(error, "data", None), getattr(error, "code", None)
    told = data.get("detail", data) if isinstance(data, dict) else data
    text = f"{told} (HTTP {code})" if told else str(error) or type(error).__name__
    text = " ".join(text.split())
    return f"{text}; {LOG_IN}" if code == NOT_AUTHORIZED else text


def repeated(about: str, request: Callable[[], T]) -> T:
    """Make a request that may be carried out twice; where the connection broke again, three times at most."""
    for attempt in range(1, ATTEMPTS):
        try:
            with talking(about):
                return request()
        except ConnectionLostError as error:
            log.warning("%s; attempt %d of %d follows", error, attempt + 1, ATTEMPTS)
            time.sleep(PAUSE_S * attempt)
    with talking(about):
        return request()


class Connection:
    """What this package asks of cryoSPARC, in the words of either version of its client."""

    def __init__(self, client: Any, tools_version: str) -> None:
        self.client = client
        self.tools_version = tools_version
        self.is_4 = tools_version.startswith("4.")

    @classmethod
    def open(cls) -> Connection:
        """Connect with the client's own credentials.

        Raises
        ------
        ExternalJobError
            If there is no client, no credentials, no answer, or a cryoSPARC of another version.
        """
        try:
            from cryosparc import __version__ as tools_version
            from cryosparc.tools import CryoSPARC
        except ImportError as error:
            raise ExternalJobError(
                "the package cryosparc-tools is needed; install the version of your cryoSPARC, such as "
                "`pip install 'cryosparc-tools~=5.0.0'`"
            ) from error
        is_4 = tools_version.startswith("4.")
        known = {} if is_4 or _has_address() else {"base_url": _only_login()}
        try:
            with talking(f"connecting with cryosparc-tools {tools_version}"):
                warnings.filterwarnings("error", message=OTHER_VERSION)
                return cls(CryoSPARC(**known), tools_version)
        except ExternalJobError as error:
            told, its_cure, _ = str(error).partition(" To install a compatible version")
            if its_cure:
                told += (
                    " Install the client of that version in an environment of its own, and name its command "
                    "line as `executable` under `cryosparc:` in config.yaml"
                )
            raise ExternalJobError(told) from None  # what 4.7 raised holds the password

    def project_folder(self, project: str) -> Path:
        """Where a project lies on cryoSPARC's own file system."""
        with talking(f"looking for project {project}"):
            found = self.client.find_project(project)
            return Path(str(found.dir() if self.is_4 else found.dir))

    def outputs(self, project: str, job: str) -> dict[str, Output]:
        """All outputs of a job by name."""
        with talking(f"looking for job {project} {job}"):
            return outputs_of(self.client.find_job(project, job), self.is_4)

    def load(self, project: str, job: str, output: str, slots: Sequence[str] = ()) -> Any:
        """An output as a `cryosparc.dataset.Dataset`: these slots, or all, joined by uid."""
        everything: Any = [] if self.is_4 else "all"
        return repeated(
            f"loading {output} of {project} {job}",
            lambda: self.client.find_job(project, job).load_output(output, slots=list(slots) or everything),
        )

    def create_external_job(self, project: str, workspace: str, title: str, description: str) -> Any:
        """A new external job, as the client's own object."""
        with talking(f"creating a job in {project} {workspace}"):
            return self.client.create_external_job(project, workspace, title=title, desc=description)

    def create_job(
        self, project: str, workspace: str, kind: str, parameters: Mapping[str, Any], title: str
    ) -> Any:
        """A new job of one of cryoSPARC's own types, as the client's own object."""
        with talking(f"creating a job {kind} in {project} {workspace}"):
            return self.client.create_job(project, workspace, kind, params=dict(parameters), title=title)

    def find_job(self, project: str, job: str, *, external: bool = False) -> Any | None:
        """A job as the client's own object; None where it is gone."""
        find = self.client.find_external_job if external else self.client.find_job
        try:
            with talking(f"looking for job {project} {job}"):
                found = find(project, job).refresh()
        except ConnectionLostError:
            raise
        except ExternalJobError as error:
            self.project_folder(project)  # raises where it is not the job that cannot be found
            log.warning("%s", error)
            return None
        deleted = found.doc.get("deleted") if self.is_4 else found.model.deleted
        return None if deleted else found

    def find_by_description(self, project: str, workspace: str, mark: str) -> Any | None:
        """A late external job whose description holds `mark`; a client of 4.x cannot look for it: None."""
        if self.is_4:
            return None
        with talking(f"looking for jobs of {project} {workspace}"):
            found = self.client.find_jobs(project, workspace, type="snowflake", order=-1)
            for job in islice(found, JOBS_AT_MOST):
                if mark in job.desc:
                    return self.client.find_external_job(project, job.uid)
        return None

    def stored_bytes(self, project: str, path: str, expected: int) -> int:
        """The size of a file of a project: seen on a shared file system, or counted while it is read."""
        seen = self.project_folder(project) / path
        if seen.is_file() and seen.stat().st_size == expected:  # NFS may still tell an old size
            return expected
        with talking(f"reading back {path} of {project}"), self.client.download(project, path) as stream:
            return sum(len(block) for block in iter(lambda: stream.read(BLOCK_BYTES), b""))


def outputs_of(job: Any, is_4: bool) -> dict[str, Output]:
    """The outputs that a job of the client's knows of."""
    if not is_4:
        return {
            name: Output(
                kind=output.type, slots={r.name: r.dtype for r in output.results}, rows=output.num_items
            )
            for name, output in job.outputs.items()
        }
    return {
        group["name"]: Output(
            kind=group["type"],
            slots={result["name"]: result["type"].rpartition(".")[2] for result in group["contains"]},
            rows=int(group["num_items"] or 0),
        )
        for group in job.doc["output_result_groups"]
    }


def output_of_kind(outputs: Mapping[str, Output], name: str, kind: str, where: str, cure: str = "") -> Output:
    """The output of this name and type; an `ExternalJobError` that lists what there is instead."""
    found = outputs.get(name)
    if found is None or found.kind != kind:
        there = ", ".join(f"{key} ({output.kind})" for key, output in outputs.items()) or "none"
        raise ExternalJobError(f"{where} has no {kind} output {name}; its outputs are {there}{cure}")
    return found


def _has_address() -> bool:
    names = ("CRYOSPARC_BASE_URL", "CRYOSPARC_MASTER_HOSTNAME", "CRYOSPARC_BASE_PORT")
    return any(os.environ.get(name) for name in names)


def _only_login() -> str:
    from cryosparc.auth import InstanceAuthSessions

    with talking("reading the client's logins"):
        urls = [url for url, sessions in InstanceAuthSessions.load().root.items() if sessions.root]
    if len(urls) != 1:
        told = f"logins for {', '.join(urls)}: choose one" if urls else "no address and no valid login"
        raise ExternalJobError(
            f"cryoSPARC: {told}; set CRYOSPARC_BASE_URL to the address that you open in the browser, and "
            f"{LOG_IN}"
        )
    return str(urls[0])
