"""A run that was submitted as a job: its submission in run.json, and how its server says it stands."""

import json
import os
import time
from typing import Any

from cluster.jobs import JobServer, JobStatus
from pipeline.results.runs import RunFile
from vico.errors import UserError

KIND = "ray-jobs"
JOB_VARIABLE = "VICO_JOB"
"""In the environment of a job: the id of its submission."""


def submission_now(submission: dict[str, Any] | None) -> dict[str, Any] | None:
    """The submission that a run has when this process works on it: its own where it is a job, none where the
    run's was handed to a job that this process is not."""
    if JOB_VARIABLE in os.environ:
        return json.loads(os.environ[JOB_VARIABLE])
    is_job = submission is not None and submission.get("kind") == KIND
    return None if is_job else submission


def submission_state(submission: dict[str, Any]) -> JobStatus:
    """How the job of a submission stands, by its server's word."""
    try:
        return JobServer(submission["address"]).status(submission["id"])
    except UserError as error:
        return JobStatus("unknown", str(error))


def as_job_stands(run: RunFile) -> RunFile:
    """The run in its true state also when its job ended and could not say so in run.json.

    It may have died before the driver started, or on a host that this one cannot look into. The server is
    asked only where that may be; when it cannot be, that is the run's `error`.
    """
    if run.state not in ("pending", "running") or not run.submission or run.submission.get("kind") != KIND:
        return run
    state, reason = submission_state(run.submission)
    if state == "unknown":
        return run.model_copy(update={"error": reason})
    if state in ("pending", "running"):
        return run
    ended = "cancelled" if state == "cancelled" else "failed"
    stages = {
        name: entry.model_copy(update={"state": "interrupted"}) if entry.state == "running" else entry
        for name, entry in run.stages.items()
    }
    error = f"job {run.submission['id']} {state} and did not end the run: {reason or 'no message'}"
    state = ended if run.state == "pending" else "interrupted"
    return run.model_copy(update={"state": state, "error": error, "stages": stages})


class JobWatch:
    """For following a run: says, every few seconds, when its job will write no more."""

    def __init__(self, every_s: float = 3.0, patience_s: float = 60.0):
        self.every_s, self.patience_s = every_s, patience_s
        self._asked_s = self._known_s = time.monotonic()

    def end(self, run: RunFile) -> str | None:
        """The line to end with when nothing more is to come, None as long as something may."""
        now = time.monotonic()
        if now - self._asked_s < self.every_s:
            return None
        stands = as_job_stands(run)
        self._asked_s = time.monotonic()
        if stands is run:
            self._known_s = self._asked_s
            return None
        if stands.state == run.state and (run.state == "running" or now - self._known_s < self.patience_s):
            return None
        return f"run {run.run}: {stands.state}: {stands.error}"
