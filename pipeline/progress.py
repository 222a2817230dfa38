"""What a running command tells people: bars on a terminal, plain lines elsewhere, and always lines in the
run's log."""

import logging
import threading
import time
from contextlib import AbstractContextManager
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

LINE_EVERY_S = 10.0


class Display(AbstractContextManager):
    """Lines and progress of one command on a stream. `progress` may be called from any thread, as often as
    one likes."""

    def __init__(self, stream: TextIO):
        self._console = Console(file=stream, highlight=False)
        self._bars = _bars(self._console) if self._console.is_terminal else None
        self._lock = threading.Lock()
        self._stage: str | None = None
        self._task: TaskID | None = None
        self._started = self._last_line = 0.0
        self._first_done = 0

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars:
            self._bars.stop()

    def line(self, text: str) -> None:
        """One line, also in the log."""
        logger.info("%s", text)
        self._console.print(text, markup=False, soft_wrap=True)

    def stage_started(self, stage: str, text: str) -> None:
        self.line(text)
        with self._lock:
            self._stage, self._task, self._started = stage, None, 0.0
            self._last_line = time.monotonic()

    def progress(self, done: int, total: int, unit: str) -> None:
        with self._lock:
            if self._stage is None:
                return
            now = time.monotonic()
            if not self._started or self._first_done == 0:  # what was done before would spoil the rate
                self._started, self._first_done = now, done
            if self._bars:
                self._show(done, total, unit)
            if now - self._last_line < LINE_EVERY_S:
                return
            self._last_line = now
            text = f"{self._stage}: {done}/{total} {unit}{self._time_left(done, total, now)}"
        if self._bars:
            logger.info("%s", text)
        else:
            self.line(text)

    def stage_ended(self, text: str) -> None:
        with self._lock:
            if self._bars and self._task is not None:
                self._bars.remove_task(self._task)
            self._stage = self._task = None
        self.line(text)

    def _show(self, done: int, total: int, unit: str) -> None:
        if self._task is None:
            self._task = self._bars.add_task(self._stage, unit=unit, completed=done, total=total)
        self._bars.update(self._task, completed=done, total=total, unit=unit)

    def _time_left(self, done: int, total: int, now: float) -> str:
        moved = done - self._first_done
        if moved <= 0 or done >= total:
            return ""
        return f", about {duration((total - done) * (now - self._started) / moved)} left"


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        console=console,
    )


def duration(seconds: float) -> str:
    """A time for people: `4.2 s`, `3 min 12 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
