"""The interface of all launchers: what a job is, and what can be done with it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from cluster.site import Site

JOB_VARIABLE = "VICO_JOB"
"""In the environment of a job: its submission, as JSON."""
STOP_WAIT_S = 600
"""Ray kills a job 3 s after its stop unless told otherwise; ranks first publish a checkpoint."""
JobState = Literal["pending", "running", "done", "failed", "cancelled", "unknown"]


class JobStatus(NamedTuple):
    """The state of a job; `unknown` when the scheduler does not answer or does not know the job.

    `message` is the scheduler's own reason: why a job waits, failed or is unknown.
    """

    state: JobState
    message: str = ""


@dataclass(frozen=True)
class Job:
    """A command of `vico` for a cluster, with the files and the environment that it needs there."""

    name: str
    """Unique name: lower-case letters, digits and hyphens, at most 47 characters, as Kubernetes wants it."""
    arguments: tuple[str, ...]
    """Arguments of `vico`. Paths in it are relative to the folder that has `files`."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Path -> text, beside the project's sources."""
    submission: Mapping[str, Any] = field(default_factory=dict)
    """What is recorded about the job; the driver reads it from its environment."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables of the driver, without the site's own.

        Ray refuses a variable that both the job and `ray.init` set, and workers get the site's from there.
        """
        job = {JOB_VARIABLE: json.dumps(dict(self.submission))} if self.submission else {}
        return {"PYTHONUNBUFFERED": "1", **job}

    def command(self, site: Site, *options: str) -> list[str]:
        """Return the program that runs the job: it keeps a driver alive, see `driver_process.py`."""
        jobs = site.jobs
        python = sys.executable if site.kind == "local" else jobs.python
        restarts = [f"--restarts={jobs.restarts}", f"--pause={jobs.restart_pause_s:g}"]
        program = [python, "-m", "cluster.launchers.driver_process", *restarts, *options]
        return [*program, "--", python, "-m", "pipeline.cli", *self.arguments]

    def shell_command(self, site: Site) -> str:
        return shlex.join(self.command(site))


class Launcher(Protocol):
    """Sends jobs to one place, and asks and stops them there.

    A launcher is made from a site, or, without its settings, from what `place` returned when the job was
    submitted. Raises UserError when the place does not answer or refuses us.
    """

    kind: ClassVar[str]

    def place(self) -> dict[str, Any]:
        """Return what a later command needs to reach the jobs here, for run.json. No secrets."""

    def check(self) -> None:
        """Raise UserError if nothing can be submitted here. Writes nothing."""

    def render(self, job: Job) -> str:
        """Return what `submit` sends, as a text that a user can save and edit. Writes nothing."""

    def submit(self, job: Job) -> str:
        """Submit the job; return a few words about it. If it raises, no job is left behind."""

    def status(self, name: str) -> JobStatus:
        """Return the state of a job by the scheduler."""

    def logs(self, name: str) -> str:
        """Return what the job has printed, and what the scheduler says of it; "" if there is nothing yet."""

    def cancel(self, name: str) -> bool:
        """Stop a job and release what it holds; return False if it had ended already or is not known."""
