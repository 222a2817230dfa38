"""A run that was submitted as a job: its submission in run.json, and its state by its scheduler."""

import json
import os
import time
from pathlib import Path
from typing import Any

from cluster.launchers.by_kind import KINDS, RESTARTING_KINDS, launcher_of_submission
from cluster.launchers.launcher import JOB_VARIABLE, JobStatus
from cluster.project import PROJECT_FOLDER
from cluster.sources.driver import driver_code
from pipeline.results.runs import ENDED, RunFile, State
from pipeline.storage.leases import STALE_S, holder_at_work
from vico.errors import UserError


def in_job() -> bool:
    return JOB_VARIABLE in os.environ


def current_submission(submission: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the submission of a run that this process works on.

    In a job it is the job's own. Outside of a job it is None if the run was submitted as one.
    """
    if in_job():
        return json.loads(os.environ[JOB_VARIABLE])
    return None if is_job(submission) else submission


def is_job(submission: dict[str, Any] | None) -> bool:
    """Return whether a submission is a job that a launcher of this version can reach."""
    return submission is not None and submission.get("kind") in KINDS


def refuse_other_code() -> None:
    """Raise UserError if this process imports packages from several places, or is a job with other code than
    was submitted."""
    code = driver_code()
    submission = current_submission(None) or {}
    if submission.get("code") not in (None, code["digest"]):
        raise UserError(
            f"job {submission['id']} imports its code from {PROJECT_FOLDER}, and that is not what was "
            "submitted; take other copies of vico off the cluster's PYTHONPATH, then submit again"
        )


def job_status(submission: dict[str, Any]) -> JobStatus:
    """Return the status of a submission's job by its scheduler; `unknown` if that does not answer."""
    try:
        return launcher_of_submission(submission).status(submission["id"])
    except UserError as error:
        return JobStatus("unknown", str(error))


def may_go_on(run: RunFile) -> bool:
    """Return whether a job may still write to the run: it waits or works, or its scheduler starts it again
    after a failure."""
    if run.submission is None or not is_job(run.submission):
        return False
    if run.state in ("pending", "running"):
        return True
    return run.state in ("failed", "interrupted") and run.submission["kind"] in RESTARTING_KINDS


def with_job_state(run: RunFile) -> RunFile:
    """Return the run in its true state, also if its job ended without writing the end into run.json.

    The job may have died before the driver started, or on a host that this one cannot look into, or wait for
    another start. The scheduler is asked only if that is possible. If it does not answer, or says why the job
    waits, the run's `error` says so.
    """
    if run.submission is None or not may_go_on(run):
        return run
    return _by_job(run, job_status(run.submission))


def _by_job(run: RunFile, job: JobStatus) -> RunFile:
    """Return the run with the state of its job."""
    assert run.submission is not None
    is_over = run.state in ENDED
    if job.state == "unknown":
        return run if is_over else run.model_copy(update={"error": job.message})
    if job.state == "running":
        return run.model_copy(update={"state": "pending", "error": _after(run, job)}) if is_over else run
    if job.state == "pending":
        return run.model_copy(update={"state": "pending", "error": _after(run, job) or run.error})
    if is_over:
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


def _after(run: RunFile, job: JobStatus) -> str | None:
    """Return why a job waits, with what ended its last start."""
    past = f"after: {run.error}" if run.state in ENDED and run.error else ""
    return "; ".join(text for text in (job.message, past) if text) or None


class DriverEnd:
    """For following a run: whether the driver of a run that ended has let go of it, so that `vico gc` or
    another command may follow at once.

    The driver still sends metrics and stops Ray. One that cannot be seen from here and keeps its lease is
    waited for STALE_S seconds at most.
    """

    def __init__(self, run_folder: Path):
        self._folder = run_folder
        self._since_s: float | None = None

    def has_come(self) -> bool:
        """Return whether there is nothing left to wait for. Ask only after the run has ended."""
        if holder_at_work(self._folder) is None:
            return True
        self._since_s = time.monotonic() if self._since_s is None else self._since_s
        return time.monotonic() - self._since_s >= STALE_S


class JobWatch:
    """For following a run: asks every few seconds why its job waits, and whether it will write no more."""

    def __init__(self, every_s: float = 3.0, patience_s: float = 60.0, start_timeout_s: float | None = None):
        self.every_s, self.patience_s, self.start_timeout_s = every_s, patience_s, start_timeout_s
        self._began_s = self._asked_s = self._answered_s = time.monotonic()
        self._shown = ""

    def look(self, run: RunFile) -> tuple[str | None, bool]:
        """Return (a line to show if there is one, whether no more will come).

        A pending run whose scheduler does not answer ends after `patience_s`, and one whose job still waits
        after `start_timeout_s`. A running one does not end: its driver writes to the storage without the
        scheduler.
        """
        # A job may work on a run that ended: submitted again, or its driver starts again after a failure.
        is_submitted = run.submission is not None and is_job(run.submission)
        if not may_go_on(run) and not (is_submitted and run.state in ("failed", "interrupted")):
            return None, run.state in ENDED
        now = time.monotonic()
        if now - self._asked_s < self.every_s:
            return None, False
        assert run.submission is not None
        job, self._asked_s = job_status(run.submission), time.monotonic()
        current = _by_job(run, job)
        line = f"run {run.run}: {current.state}: {current.error}"
        if job.state == "unknown":
            is_patient = run.state == "running" or now - self._answered_s < self.patience_s
            return (None, run.state in ENDED) if is_patient else (line, True)
        self._answered_s = self._asked_s
        if job.state in ("done", "failed", "cancelled"):
            return (None, True) if run.state in ENDED else (line, True)
        if job.state == "running":
            return None, False
        if self.start_timeout_s is not None and now - self._began_s > self.start_timeout_s:
            return f"{line}; it did not start within {self.start_timeout_s:g} s and keeps waiting", True
        is_news, self._shown = line != self._shown, line
        return (line, False) if is_news else (None, False)
