"""The driver's thread that keeps MLflow up to date during a run. The runner starts and ends it."""

import logging
import threading
from pathlib import Path

from cluster.site import Site
from pipeline.results.runs import PIPELINE, Runs
from pipeline.storage.folder import Conflict
from pipeline.storage.lookup import storage_of
from pipeline.tracking.client import error_line
from pipeline.tracking.sent import STATE_FILE, SentState
from pipeline.tracking.sync import RunSync

logger = logging.getLogger(__name__)
LONGEST_PAUSE_S = 60.0


def sync_once(site: Site, run_folder: Path) -> str | None:
    """Make MLflow agree with a run; return the line that says what it lacks, or None if nothing."""
    thread = TrackingThread(site, run_folder)
    thread.start()
    problem = thread.finish()
    if problem is None:
        _share_state(site, run_folder)
    return problem


def _share_state(site: Site, run_folder: Path) -> None:
    """Write mlflow.json to the storage, so that other machines see that MLflow has the run.

    During a run the driver does this.
    """
    state = SentState.of(run_folder, site)
    try:
        storage_of(run_folder).write(run_folder / STATE_FILE, state.content())
    except Conflict:
        logger.info("%s: another machine has updated MLflow too", run_folder.name)


class TrackingThread:
    """Keeps MLflow up to date with a run from `start` to `finish`.

    A failure is logged once per outage and retried after growing pauses; it never ends the run.
    """

    def __init__(self, site: Site, run_folder: Path):
        self.site, self.run_folder = site, run_folder
        self._runs = Runs(site.storage)
        self._state = SentState.of(run_folder, site)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._sync_until_ending, name="mlflow", daemon=True)
        self._is_synced = False
        self._problem: str | None = None

    @property
    def run_id(self) -> str | None:
        """Return the id of the pipeline's MLflow run; None until it exists."""
        return self.stage_run_id(PIPELINE)

    def stage_run_id(self, stage: str) -> str | None:
        """Return the id of the stage's MLflow run; None until it exists."""
        sent = self._state.runs.get(stage)
        return sent.id if sent else None

    def start(self) -> None:
        """Start the thread. First note that MLflow lacks the run, in case it is not reached at all."""
        self._state.complete = False
        try:
            self._state.write(self.run_folder / STATE_FILE)
        except OSError as error:
            logger.warning("%s is not written: %s", self.run_folder / STATE_FILE, error)
        self._thread.start()

    def finish(self) -> str | None:
        """Sync once more, for at most `tracking.finish_timeout_s`.

        Returns the line that says what MLflow lacks, or None if nothing.
        """
        timeout_s = self.site.tracking.finish_timeout_s
        self._ending.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._problem = self._problem or f"no answer within tracking.finish_timeout_s={timeout_s:g}"
        if self._is_synced and self._problem is None:
            return None
        return (
            f"MLflow at {self.site.tracking_address} lacks the latest data of run {self.run_folder.name} "
            f"({self._problem}); the files of the run have it, and the same command sends it"
        )

    def _sync_until_ending(self) -> None:
        run_sync: RunSync | None = None
        num_failures = 0
        while True:
            is_last = self._ending.is_set()
            try:
                run_sync = run_sync or RunSync(self.site, self._runs, self.run_folder, self._state)
                problem = run_sync.sync()
            except Exception as error:  # of a server, a database or a store: the run continues in any case
                problem = error_line(error)
            if problem and not num_failures:
                logger.warning("MLflow at %s: %s; trying again later", self.site.tracking_address, problem)
            if num_failures and not problem:
                logger.info("MLflow at %s: up to date again", self.site.tracking_address)
            num_failures = num_failures + 1 if problem else 0
            self._is_synced, self._problem = not problem, problem
            if is_last:
                return
            interval_s = self.site.tracking.interval_s
            self._ending.wait(min(interval_s * 2 ** min(num_failures, 10), max(interval_s, LONGEST_PAUSE_S)))
