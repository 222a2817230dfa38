"""What a running command tells people: bars on a terminal, plain lines elsewhere, and always lines in the
run's log."""

import logging
import threading
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)
LINE_EVERY_S = 10.0


class Display(AbstractContextManager):
    """Lines and progress of one command on a stream. `progress` may be called from any thread, as often as
    one likes."""

    def __init__(self, stream: TextIO):
        self._console = _LastingConsole(file=stream, highlight=False)
        self._bars = _bars(self._console) if self._console.is_terminal else None
        self._lock = threading.Lock()
        self._stages: dict[str, _Shown] = {}

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars:
            self._bars.stop()

    def line(self, text: str) -> None:
        """One line, also in the log. A terminal or pipe that is gone ends nothing: the run goes on, or comes
        to its stop, by the log."""
        logger.info("%s", text)
        with suppress(OSError):
            self._console.print(text, markup=False, soft_wrap=True)

    def stage_started(self, stage: str, text: str) -> None:
        self.line(text)
        with self._lock:
            self._stages[stage] = _Shown(last_line_s=time.monotonic())

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        with self._lock:
            shown = self._stages.get(stage)
            if shown is None:
                return
            now = time.monotonic()
            if not shown.started_s or shown.first_done == 0:  # what was done before would spoil the rate
                shown.started_s, shown.first_done = now, done
            if self._bars:
                self._show(stage, shown, done, total, unit)
            if now - shown.last_line_s < LINE_EVERY_S:
                return
            shown.last_line_s = now
            text = f"{stage}: {done}/{total} {unit}{shown.time_left(done, total, now)}"
        if self._bars:
            logger.info("%s", text)
        else:
            self.line(text)

    def stage_ended(self, stage: str, text: str) -> None:
        with self._lock:
            shown = self._stages.pop(stage, None)
            if self._bars and shown is not None and shown.bar is not None:
                self._bars.remove_task(shown.bar)
        self.line(text)

    def _show(self, stage: str, shown: "_Shown", done: int, total: int, unit: str) -> None:
        if shown.bar is None:
            shown.bar = self._bars.add_task(stage, unit=unit, completed=done, total=total)
        self._bars.update(shown.bar, completed=done, total=total, unit=unit)


class _LastingConsole(Console):
    """Silent once its pipe is broken, where rich would end the process and close its standard output too."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@dataclass
class _Shown:
    """A stage that runs, as far as people were told of it."""

    last_line_s: float
    started_s: float = 0.0
    first_done: int = 0
    bar: TaskID | None = None

    def time_left(self, done: int, total: int, now: float) -> str:
        moved = done - self.first_done
        if moved <= 0 or done >= total:
            return ""
        return f", about {duration((total - done) * (now - self.started_s) / moved)} left"


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
