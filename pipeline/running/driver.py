"""The work of one command on one run whose lease it holds: its stages, and a true state whatever happens.
Called by the runner.
"""

import logging
import os
import socket
import threading
from dataclasses import dataclass
from datetime import UTC, datetime

from cluster.passwords import without_passwords
from pipeline.planning.request import OpenPipeline, RunRequest
from pipeline.planning.tasks import StageTask
from pipeline.progress import Display
from pipeline.results.runs import RunAttempt, RunFile, Runs, State
from pipeline.running.hook import call_hook
from pipeline.running.jobs import submission_now
from pipeline.running.retries import RetriesLeft, disk_full
from pipeline.running.run_choice import enter_config
from pipeline.running.scheduler import Branches, StageFailed
from pipeline.running.services import Services
from pipeline.running.signals import StopSignals
from pipeline.running.stage_runner import StageRuns
from pipeline.storage.lease import Lease, LeaseHeld
from pipeline.tracking.sent import SentState
from stages.stops import Interrupted, LeaseLost
from vico.errors import Unreachable, UserError

logger = logging.getLogger(__name__)
_GOES_ON = "the same command goes on"


@dataclass(frozen=True)
class RunResult:
    """How a command ended: the run, its state, the exit code and, unless all is well, one line for the
    user."""

    run: str
    state: State
    storage: str
    exit_code: int = 0
    message: str = ""


