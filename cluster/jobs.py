"""A Ray Jobs server: packing the project for it, handing a command to it, asking how the job stands.

Used by submit, status and logs; imports Ray only when a server is asked for.
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

from vico.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("vico", "data_prep", "cluster", "stages", "pipeline")
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
HEAD_STARTS_S = 60.0
"""How long a server may lack an agent after its head has started."""
JobState = Literal["pending", "running", "done", "failed", "cancelled", "unknown"]
STATES: dict[str, JobState] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "done",
    "FAILED": "failed",
    "STOPPED": "cancelled",
}


class JobStatus(NamedTuple):
    """How a job stands; `unknown` when the server cannot be asked or does not know the job."""

    state: JobState
    message: str = ""


def write_package(path: Path, files: Mapping[str, str]) -> None:
    """The project's sources and `files` (name -> text) as a zip; the same content gives the same bytes."""
    sources = {
        file.relative_to(PROJECT).as_posix(): file.read_bytes()
        for package in PACKAGES
        for file in sorted((PROJECT / package).rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**sources, **{name: text.encode() for name, text in files.items()}}.items():
            entry = zipfile.ZipInfo(name)  # with a fixed date
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, content)


class JobServer:
    """A Ray Jobs server that answers. Raises UserError when it does not, or refuses our token."""

    def __init__(self, address: str):
        self.address = address
        self._client = self._connected()

    def submit(self, entrypoint: str, runtime_env: Mapping[str, Any], submission_id: str) -> None:
        """Hand a command over. A head that has just started has no agent for it yet: then it tries again."""
        deadline = time.monotonic() + HEAD_STARTS_S
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
            found = self._client.get_job_info(submission_id)
        except RuntimeError as error:
            return JobStatus(
                "unknown", f"{self.address} does not know job {submission_id}: {one_line(error)}"
            )
        return JobStatus(STATES[found.status.value], last_line(found.message or ""))

    def logs(self, submission_id: str) -> str:
        return self._client.get_job_logs(submission_id)

    def stop(self, submission_id: str) -> bool:
        """Whether the job ran and was asked to end."""
        return self._client.stop_job(submission_id)

    def _connected(self) -> JobSubmissionClient:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"jobs.address={self.address} is no address of a Ray Jobs server; write it as http://HOST:8265"
            )
        no_answer = UserError(
            f"jobs.address={self.address}: no Ray Jobs server answers there; "
            "start one with `ray start --head`, or mend jobs.address in the site file"
        )
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=10).close()
        except (OSError, ValueError) as error:
            raise no_answer from error
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)  # tells of every upload

        try:
            with the_address(self.address):
                return JobSubmissionClient(self.address)
        except AuthenticationError as error:
            raise UserError(
                f"jobs.address={self.address}: the server refuses our token; give its token in "
                "RAY_AUTH_TOKEN or in ~/.ray/auth_token, with RAY_AUTH_MODE=token"
            ) from error
        except (ConnectionError, RuntimeError) as error:
            raise no_answer from error


@contextmanager
def the_address(address: str) -> Iterator[None]:
    """Keep Ray from putting RAY_ADDRESS in the place of the address that it is given."""
    before = os.environ.get(ADDRESS_VARIABLE)
    os.environ[ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        os.environ.pop(ADDRESS_VARIABLE)
        if before is not None:
            os.environ[ADDRESS_VARIABLE] = before


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def last_line(text: str) -> str:
    """The last line with something on it: Ray's messages end with the job's own last lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""
