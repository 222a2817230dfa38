"""Event files for TensorBoard, written beside a run: `tracking.tensorboard: true`.

A thread of the driver follows the metric files, as tracking does, and writes
`runs/<run>/tensorboard/<stage>`; `tensorboard --logdir <storage>/runs` shows all runs. Metric files decide:
each command writes the events of its run from the start, so a resumed training shows every step once.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.results.attempt_metrics import GrowingMetrics
from pipeline.results.runs import RunFile, Runs
from pipeline.storage.lookup import storage_of
from vico.errors import one_line

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

logger = logging.getLogger(__name__)
FOLDER = "tensorboard"
_EVERY_S = 2.0
_VALUES_AT_ONCE = 10_000
_PARTS = (
    ("_validation", re.compile("validation_.+")),
    ("_speed", re.compile("seconds_.+|.+_per_second|tflops_per_rank|peak_memory_bytes")),
    ("_data", re.compile("(.+_)?(tokens|tiles|samples|packs)(_per_pack)?|fill_rate|share_.+")),
)
"""Part of a stage's metrics -> their names. The others, such as the loss, are of the stage itself."""


def tag(stage: str, name: str) -> str:
    """Return the tag of a metric: its name below the heading under which TensorBoard shows it.

    Without headings, each metric would be one of its own. Stages have different ones, because metrics of
    one name would share a chart, and the losses of two stages have different units. Names of system metrics
    begin with their own heading.
    """
    if "/" in name:
        return name
    part = next((part for part, names in _PARTS if names.fullmatch(name)), "")
    return f"{stage}{part}/{name}"


class StageEvents:
    """The events of one stage, from all its attempts: of a step that was done twice, the first.

    `events` is their folder, named after the stage; a stage without metrics has none.
    """

    def __init__(self, events: Path, attempts: Path):
        shutil.rmtree(events, ignore_errors=True)
        self._events = events
        self._writer: SummaryWriter | None = None
        self._metrics = GrowingMetrics(attempts, storage_of(attempts).shared_bytes)
        self._written: set[tuple[str, int]] = set()

    def write_new(self) -> None:
        """Write what was added to the metric files since the last call."""
        while lines := self._metrics.unread(_VALUES_AT_ONCE):
            writer = self._writer = self._writer or self._new_writer()
            for line in (line.content for line in lines if line.content is not None):
                for name, value in line.metrics.items():
                    if (name, line.step) not in self._written:
                        self._written.add((name, line.step))
                        writer.add_scalar(tag(self._events.name, name), value, line.step, line.time_s)
            self._metrics.take(lines)
        if self._writer:
            self._writer.flush()

    def _new_writer(self) -> SummaryWriter:
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self._events), flush_secs=int(_EVERY_S))

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class TensorBoardThread:
    """Writes the events of a run's stages from `start` to `finish`; a failure never ends the run."""

    def __init__(self, storage: Path, run_folder: Path):
        self._storage, self._run_folder = storage, run_folder
        self._stages: dict[str, StageEvents] = {}
        self._ending = threading.Event()
        self._has_warned = False
        self._thread = threading.Thread(target=self._follow, name="tensorboard", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Write the rest and end."""
        self._ending.set()
        self._thread.join()

    def _follow(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ending.wait(_EVERY_S)
            try:
                self._write(Runs(self._storage).named(self._run_folder.name))
            except Exception as error:  # of a full disk or a storage: the run continues in any case
                if not self._has_warned:
                    logger.warning("no TensorBoard events for now: %s", one_line(error))
                self._has_warned = True
        for events in self._stages.values():
            events.close()

    def _write(self, run: RunFile) -> None:
        """Write the events of every stage that this run has made or is making."""
        for name, entry in run.stages.items():
            if entry.attempt == 0 or (entry.reused and entry.reused_from != run.run):
                continue
            if name not in self._stages:
                attempts = self._storage / name / entry.fingerprint / "attempts"
                self._stages[name] = StageEvents(self._run_folder / FOLDER / name, attempts)
            self._stages[name].write_new()