class Driver:
    """One command's work on one run whose lease it holds."""

    def __init__(
        self,
        request: RunRequest,
        opened: OpenPipeline,
        runs: Runs,
        run: RunFile,
        lease: Lease,
        signals: StopSignals,
        display: Display,
    ):
        self.request, self.opened, self.runs, self.run = request, opened, runs, run
        self.lease, self.signals, self.display = lease, signals, display
        self.storage, self.address = request.site.storage, request.site.storage_address
        folder = runs.run_folder(run.run)
        model = opened.pipeline.config.inputs.model_folder
        self._services = Services(request.site, folder, model, signals, display)
        self._retries = RetriesLeft(request.site.retries)
        self._ending, self._ended = threading.Lock(), False
        self._begun: set[str] = set()
        """Stages whose attempt had begun when they failed."""

    def work(self) -> RunResult:
        """Take every stage to done; whatever happens, run.json says it, and what was started is shut down."""
        with self._services:
            try:
                result = self._stages()
            except LeaseLost as lost:
                result = RunResult(self.run.run, "interrupted", self.address, 1, str(lost))
            self.display.line(f"run {self.run.run}: {result.state}")
        if self._services.tracker is not None:
            self._enter_tracking_ids()
        self._tell_hook(result)
        return result

    def _tell_hook(self, result: RunResult) -> None:
        """After everything else: what it starts finds the run as it ended."""
        ending = {
            "run": result.run,
            "state": result.state,
            "storage": result.storage,
            "experiment": self.run.experiment,
            "message": result.message,
            "exit_code": result.exit_code,
        }
        fault = call_hook(self.request.site.hook, ending)
        if fault:
            self.display.line(fault)

    def _stages(self) -> RunResult:
        self._begin()
        self.signals.on_stop = self._note_stop
        stage_runs = StageRuns(
            self.opened.pipeline,
            self.request.site,
            self.runs,
            self.run,
            self.lease,
            self.opened.cache,
            forced=self.opened.forced,
            strict_code=self.request.strict_code,
            wait_s=self.request.wait_s,
            signals=self.signals,
            display=self.display,
            start_services=self._services.start,
            mlflow_run_id=self._services.stage_run_id,
        )
        branches = Branches(self.opened.pipeline.tasks, lambda task: self._take(task, stage_runs))
        try:
            branches.take_all()
        except StageFailed as failed:
            return self._ended_early(failed.task, failed.error)
        return self._end("done", 0, "")

    def _ended_early(self, task: StageTask, error: BaseException) -> RunResult:
        """The end of the run whose stage did not come to its own."""
        try:
            raise error
        except (Interrupted, KeyboardInterrupt, SystemExit) as stop:
            return self._stopped(task, stop)
        except LeaseHeld as held:
            return self._end("interrupted", 1, str(held))
        except LeaseLost:
            self._end("interrupted", 1, f"{task.name} was taken over")
            raise
        except UserError as error:
            self._mark_failed(task, error)
            return self._end("failed", 2, without_passwords(f"{task.name}: {error}"))
        except Exception as error:
            return self._failed(task, error)

    def _take(self, task: StageTask, stage_runs: StageRuns) -> None:
        """Bring a stage to done; what the site has retries for is begun again, from its last part."""
        while True:
            try:
                self.signals.check()
                stage_runs.take(task)
                return self.opened.cache.save()
            except (LeaseHeld, LeaseLost):
                raise
            except Exception as error:
                kind = self._retries.take(error)
                if kind is None:
                    self._note_failure(task)
                    raise
                message = (
                    f"{task.name}: {type(error).__name__}, tried again in {self._retries.pause_s:g} s "
                    f"(retries.{kind}: {self._retries.left(kind)} more)"
                )
                logger.warning("%s", message, exc_info=error)
                self.display.line(message)
                self.signals.wait(self._retries.pause_s)

    def _note_failure(self, task: StageTask) -> None:
        """A stage that failed is shown as that while others go on beside it."""
        entry = self.run.stages[task.name]
        if entry.state == "running":
            entry.state = "failed"
            self._begun.add(task.name)
            try:
                self.runs.save(self.run, self.lease)
            except (LeaseLost, OSError, UserError, Unreachable) as error:
                logger.warning("the failure of %s could not be noted: %s", task.name, error)

    def _begin(self) -> None:
        """Enter this command into run.json."""
        run, display = self.run, self.display
        going_on = bool(run.attempts)
        if going_on and run.state == "failed":
            for entry in run.stages.values():
                entry.forced = False  # asked for again after a failure, --force means it again
        run.submission = submission_now(run.submission)  # by how another job ends nobody is to judge this one
        kept = enter_config(run, self.opened.pipeline.config, is_tracked=self._is_tracked())
        run.state, run.error, run.site = "running", None, self.request.site.name
        for entry in run.stages.values():
            if entry.state != "done":
                entry.state = "pending"
        for attempt in run.attempts:
            if attempt.state == "running":
                attempt.state = "interrupted"
        run.attempts.append(RunAttempt(started=_now(), host=socket.gethostname(), pid=os.getpid()))
        self.runs.save(run, self.lease)
        display.line(f"run {run.run}: {'goes on' if going_on else 'starts'} in {self.address}")
        if kept:
            display.line(kept)
        forced = [name for name, entry in run.stages.items() if entry.forced and name in self.opened.forced]
        if forced:
            display.line(f"--force was followed before the crash: goes on with {', '.join(forced)}")

    def _is_tracked(self) -> bool:
        """Whether MLflow knows the run; it is not asked."""
        told = SentState.of(self.runs.run_folder(self.run.run), self.request.site.tracking_place)
        return self.run.mlflow_run_id is not None or bool(told.runs)

    def _enter_tracking_ids(self) -> None:
        """What the tracker learned at the end, when the server may have come back."""
        for name, entry in self.run.stages.items():
            if not entry.reused:
                entry.mlflow_run_id = self._services.stage_run_id(name) or entry.mlflow_run_id
        self.run.mlflow_run_id = self._services.tracker.run_id or self.run.mlflow_run_id
        try:
            self.runs.save(self.run, self.lease)
        except (LeaseLost, OSError, UserError, Unreachable) as error:
            logger.warning("run.json lacks the ids of MLflow: %s", error)

    def _stopped(self, task: StageTask, stop: BaseException) -> RunResult:
        number = self.signals.received(within_s=1.0)
        if number is None:
            return self._failed(task, RuntimeError(f"its code ended the process ({stop!r})"))
        return self._end("interrupted", 128 + number, f"stopped by {number.name}; {_GOES_ON}")

    def _note_stop(self) -> None:
        """Called from a thread: the state stands in run.json before the stage has come to a stop, since job
        servers kill some seconds after their signal."""
        with self._ending:
            if self._ended:
                return
            noted = self.run.model_copy(deep=True)
            _close(noted, "interrupted", f"stopped by a signal; {_GOES_ON}")
            try:
                self.runs.save(noted, self.lease)
            except (LeaseLost, UserError, Unreachable, OSError) as error:
                logger.warning("the stop could not be noted: %s", error)

    def _mark_failed(self, task: StageTask, error: Exception) -> None:
        """Also a stage that failed before its attempt began, as when Ray does not start."""
        entry = self.run.stages[task.name]
        if entry.state == "pending":
            entry.state = "failed"
            logger.error("%s: could not begin", task.name, exc_info=error)

    def _failed(self, task: StageTask, error: Exception) -> RunResult:
        begun = task.name in self._begun
        self._mark_failed(task, error)
        if disk_full(error):
            message = (
                f"{task.name}: no space left in storage={self.storage}; free some, then the same command"
            )
            return self._end("failed", 2, message)
        attempt = task.folder(self.storage).path / "attempts" / str(self.run.stages[task.name].attempt)
        log = (attempt if begun else self.runs.run_folder(self.run.run)) / "driver.log"
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else "no message"  # an error of a worker ends with what was raised there
        reason = without_passwords(reason)[:500]
        message = f"{task.name} failed: {type(error).__name__}: {reason}; see {log}"
        return self._end("failed", 1, message)

    def _end(self, state: State, exit_code: int, message: str) -> RunResult:
        """Write how it ended; first of all, since what follows a signal may be SIGKILL."""
        run = self.run
        with self._ending:
            self._ended = True
            _close(run, state, message)
            try:
                self.runs.save(run, self.lease)
            except (OSError, UserError, Unreachable) as error:
                if state == "done":
                    raise
                logger.error("run.json could not be told: %s", error)  # what broke the stage breaks this too
        if message:
            logger.error("%s", message)
        return RunResult(run.run, state, self.address, exit_code, message)


def _close(run: RunFile, state: State, message: str) -> None:
    """Enter the end of a command: the stage that ran ends as the command does."""
    run.state, run.error = state, message or None
    run.attempts[-1].state, run.attempts[-1].ended = state, _now()
    for entry in run.stages.values():
        if entry.state == "running":
            entry.state = state


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
