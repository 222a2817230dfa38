"""One attempt at one stage: the context that its code gets, its metrics file and its log."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cluster.metric_lines import STEP_METRICS_FILE, MetricsWriter
from cluster.passwords import MaskingFormatter
from cluster.site import Site
from data_prep.records.config import RecordsConfig
from data_prep.records.repairs import Repairs
from pipeline.results.progress_file import ProgressWriter
from pipeline.running.signals import StopSignals
from pipeline.running.stage_inputs import InputFiles
from pipeline.storage.folder import FolderStorage
from pipeline.storage.lease import Lease
from pipeline.storage.lookup import storage_of
from pipeline.terminal.progress import Display, Progress
from stages.context import Context
from stages.parts import Parts
from stages.stops import LeaseLost
from vico.own_files import LogFile

STAGE_THREAD = "stage "
"""Start of the name of every thread that runs a stage beside the one in the main thread."""


@dataclass
class StageContext(Context):
    """The context of a real run. Stages may use it from several threads."""

    stage: str
    parts: Parts
    inputs: InputFiles
    site: Site
    leases: tuple[Lease, ...]
    signals: StopSignals
    display: Display
    _writing: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def _storage(self) -> FolderStorage:
        return storage_of(self.parts.folder)

    @cached_property
    def _progress_file(self) -> ProgressWriter:
        return ProgressWriter(self.parts.attempt_folder)

    @property
    def records(self) -> RecordsConfig:
        return self.inputs.records

    @property
    def heldout(self) -> RecordsConfig | None:
        return self.inputs.heldout

    @property
    def repaired(self) -> Repairs | None:
        return self.inputs.repaired

    def folder(self, name: str) -> Path:
        return self.inputs.folders[name]

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        with self._writing, MetricsWriter(self.parts.attempt_folder / STEP_METRICS_FILE) as writer:
            writer.append(int(step), values)

    def progress(self, done: int, total: int, unit: str, figures: Mapping[str, float] | None = None) -> None:
        self.display.progress(self.stage, Progress(done, total, unit, figures or {}))
        with self._writing:
            self._progress_file.report(done, total, unit, figures or {})

    def note(self, text: str) -> None:
        self.display.line(f"{self.stage}: {text}")

    def check(self) -> None:
        self.signals.check()
        self._storage.check_sharing(self.parts.folder)
        for lease in self.leases:
            if lease.lost:
                raise LeaseLost(f"another driver has taken over {lease.folder}")


@contextmanager
def logging_to(path: Path, *, of_stage: bool = False) -> Iterator[None]:
    """Also write INFO and higher to `path`. With `of_stage`, skip records of stages in other threads."""
    handler = LogFile(path)
    if of_stage:
        stage_thread = threading.current_thread().name
        handler.addFilter(lambda record: _is_of_stage(stage_thread, record.threadName or ""))
    formatter = MaskingFormatter("%(asctime)s driver %(levelname)s %(name)s: %(message)s")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


def _is_of_stage(stage_thread: str, thread: str) -> bool:
    """Return whether a record of `thread` belongs to the stage in `stage_thread`.

    A stage's helper threads have any name, so only the threads of other stages are excluded.
    """
    if thread == stage_thread:
        return True
    return not thread.startswith(STAGE_THREAD) and (thread != "MainThread" or stage_thread == "MainThread")
