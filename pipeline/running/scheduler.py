"""The order in which stages run; independent branches of the graph run side by side. Called by the driver.

A stage starts when all that it reads is done. A stage that uses Ray gets all of the site's resources, so
these run one after another, in the main thread, where Ray must be started and receives signals. Stages that
need no Ray run beside them in threads. When a stage fails, the running ones finish, because their results
are kept, and no further stage starts. A signal reaches every stage through `context.check`.
"""

import threading
import time
from collections.abc import Callable, Sequence

from pipeline.planning.tasks import StageTask
from pipeline.running.stage_context import STAGE_THREAD
from pipeline.storage.leases import LeaseHeld
from stages.stops import LeaseLost

_STOP_PATIENCE_S = 60.0
"""How long a stopped command waits for stages in threads; after that they end with the process."""


class StageFailed(Exception):
    """A stage did not finish; `error` is what its code, a signal or a lost lease raised."""

    def __init__(self, task: StageTask, error: BaseException):
        self.task, self.error = task, error
        super().__init__(f"{task.name}: {error}")


class StageScheduler:
    """Runs the stages of a pipeline by `complete`, which brings one stage to done or raises."""

    def __init__(self, tasks: Sequence[StageTask], complete: Callable[[StageTask], None]):
        self._complete, self._names = complete, {task.name for task in tasks}
        self._waiting, self._running = list(tasks), dict[str, threading.Thread | None]()
        self._done, self._failed = set[str](), list[StageFailed]()
        self._change, self._is_stopped = threading.Condition(), False
        self._current = tasks[0]
        """The stage that a signal would interrupt: that of the main thread, or the one that started last."""

    def run_all(self) -> None:
        """Run all stages. Raises StageFailed if one did not finish; of several, by `_PRECEDENCE`."""
        try:
            while (task := self._next_in_main_thread()) is not None:
                self._run(task)
        except (KeyboardInterrupt, SystemExit) as stop:
            self._wait_for_threads(_STOP_PATIENCE_S)
            raise StageFailed(self._current, stop) from stop
        if self._failed:
            raise min(self._failed, key=lambda failed: _PRECEDENCE.index(_kind(failed.error)))

    def _next_in_main_thread(self) -> StageTask | None:
        """Return the next stage for the main thread, None when all have ended; starts others in threads."""
        with self._change:
            while True:
                self._start_threads()
                ready = self._ready()
                if ready:
                    return self._start(ready[0], None)
                if not self._running:
                    return None
                self._change.wait()

    def _start_threads(self) -> None:
        """Start the stages that need no Ray. One that would run alone is left to the main thread."""
        ready = self._ready()
        if len(ready) == 1 and not self._running:
            return
        for task in ready:
            if not task.spec.needs_ray:
                thread = threading.Thread(
                    target=self._run, args=(task,), name=f"{STAGE_THREAD}{task.name}", daemon=True
                )
                self._start(task, thread)
                thread.start()

    def _ready(self) -> list[StageTask]:
        if self._failed or self._is_stopped:
            return []
        return [task for task in self._waiting if self._names.intersection(task.inputs) <= self._done]

    def _start(self, task: StageTask, thread: threading.Thread | None) -> StageTask:
        self._waiting.remove(task)
        self._running[task.name] = thread
        self._current = task
        return task

    def _run(self, task: StageTask) -> None:
        error: BaseException | None = None
        try:
            self._complete(task)
        except BaseException as raised:
            error = raised
        with self._change:
            del self._running[task.name]
            if error is None:
                self._done.add(task.name)
                self._start_threads()
            else:
                self._failed.append(StageFailed(task, error))
            self._change.notify_all()
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and isinstance(error, KeyboardInterrupt | SystemExit):
            self._current = task
            raise error

    def _wait_for_threads(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with self._change:
            self._is_stopped = True
            while self._running and time.monotonic() < deadline:
                self._change.wait(1.0)


_PRECEDENCE = ("stopped", "lost", "held", "failed")


def _kind(error: BaseException) -> str:
    if not isinstance(error, Exception):
        return "stopped"
    return "lost" if isinstance(error, LeaseLost) else "held" if isinstance(error, LeaseHeld) else "failed"
