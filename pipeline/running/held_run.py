"""The run that a command works on, and every change of its run.json. Used by driver and stage runner."""

import getpass
import logging
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path

from pipeline.config.pipeline_file import PipelineConfig
from pipeline.planning.request import RunRequest
from pipeline.results.runs import RunAttempt, RunFile, Runs, State
from pipeline.running.jobs import current_submission, in_job
from pipeline.storage.lease import Lease
from stages.stops import LeaseLost
from vico.errors import Unreachable, UserError

logger = logging.getLogger(__name__)


class HeldRun:
    """A run whose lease this process holds. Threads may share it."""

    def __init__(self, runs: Runs, run: RunFile, lease: Lease):
        self.runs, self.run, self.lease = runs, run, lease
        self.failed_attempts = set[str]()
        """Stages that failed in an attempt of this command; the attempt's log has the traceback."""
        self._ending, self._is_ended = threading.Lock(), False

    @property
    def name(self) -> str:
        return self.run.run

    @property
    def folder(self) -> Path:
        return self.runs.run_folder(self.name)

    def save(self) -> None:
        """Write run.json. Raises LeaseLost when another driver has taken over the run."""
        self.runs.save(self.run, self.lease)

    def begin(self, config: PipelineConfig, request: RunRequest, *, is_tracked: bool) -> str | None:
        """Enter this command into run.json. Return a line for the user if a part of the config has no effect.

        `is_tracked`: whether MLflow knows the run.
        """
        run = self.run
        forget_forced(run)
        run.submission = current_submission(run.submission)  # not that of a job that has ended
        ignored = enter_config(run, config, is_tracked=is_tracked)
        run.state, run.error, run.site = "running", None, request.site.name
        run.accepted = run.accepted or request.accept
        if not in_job():  # the file in a job's package is a copy of the one that was given to `vico submit`
            run.site_file = request.site_file
        for entry in run.stages.values():
            if entry.state != "done":
                entry.state = "pending"
        for attempt in run.attempts:
            if attempt.state == "running":
                attempt.state = "interrupted"
        host, pid = socket.gethostname(), os.getpid()
        run.attempts.append(RunAttempt(started=_now(), host=host, pid=pid, user=user_name()))
        self.save()
        return ignored

    def note_stage_failure(self, stage: str) -> None:
        """Write that a stage failed, while other stages may still run."""
        entry = self.run.stages[stage]
        if entry.state == "running":
            entry.state = "failed"
            self.failed_attempts.add(stage)
            self._try_to_save(self.run, f"the failure of {stage}")

    def note_stop(self, message: str) -> None:
        """Write that the run is stopped, before its stages have stopped: job servers kill some seconds after
        their signal. Called from a thread."""
        with self._ending:
            if not self._is_ended:
                stopped = self.run.model_copy(deep=True)
                _close(stopped, "interrupted", message)
                self._try_to_save(stopped, "the stop")

    def end(self, state: State, message: str) -> None:
        """Write how the command ended. Comes before everything else, since SIGKILL may follow a signal.

        Raises LeaseLost; for a run that is done, also what writing raises.
        """
        with self._ending:
            self._is_ended = True
            _close(self.run, state, message)
            try:
                self.save()
            except (OSError, UserError, Unreachable) as error:
                if state == "done":
                    raise
                logger.error(
                    "run.json could not be written: %s", error
                )  # what broke the stage breaks this too

    def enter_tracking_ids(self, run_id: str | None, stage_run_ids: dict[str, str | None]) -> None:
        """Write the ids of MLflow's runs, which it may have given only at the end, after an outage."""
        for name, entry in self.run.stages.items():
            if not entry.reused:
                entry.mlflow_run_id = stage_run_ids[name] or entry.mlflow_run_id
        self.run.mlflow_run_id = run_id or self.run.mlflow_run_id
        self._try_to_save(self.run, "the ids of MLflow")

    def _try_to_save(self, run: RunFile, change: str) -> None:
        try:
            self.runs.save(run, self.lease)
        except (LeaseLost, OSError, UserError, Unreachable) as error:
            logger.warning("run.json lacks %s: %s", change, error)


def forget_forced(run: RunFile) -> None:
    """Make --force take effect again on a run that failed; else a stage is forced once per run."""
    if run.state == "failed":
        for entry in run.stages.values():
            entry.forced = False


def enter_config(run: RunFile, config: PipelineConfig, *, is_tracked: bool) -> str | None:
    """Give a resumed run the config of this command, which has the same fingerprints: paths may be different.
    Return a line for the user if a part of the config has no effect.

    If MLflow knows the run, only `inputs` and `quality_gate` change: MLflow writes experiment and params
    once.
    """
    resolved = config.resolved()
    if not is_tracked:
        run.config, run.experiment = resolved, config.experiment
        return None
    now = {key: resolved[key] for key in ("inputs", "quality_gate")}
    run.config = {**resolved, **run.config, **now}
    if config.experiment == run.experiment:
        return None
    return f"run {run.run}: experiment={config.experiment} is for new runs; MLflow has it in {run.experiment}"


def _close(run: RunFile, state: State, message: str) -> None:
    """Enter the end of a command; stages that ran end in the same state."""
    run.state, run.error = state, message or None
    run.attempts[-1].state, run.attempts[-1].ended = state, _now()
    for entry in run.stages.values():
        if entry.state == "running":
            entry.state = state


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def user_name() -> str:
    """Return the login name of this process, or its number where it has none, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
