"""Kind `ray`: jobs of a Ray Jobs server. Ray is imported only when a server is connected."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import yaml

from cluster.launchers.archive import write_package
from cluster.launchers.launcher import STOP_WAIT_S, Job, JobState, JobStatus
from cluster.site import Site
from vico.errors import UserError, last_line, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
AGENT_START_S = 60.0
"""How long a server may have no agent after its head has started."""
STATES: dict[str, JobState] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "done",
    "FAILED": "failed",
    "STOPPED": "cancelled",
}
_GIB = 1 << 30


class RayJobs:
    """A Ray Jobs server."""

    kind: ClassVar[str] = "ray-jobs"

    def __init__(self, address: str, site: Site | None = None) -> None:
        self.address, self._site = address, site
        self._connection: JobSubmissionClient | None = None

    @property
    def site(self) -> Site:
        assert self._site is not None, "a launcher without a site submits nothing"
        return self._site

    def place(self) -> dict[str, Any]:
        return {"address": self.address}

    def check(self) -> None:
        self._client()

    def render(self, job: Job) -> str:
        runtime_env = {"working_dir": "PACKAGE.zip", **self._runtime_env(job)}
        content = {"entrypoint": self._entrypoint(job), "runtime_env": runtime_env, **self._resources()}
        parts = [
            f"# to {self.address}",
            yaml.safe_dump(content, width=1000, sort_keys=False).rstrip(),
            *(f"# PACKAGE.zip/{name}\n{text.rstrip()}" for name, text in job.files.items()),
        ]
        return "\n\n".join(parts)

    def submit(self, job: Job) -> str:
        """Submit a job. Retry for a minute while a head that has just started has no agent yet."""
        with tempfile.TemporaryDirectory(prefix="vico-submit-") as folder:
            package = Path(folder, "package.zip")
            write_package(package, job.files, with_sources=self.site.jobs.code == "archive")
            options = {
                "entrypoint": self._entrypoint(job),
                "runtime_env": {"working_dir": str(package), **self._runtime_env(job)},
                "submission_id": job.name,
                **self._resources(),
            }
            try:
                with self._faults():
                    self._submit(options)
            except BaseException as error:
                self._cancel_leftover(job.name)
                if isinstance(error, RuntimeError):
                    raise UserError(
                        f"jobs.address={self.address}: the server refuses the job ({one_line(error)}); "
                        "correct the jobs block of the site"
                    ) from error
                raise
            return f"with a package of {package.stat().st_size / 1000:.0f} kB to {self.address}"

    def status(self, name: str) -> JobStatus:
        try:
            with self._faults():
                details = self._client().get_job_info(name)
        except RuntimeError as error:
            return JobStatus("unknown", f"{self.address} does not know job {name}: {one_line(error)}")
        return JobStatus(STATES[details.status.value], last_line(details.message or ""))

    def logs(self, name: str) -> str:
        try:
            with self._faults():
                return self._client().get_job_logs(name)
        except RuntimeError as error:
            return f"{self.address} has no log of job {name}: {one_line(error)}"

    def cancel(self, name: str) -> bool:
        if self.status(name).state not in ("pending", "running"):
            return False
        try:
            with self._faults():
                return self._client().stop_job(name)
        except RuntimeError as error:
            raise UserError(
                f"RUN: {self.address} does not stop job {name}: {one_line(error)}; try again"
            ) from error

    def _runtime_env(self, job: Job) -> dict[str, Any]:
        return {
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **job.environment()},
        }

    def _entrypoint(self, job: Job) -> str:
        variables = [f"{name}={text}" for name, text in self.site.environment.items()]
        command = job.command(self.site)
        return shlex.join(["env", *variables, *command] if variables else command)

    def _resources(self) -> dict[str, Any]:
        """Return what Ray reserves for the entry point. A job without any runs on the head node."""
        driver = self.site.jobs.driver
        options = {
            "entrypoint_num_cpus": driver.cpus,
            "entrypoint_memory": int(driver.memory_gib * _GIB),
            "entrypoint_resources": driver.custom,
        }
        return {name: value for name, value in options.items() if value}

    def _submit(self, options: dict[str, Any]) -> None:
        deadline = time.monotonic() + AGENT_START_S
        while True:
            try:
                self._client().submit_job(**options)
                return
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(2)

    def _cancel_leftover(self, name: str) -> None:
        """Stop a job whose submission was interrupted after the server had it."""
        try:
            self.cancel(name)
        except UserError as error:
            logging.getLogger(__name__).warning("job %s may be left on %s: %s", name, self.address, error)

    def _client(self) -> JobSubmissionClient:
        if self._connection is None:
            self._connection = self._connected()
        return self._connection

    def _connected(self) -> JobSubmissionClient:
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"jobs.address={self.address} is not the address of a Ray Jobs server; "
                "write it as http://HOST:8265"
            )
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=10).close()
        except (OSError, ValueError) as error:
            raise self._no_answer() from error
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)  # it logs every upload

        try:
            with self._faults(), pinned_address(self.address):
                return JobSubmissionClient(self.address)
        except RuntimeError as error:
            raise self._no_answer() from error

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Raise a refused token, and a server that goes away, as UserError."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UserError(
                f"jobs.address={self.address}: the server refuses our token; give its token in "
                "RAY_AUTH_TOKEN or in ~/.ray/auth_token, with RAY_AUTH_MODE=token"
            ) from error
        except OSError as error:  # errors of `requests` are among them
            raise self._no_answer() from error

    def _no_answer(self) -> UserError:
        return UserError(
            f"jobs.address={self.address}: no Ray Jobs server answers there; "
            "start one with `ray start --head`, or correct jobs.address in the site file"
        )


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
