"""Tracking and Ray: started when a stage first needs them, stopped when the command ends."""

import threading
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.site import Site
from pipeline.planning.tasks import StageTask
from pipeline.running.run_command import RunCommand
from pipeline.terminal.progress import Display
from pipeline.tracking.sent import STATE_FILE, database_is_missing, is_complete

if TYPE_CHECKING:
    from pipeline.tracking.thread import TrackingThread


def send_missing(site: Site, run_folder: Path, display: Display) -> None:
    """Send MLflow what it still lacks of a run that has ended, and show that."""
    is_tracked = site.tracking.enabled and (run_folder / STATE_FILE).exists()
    if is_tracked and (database_is_missing(site) or not is_complete(run_folder, site)):
        from pipeline.tracking.thread import sync_once

        display.line(sync_once(site, run_folder) or f"run {run_folder.name}: MLflow now has all of it")


class Services(AbstractContextManager["Services"]):
    """The services of one command. Any thread may start tracking; Ray starts in the main thread."""

    def __init__(self, command: RunCommand, run_folder: Path):
        self._site, self._run_folder = command.site, run_folder
        self._model_folder = command.opened.pipeline.config.inputs.model_folder
        self._signals, self._display = command.signals, command.display
        self._closing, self._starting = ExitStack(), threading.Lock()
        self._has_ray = self._has_metrics = self._has_events = False
        self.tracker: TrackingThread | None = None
        """None before the first stage starts, and if the site has no tracking."""

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def start(self, task: StageTask) -> None:
        """Start tracking and, if the stage needs it, Ray."""
        with self._starting:
            if self.tracker is None and self._site.tracking.enabled:
                self.tracker = self._started_tracker()
            if self._site.metrics.port is not None and not self._has_metrics:
                self._serve_metrics(self._site.metrics.port)
            if not self._has_events and self._site.tracking.tensorboard:
                self._start_events()
        if task.spec.needs_ray and not self._has_ray:
            self._start_ray()
        if threading.current_thread() is threading.main_thread():
            self._signals.install()

    def stage_run_id(self, stage: str) -> str | None:
        """Return the id of a stage's MLflow run, None until MLflow has one."""
        return self.tracker.stage_run_id(stage) if self.tracker is not None else None

    def _started_tracker(self) -> "TrackingThread":
        from pipeline.tracking.thread import TrackingThread

        tracker = TrackingThread(self._site, self._run_folder)
        tracker.start()
        self._closing.callback(self._finish_tracking, tracker)
        return tracker

    def _start_events(self) -> None:
        from pipeline.tracking.tensorboard import TensorBoardThread

        events = TensorBoardThread(self._site.storage, self._run_folder)
        events.start()
        self._closing.callback(events.finish)
        self._has_events = True

    def _finish_tracking(self, tracker: "TrackingThread") -> None:
        """Send the rest to MLflow and show what it still lacks, which does not fail the run."""
        missing = tracker.finish()
        if missing:
            self._display.line(missing)

    def _serve_metrics(self, port: int) -> None:
        from pipeline.running.prometheus import serve_metrics

        self._closing.enter_context(
            serve_metrics(self._site, self._run_folder, self._site.metrics.host, port)
        )
        self._has_metrics = True

    def _start_ray(self) -> None:
        from cluster.ray_session import ray_session
        from cluster.shared_folders import refuse_unseen_folder, refuse_unseen_model

        self._closing.enter_context(ray_session(self._site))
        self._has_ray = True
        field = "storage" if self._site.remote is None else "work"
        refuse_unseen_folder(field, self._site.storage)
        refuse_unseen_model(self._model_folder)
