"""One attempt at one stage: the context its code sees, its metrics file and its log."""

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cluster.passwords import MaskingFormatter
from cluster.site import Site
from data_prep.records.config import RecordsConfig
from pipeline.progress import Display
from pipeline.running.signals import StopSignals
from pipeline.storage.folder import FolderStorage
from pipeline.storage.lease import Lease
from pipeline.storage.lookup import storage_of
from stages.parts import Parts
from stages.stops import LeaseLost

STAGE_THREAD = "stage "
"""What the name of a thread begins with in which a stage runs beside that of the main thread."""


@dataclass
class StageContext:
    """The runner's stages.context.Context."""

    stage: str
    parts: Parts
    inputs: Mapping[str, Path | RecordsConfig | None]
    site: Site
    leases: tuple[Lease, ...]
    signals: StopSignals
    display: Display
    _writing: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def _storage(self) -> FolderStorage:
        return storage_of(self.parts.folder)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        entry = {
            "step": int(step),
            "time": time.time(),
            "metrics": {name: float(value) for name, value in metrics.items()},
        }
        path = self.parts.attempt_folder / "metrics.jsonl"
        with self._writing, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def progress(self, done: int, total: int, unit: str) -> None:
        self.display.progress(self.stage, done, total, unit)

    def note(self, text: str) -> None:
        self.display.line(f"{self.stage}: {text}")

    def check(self) -> None:
        self.signals.check()
        self._storage.check(self.parts.folder)
        for lease in self.leases:
            if lease.lost:
                raise LeaseLost(f"another driver has taken over {lease.folder}")


@contextmanager
def logging_to(path: Path, *, of_stage: bool = False) -> Iterator[None]:
    """Everything that is logged from INFO on also goes to this file; `of_stage`: but for what is of a stage
    that runs in another thread."""
    handler = logging.FileHandler(path, encoding="utf-8")
    if of_stage:
        own = threading.current_thread().name
        handler.addFilter(lambda record: _is_of(own, record.threadName or ""))
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


def _is_of(own: str, thread: str) -> bool:
    """Whether a line of a thread is of the stage in the thread `own`; helpers of a stage have any name."""
    if thread == own:
        return True
    return not thread.startswith(STAGE_THREAD) and (thread != "MainThread" or own == "MainThread")
