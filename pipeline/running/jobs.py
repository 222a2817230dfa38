"""A run that was submitted as a job: its submission in run.json, and its state by the job server."""

import json
import os
import time
from typing import Any

from cluster.jobs import JobServer, JobStatus
from cluster.project import PROJECT_FOLDER
from cluster.sources.driver import driver_code
from pipeline.results.runs import RunFile, State
from vico.errors import UserError

KIND = "ray-jobs"
JOB_VARIABLE = "VICO_JOB"
"""In the environment of a job: its submission, as JSON."""


def in_job() -> bool:
    return JOB_VARIABLE in os.environ


def current_submission(submission: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the submission of a run that this process works on.

    In a job it is the job's own. Outside of a job it is None if the run was submitted as one.
    """
    if in_job():
        return json.loads(os.environ[JOB_VARIABLE])
    is_job = submission is not None and submission.get("kind") == KIND
    return None if is_job else submission


def refuse_other_code() -> None:
    """Raise UserError if this process imports packages from several places, or is a job with other code than
    was submitted."""
    code = driver_code()
    submission = current_submission(None) or {}
    if submission.get("code", code["digest"]) != code["digest"]:
        raise UserError(
            f"job {submission['id']} imports its code from {PROJECT_FOLDER}, and that is not what was "
            "submitted; take other copies of vico off the cluster's PYTHONPATH, then submit again"
        )


def job_status(submission: dict[str, Any]) -> JobStatus:
    """Return the status of a submission's job by its server; `unknown` if the server does not answer."""
    try:
        return JobServer(submission["address"]).status(submission["id"])
    except UserError as error:
        return JobStatus("unknown", str(error))


def with_job_state(run: RunFile) -> RunFile:
    """Return the run in its true state, also if its job ended without writing the end into run.json.

    The job may have died before the driver started, or on a host that this one cannot look into. The server
    is asked only if that is possible. If it does not answer, the run's `error` says so.
    """
    if run.state not in ("pending", "running") or not run.submission or run.submission.get("kind") != KIND:
        return run
    job = job_status(run.submission)
    if job.state == "unknown":
        return run.model_copy(update={"error": job.message})
    if job.state in ("pending", "running"):
        return run
    job_end: State = "cancelled" if job.state == "cancelled" else "failed"
    stages = {
        name: entry.model_copy(update={"state": "interrupted"}) if entry.state == "running" else entry
        for name, entry in run.stages.items()
    }
    reason = job.message or "no message"
    error = f"job {run.submission['id']} {job.state} and did not end the run: {reason}"
    state: State = job_end if run.state == "pending" else "interrupted"
    return run.model_copy(update={"state": state, "error": error, "stages": stages})


class JobWatch:
    """For following a run: asks every few seconds whether its job will write no more."""

    def __init__(self, every_s: float = 3.0, patience_s: float = 60.0):
        self.every_s, self.patience_s = every_s, patience_s
        self._asked_s = self._answered_s = time.monotonic()

    def end(self, run: RunFile) -> str | None:
        """Return the last line to show if no more will come, else None.

        A pending run whose server does not answer ends after `patience_s`. A running one does not end: its
        driver writes to the storage without the server.
        """
        now = time.monotonic()
        if now - self._asked_s < self.every_s:
            return None
        current = with_job_state(run)
        self._asked_s = time.monotonic()
        if current is run:
            self._answered_s = self._asked_s
            return None
        is_patient = run.state == "running" or now - self._answered_s < self.patience_s
        if current.state == run.state and is_patient:
            return None
        return f"run {run.run}: {current.state}: {current.error}"
