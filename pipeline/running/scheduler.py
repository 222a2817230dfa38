"""The order in which stages are taken, branches of the graph beside each other. Called by the driver.

A stage is begun when all that it reads is done. One that uses Ray is given all of the site's resources, so
these take turns, in the main thread (Ray starts and hears of signals there); what needs no Ray runs beside,
in threads. When a stage fails, the others that run are let finish, since their results are kept, and nothing
new is begun. A signal reaches all of them by `context.check`.
"""

import threading
import time
from collections.abc import Callable, Sequence

from pipeline.planning.tasks import StageTask
from pipeline.running.stage_context import STAGE_THREAD
from pipeline.storage.lease import LeaseHeld
from stages.stops import LeaseLost

_STOP_PATIENCE_S = 60.0
"""How long a stopped command waits for stages in threads; they end with the process."""


class StageFailed(Exception):
    """A stage did not come to its end; `error` is what its code, a signal or a lost lease raised."""

    def __init__(self, task: StageTask, error: BaseException):
        self.task, self.error = task, error
        super().__init__(f"{task.name}: {error}")


class Branches:
    """Takes the stages of a pipeline with `take`, which brings one of them to done or raises."""

    def __init__(self, tasks: Sequence[StageTask], take: Callable[[StageTask], None]):
        self._take, self._names = take, {task.name for task in tasks}
        self._waiting, self._running = list(tasks), dict[str, threading.Thread | None]()
        self._done, self._failed = set[str](), list[StageFailed]()
        self._change, self._stopped = threading.Condition(), False
        self._at = tasks[0]
        """What a signal met: the stage of the main thread, or the one begun last."""

    def take_all(self) -> None:
        """Raise StageFailed when a stage did not come to its end; of several, what stops the run first."""
        try:
            while (mine := self._next()) is not None:
                self._run(mine)
        except (KeyboardInterrupt, SystemExit) as stop:
            self._wait_for_threads(_STOP_PATIENCE_S)
            raise StageFailed(self._at, stop) from stop
        if self._failed:
            raise min(self._failed, key=lambda one: _ORDER.index(_kind(one.error)))

    def _next(self) -> StageTask | None:
        """The stage for the main thread; None when there is nothing more to do. Others begin beside it."""
        with self._change:
            while True:
                self._start_beside()
                ready = self._ready()
                if ready:
                    return self._begin(ready[0], None)
                if not self._running:
                    return None
                self._change.wait()

    def _start_beside(self) -> None:
        """Begin in threads what needs no Ray, but for a single stage, which the main thread takes."""
        ready = [task for task in self._ready() if not task.spec.needs_ray]
        if len(self._ready()) == 1 and not self._running:
            return
        for task in ready:
            thread = threading.Thread(
                target=self._run, args=(task,), name=f"{STAGE_THREAD}{task.name}", daemon=True
            )
            self._begin(task, thread)
            thread.start()

    def _ready(self) -> list[StageTask]:
        if self._failed or self._stopped:
            return []
        return [task for task in self._waiting if self._names.intersection(task.inputs) <= self._done]

    def _begin(self, task: StageTask, thread: threading.Thread | None) -> StageTask:
        self._waiting.remove(task)
        self._running[task.name] = thread
        self._at = task
        return task

    def _run(self, task: StageTask) -> None:
        error: BaseException | None = None
        try:
            self._take(task)
        except BaseException as raised:
            error = raised
        with self._change:
            del self._running[task.name]
            if error is None:
                self._done.add(task.name)
                self._start_beside()
            else:
                self._failed.append(StageFailed(task, error))
            self._change.notify_all()
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and isinstance(error, KeyboardInterrupt | SystemExit):
            self._at = task
            raise error

    def _wait_for_threads(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with self._change:
            self._stopped = True
            while self._running and time.monotonic() < deadline:
                self._change.wait(1.0)


_ORDER = ("stopped", "lost", "held", "failed")


def _kind(error: BaseException) -> str:
    if not isinstance(error, Exception):
        return "stopped"
    return "lost" if isinstance(error, LeaseLost) else "held" if isinstance(error, LeaseHeld) else "failed"
