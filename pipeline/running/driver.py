"""One command's work on one run: it runs the stages and keeps the true state in run.json, however it ends.

Read `Driver.work` for the whole run, and `StageRunner.complete` for one stage. Called by the runner.
"""

import logging

from cluster.passwords import without_passwords
from pipeline.identity.provenance import git_state
from pipeline.planning.tasks import StageTask
from pipeline.results.latest import link_results
from pipeline.results.run_summary import summary_lines
from pipeline.results.runs import State
from pipeline.running.held_run import HeldRun
from pipeline.running.hook import call_hook
from pipeline.running.retries import RetriesLeft, disk_full
from pipeline.running.run_command import RunCommand, RunResult
from pipeline.running.scheduler import StageFailed, StageScheduler
from pipeline.running.services import Services, send_missing
from pipeline.running.stage_runner import StageRunner
from pipeline.storage.leases import LeaseHeld
from pipeline.tracking.sent import SentState
from stages.stops import Interrupted, LeaseLost
from vico.errors import UserError, last_line

logger = logging.getLogger(__name__)
_HOW_TO_RESUME = "the same command resumes it"


class Driver:
    """One command's work on one run whose lease it holds."""

    def __init__(self, command: RunCommand, held: HeldRun):
        self.command, self.held = command, held
        self.site, self.display = command.site, command.display
        self.address = command.site.storage_address
        self._services = Services(command, held.folder)
        self._stages = StageRunner(command, held, self._services)
        self._retries = RetriesLeft(command.site.retries)

    def work(self) -> RunResult:
        """Run the stages that are not done, shut down what was started, and call the site's hook."""
        with self._services:
            try:
                result = self._run_stages()
            except LeaseLost as lost:
                result = RunResult(self.held.name, "interrupted", self.address, 1, str(lost))
            self.display.line(f"run {self.held.name}: {result.state}{self._until(result)}")
            if result.state == "done":
                self._show_results()
        if self._services.tracker is None and result.state == "done":
            send_missing(self.site, self.held.folder, self.display)  # a kill came after the last stage
        self._enter_tracking_ids()
        self._call_hook(result)
        return result

    def _run_stages(self) -> RunResult:
        """Return how the run ended. Raises LeaseLost when another driver has taken over the run."""
        self._begin()
        self.command.signals.on_stop = self._note_stop
        scheduler = StageScheduler(self.command.opened.pipeline.tasks, self._complete_stage)
        try:
            scheduler.run_all()
        except StageFailed as failed:
            return self._ended_early(failed.task, failed.error)
        return self._end("done", 0, "")

    def _until(self, result: RunResult) -> str:
        """Return words about the stages that --until left out of a run that is done."""
        until = self.command.request.until
        if until is None or result.state != "done":
            return ""
        return f" until {until}; without --until the same command runs the later stages"

    def _show_results(self) -> None:
        """Link the results to short paths and show the summary of the run."""
        link_results(self.held.run, self.site.storage)
        for line in summary_lines(self.held.run, self.site.storage, self.address):
            self.display.line(line)

    def _begin(self) -> None:
        """Enter this command into run.json and show whether it starts or resumes the run."""
        run, config = self.held.run, self.command.opened.pipeline.config
        verb = "resumes" if run.attempts else "starts"
        ignored = self.held.begin(config, self.command.request, is_tracked=self._is_tracked())
        self.display.line(f"run {run.run}: {verb} in {self.address}")
        git_error = git_state().get("error")
        if git_error:
            logger.warning("run %s: commit and patch of the code are not recorded: %s", run.run, git_error)
        if ignored:
            self.display.line(ignored)
        requested = self.command.opened.forced
        forced = [name for name, entry in run.stages.items() if entry.forced and name in requested]
        if forced:
            self.display.line(f"--force took effect before this command, so it resumes {', '.join(forced)}")

    def _complete_stage(self, task: StageTask) -> None:
        """Bring one stage to done. After a failure with retries left, resume it from its last part."""
        while True:
            try:
                self.command.signals.check()
                self._stages.complete(task)
                return self.command.opened.cache.save()
            except (LeaseHeld, LeaseLost):
                raise
            except Exception as error:
                kind = self._retries.take(error)
                if kind is None:
                    self.held.note_stage_failure(task.name)
                    raise
                message = (
                    f"{task.name}: {type(error).__name__}, tried again in {self._retries.pause_s:g} s "
                    f"(retries.{kind}: {self._retries.left(kind)} more)"
                )
                logger.warning("%s", message, exc_info=error)
                self.command.signals.wait(self._retries.pause_s)

    def _ended_early(self, task: StageTask, error: BaseException) -> RunResult:
        """Return the end of a run whose stage did not finish; `error` is what the stage raised."""
        try:
            raise error
        except (Interrupted, KeyboardInterrupt, SystemExit) as stop:
            return self._stopped(task, stop)
        except LeaseHeld as held:
            return self._end("interrupted", 1, str(held))
        except LeaseLost:
            self._end("interrupted", 1, f"{task.name} was taken over")
            raise
        except UserError as user_error:
            self._mark_failed(task, user_error)
            return self._end("failed", 2, without_passwords(f"{task.name}: {user_error}"))
        except Exception as failure:
            return self._failed(task, failure)

    def _stopped(self, task: StageTask, stop: BaseException) -> RunResult:
        number = self.command.signals.received(within_s=1.0)
        if number is None:
            return self._failed(task, RuntimeError(f"its code ended the process ({stop!r})"))
        return self._end("interrupted", 128 + number, f"stopped by {number.name}; {_HOW_TO_RESUME}")

    def _failed(self, task: StageTask, error: Exception) -> RunResult:
        self._mark_failed(task, error)
        if disk_full(error):
            message = (
                f"{task.name}: no space left in storage={self.site.storage}; "
                "free some space, then give the same command again"
            )
            return self._end("failed", 2, message)
        attempt = self.held.run.stages[task.name].attempt
        attempt_folder = task.folder(self.site.storage).path / "attempts" / str(attempt)
        log_folder = attempt_folder if task.name in self.held.failed_attempts else self.held.folder
        # The last line of a worker's error is what was raised there.
        reason = last_line(without_passwords(str(error))) or "no message"
        message = f"{task.name} failed: {type(error).__name__}: {reason}; see {log_folder / 'driver.log'}"
        return self._end("failed", 1, message)

    def _mark_failed(self, task: StageTask, error: Exception) -> None:
        """Mark a stage that failed before its attempt began, for example because Ray did not start."""
        entry = self.held.run.stages[task.name]
        if entry.state == "pending":
            entry.state = "failed"
            logger.error("%s: could not start", task.name, exc_info=error)

    def _end(self, state: State, exit_code: int, message: str) -> RunResult:
        self.held.end(state, message)
        if message:
            logger.error("%s", message)
        return RunResult(self.held.name, state, self.address, exit_code, message)

    def _note_stop(self) -> None:
        self.held.note_stop(f"stopped by a signal; {_HOW_TO_RESUME}")

    def _is_tracked(self) -> bool:
        """Return whether MLflow knows the run, by what was recorded here; MLflow is not asked."""
        sent = SentState.of(self.held.folder, self.site)
        return self.held.run.mlflow_run_id is not None or bool(sent.runs)

    def _enter_tracking_ids(self) -> None:
        if self._services.tracker is not None:
            stage_run_ids = {name: self._services.stage_run_id(name) for name in self.held.run.stages}
            self.held.enter_tracking_ids(self._services.tracker.run_id, stage_run_ids)

    def _call_hook(self, result: RunResult) -> None:
        """Call the hook last, so that a program that it starts sees the run as it ended."""
        ending: dict[str, str | int] = {
            "run": result.run,
            "state": result.state,
            "storage": result.storage,
            "experiment": self.held.run.experiment,
            "message": result.message,
            "exit_code": result.exit_code,
        }
        call_hook(self.site.hook, ending)
