"""A Ray Jobs server: pack the project for it, submit a command to it, ask for the state of a job.

Used by submit, status and logs; Ray is imported only when a server is connected.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from cluster.project import PROJECT_FOLDER
from cluster.sources.in_worker import PACKAGES
from vico.errors import UserError, last_line, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
AGENT_START_S = 60.0
"""How long a server may have no agent after its head has started."""
JobState = Literal["pending", "running", "done", "failed", "cancelled", "unknown"]
STATES: dict[str, JobState] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "done",
    "FAILED": "failed",
    "STOPPED": "cancelled",
}


class JobStatus(NamedTuple):
    """The state of a job; `unknown` when the server does not answer or does not know the job."""

    state: JobState
    message: str = ""


def write_package(path: Path, files: Mapping[str, str]) -> None:
    """Write the project's sources and `files` (name -> text) as a zip; equal content gives equal bytes."""
    contents = {
        source.relative_to(PROJECT_FOLDER).as_posix(): source.read_bytes()
        for package in PACKAGES
        for source in sorted((PROJECT_FOLDER / package).rglob("*"))
        if source.is_file() and "__pycache__" not in source.parts
    }
    contents |= {name: text.encode() for name, text in files.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            member = zipfile.ZipInfo(name)  # with a fixed date
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(member, content)


class JobServer:
    """A Ray Jobs server that answers. Raises UserError when it does not answer, or refuses our token."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._client = self._connected()

    def submit(self, entrypoint: str, runtime_env: Mapping[str, Any], submission_id: str) -> None:
        """Submit a command. Retry for a minute while a head that has just started has no agent yet."""
        deadline = time.monotonic() + AGENT_START_S
        while True:
            try:
                self._client.submit_job(
                    entrypoint=entrypoint, runtime_env=dict(runtime_env), submission_id=submission_id
                )
                return
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(2)

    def status(self, submission_id: str) -> JobStatus:
        try:
            details = self._client.get_job_info(submission_id)
        except RuntimeError as error:
            return JobStatus(
                "unknown", f"{self.address} does not know job {submission_id}: {one_line(error)}"
            )
        return JobStatus(STATES[details.status.value], last_line(details.message or ""))

    def logs(self, submission_id: str) -> str:
        return self._client.get_job_logs(submission_id)

    def stop(self, submission_id: str) -> bool:
        """Ask a job to stop; return whether it was running."""
        return self._client.stop_job(submission_id)

    def _connected(self) -> JobSubmissionClient:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"jobs.address={self.address} is not the address of a Ray Jobs server; "
                "write it as http://HOST:8265"
            )
        no_answer = UserError(
            f"jobs.address={self.address}: no Ray Jobs server answers there; "
            "start one with `ray start --head`, or correct jobs.address in the site file"
        )
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=10).close()
        except (OSError, ValueError) as error:
            raise no_answer from error
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)  # it logs every upload

        try:
            with pinned_address(self.address):
                return JobSubmissionClient(self.address)
        except AuthenticationError as error:
            raise UserError(
                f"jobs.address={self.address}: the server refuses our token; give its token in "
                "RAY_AUTH_TOKEN or in ~/.ray/auth_token, with RAY_AUTH_MODE=token"
            ) from error
        except (ConnectionError, RuntimeError) as error:
            raise no_answer from error


@contextmanager
def pinned_address(address: str) -> Iterator[None]:
    """Stop RAY_ADDRESS from overriding the `address` that Ray's client is given."""
    before = os.environ.get(ADDRESS_VARIABLE)
    os.environ[ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        os.environ.pop(ADDRESS_VARIABLE)
        if before is not None:
            os.environ[ADDRESS_VARIABLE] = before
