"""progress.json of an attempt: how far a running stage is, for `vico status` in another process."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pydantic import Field

from pipeline.json_files import StoredModel
from vico.errors import UserError

logger = logging.getLogger(__name__)
PROGRESS_FILE = "progress.json"
_WRITE_EVERY_S = 2.0


class ProgressFile(StoredModel):
    """How far an attempt is. Times are in seconds since 1970."""

    done: int
    total: int
    unit: str
    figures: dict[str, float] = Field(default_factory=dict)
    """The newest figures of a training: loss, learning_rate, tokens_per_second."""
    first_done: int
    """What was done already when this attempt first reported work of this unit."""
    started_s: float
    reported_s: float

    def seconds_left(self) -> float | None:
        """Return the seconds that the rest takes at the speed so far; None if the speed is not known."""
        done_here, seconds = self.done - self.first_done, self.reported_s - self.started_s
        if done_here <= 0 or seconds <= 0 or self.done >= self.total:
            return None
        return (self.total - self.done) * seconds / done_here

    @classmethod
    def of(cls, attempt_folder: Path) -> Self | None:
        """Return the file of an attempt; None if it is missing or cannot be read."""
        try:
            return cls.read(attempt_folder / PROGRESS_FILE, "it is written again")
        except (OSError, UserError):
            return None


@dataclass
class ProgressWriter:
    """Writes progress.json at most every two seconds. A folder that cannot be written costs no stage."""

    attempt_folder: Path
    _latest: ProgressFile | None = None
    _written_s: float = field(default=-_WRITE_EVERY_S)

    def report(self, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        """Note how far the stage is, and write it if it is due or all is done."""
        now = time.time()
        first = self._latest
        # what was done before, or was other work, must not enter the speed
        restarted = first is None or first.first_done == 0 or first.unit != unit
        self._latest = ProgressFile(
            done=done,
            total=total,
            unit=unit,
            figures=dict(figures),
            first_done=done if restarted or first is None else first.first_done,
            started_s=now if restarted or first is None else first.started_s,
            reported_s=now,
        )
        if done < total and time.monotonic() - self._written_s < _WRITE_EVERY_S:
            return
        self._written_s = time.monotonic()
        try:
            self._latest.write(self.attempt_folder / PROGRESS_FILE)
        except OSError as error:
            logger.info("%s is not written: %s", self.attempt_folder / PROGRESS_FILE, error)
