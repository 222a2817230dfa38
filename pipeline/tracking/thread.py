"""The driver's thread that keeps MLflow in agreement with a run. The runner starts and ends it."""

import logging
import threading
from pathlib import Path

from cluster.site import Site
from pipeline.results.runs import PIPELINE, Runs
from pipeline.storage.folder import Conflict
from pipeline.storage.lookup import storage_of
from pipeline.tracking.client import one_line
from pipeline.tracking.sent import STATE_FILE, SentState
from pipeline.tracking.sync import MlflowRuns

logger = logging.getLogger(__name__)
LONGEST_PAUSE_S = 60.0


def sync(site: Site, run_folder: Path) -> str | None:
    """Make MLflow agree with a run once; the line that says what it lacks, None if nothing."""
    tracker = Tracker(site.storage, site, run_folder)
    tracker.start()
    lacks = tracker.finish()
    if lacks is None:
        _share(run_folder, site)
    return lacks


def _share(run_folder: Path, site: Site) -> None:
    """Have other machines see in mlflow.json that MLflow has all: there is no driver to bring it to them."""
    state = SentState.of(run_folder, site.tracking_place)
    try:
        storage_of(run_folder).write(run_folder / STATE_FILE, state.content())
    except Conflict:
        logger.info("%s: another machine has told MLflow, too", run_folder.name)


class Tracker:
    """Keeps MLflow in agreement with a run from `start` to `finish`.

    What fails is logged once for each outage and tried again, less and less often.
    """

    def __init__(self, storage: Path, site: Site, run_folder: Path):
        self.site, self.run_folder = site, run_folder
        self._runs = Runs(storage)
        self._state = SentState.of(run_folder, site.tracking_place)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._sync_until_ending, name="mlflow", daemon=True)
        self._is_synced = False
        self._problem: str | None = None

    @property
    def run_id(self) -> str | None:
        """The MLflow run of the pipeline; None until it is there."""
        return self.stage_run_id(PIPELINE)

    def stage_run_id(self, stage: str) -> str | None:
        """The MLflow run of the stage; None until it is there."""
        sent = self._state.runs.get(stage)
        return sent.id if sent else None

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> str | None:
        """Sync once more, for at most `tracking.finish_timeout_s`; the line that says what MLflow lacks, None
        if nothing."""
        timeout_s = self.site.tracking.finish_timeout_s
        self._ending.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._problem = self._problem or f"no answer within tracking.finish_timeout_s={timeout_s:g}"
        if self._is_synced and self._problem is None:
            return None
        return (
            f"MLflow at {self.site.tracking_place} lacks the last of run {self.run_folder.name} "
            f"({self._problem}); the files of the run have it, and the same command sends it"
        )

    def _sync_until_ending(self) -> None:
        client: MlflowRuns | None = None
        num_failures = 0
        while True:
            is_last = self._ending.is_set()
            try:
                client = client or MlflowRuns(self.site, self._runs, self.run_folder, self._state)
                problem = client.sync()
            except Exception as error:
                problem = one_line(error)  # of a server, a database, a store: the run goes on in any case
            if problem and not num_failures:
                logger.warning("MLflow at %s: %s; goes on trying", self.site.tracking_place, problem)
            if num_failures and not problem:
                logger.info("MLflow at %s: in agreement again", self.site.tracking_place)
            num_failures = num_failures + 1 if problem else 0
            self._is_synced, self._problem = not problem, problem
            if is_last:
                return
            interval_s = self.site.tracking.interval_s
            self._ending.wait(min(interval_s * 2 ** min(num_failures, 10), max(interval_s, LONGEST_PAUSE_S)))
