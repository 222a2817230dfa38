"""What a command starts when a stage needs it, and stops at its end: tracking, Ray. Called by the driver."""

import threading
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from cluster.site import Site
from pipeline.planning.tasks import StageTask
from pipeline.progress import Display
from pipeline.running.signals import StopSignals


class Services(AbstractContextManager):
    """Both stay until it is closed. Threads may start tracking; Ray is the main thread's."""

    def __init__(self, site: Site, run_folder: Path, model: Path, signals: StopSignals, display: Display):
        self._site, self._run_folder, self._model = site, run_folder, model
        self._signals, self._display = signals, display
        self._closing, self._starting = ExitStack(), threading.Lock()
        self._ray = False
        self.tracker: Any = None
        """None before anything was to be tracked."""

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def start(self, task: StageTask) -> None:
        """Start tracking and, for a stage that needs it, Ray."""
        with self._starting:
            if self.tracker is None and self._site.tracking.enabled:
                from pipeline.tracking.thread import Tracker

                self.tracker = Tracker(self._site.storage, self._site, self._run_folder)
                self.tracker.start()
                self._closing.callback(self._finish_tracking)
        if task.spec.needs_ray and not self._ray:
            from cluster.ray_session import ray_session, refuse_unseen_folder, refuse_unseen_model

            self._closing.enter_context(ray_session(self._site))
            self._ray = True
            field = "storage" if self._site.remote is None else "work"
            refuse_unseen_folder(field, self._site.storage)
            refuse_unseen_model(self._model)
        if threading.current_thread() is threading.main_thread():
            self._signals.install()

    def stage_run_id(self, stage: str) -> str | None:
        """The MLflow run of a stage; None until it is there."""
        return self.tracker.stage_run_id(stage) if self.tracker is not None else None

    def _finish_tracking(self) -> None:
        """The last word to MLflow; what it lacks is said, and is no failure of the run."""
        lacks = self.tracker.finish()
        if lacks:
            self._display.line(lacks)
