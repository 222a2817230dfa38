"""What a running command shows: bars on a terminal, plain lines elsewhere, and lines in the run's log."""

import logging
import threading
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.terminal.output import Terminal, unfiltered
from vico.shown_text import printable

logger = logging.getLogger(__name__)
LINE_EVERY_S = 10.0
"""At least so long between two plain lines about the progress of a stage."""


class Display(AbstractContextManager["Display"]):
    """Lines and progress of one command on a stream.

    `progress` may be called from any thread and very often.
    """

    def __init__(self, stream: TextIO):
        self._terminal = Terminal(stream)
        self._console = _LastingConsole(file=unfiltered(stream), highlight=False)
        self._bars = _bars(self._console) if self._console.is_terminal else None
        self._lock = threading.Lock()
        self._stages: dict[str, _StageProgress] = {}

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars:
            self._bars.stop()

    def line(self, text: str) -> None:
        """Show one line and log it. If the terminal or pipe is gone, the run continues with the log alone."""
        logger.info("%s", text)
        with suppress(OSError):
            self._console.print(self._terminal.text(text), soft_wrap=True)

    def stage_started(self, stage: str, text: str) -> None:
        """Show one line and accept the stage's progress from now on."""
        self.line(text)
        with self._lock:
            self._stages[stage] = _StageProgress(last_line_s=time.monotonic())

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        """Update the stage's bar; every LINE_EVERY_S also write a line, to the stream or only to the log."""
        with self._lock:
            progress = self._stages.get(stage)
            if progress is None:
                return
            now = time.monotonic()
            # What was done before this command must not enter the rate.
            if not progress.started_s or progress.first_done == 0:
                progress.started_s, progress.first_done = now, done
            if self._bars:
                if progress.bar is None:
                    progress.bar = self._bars.add_task(
                        printable(stage), unit=printable(unit), completed=done, total=total
                    )
                self._bars.update(progress.bar, completed=done, total=total, unit=printable(unit))
            if now - progress.last_line_s < LINE_EVERY_S:
                return
            progress.last_line_s = now
            text = f"{stage}: {done}/{total} {unit}{progress.time_left(done, total, now)}"
        if self._bars:
            logger.info("%s", text)
        else:
            self.line(text)

    def stage_ended(self, stage: str, text: str) -> None:
        """Remove the stage's bar and show one line."""
        with self._lock:
            progress = self._stages.pop(stage, None)
            if self._bars and progress is not None and progress.bar is not None:
                self._bars.remove_task(progress.bar)
        self.line(text)


class _LastingConsole(Console):
    """Goes silent when its pipe breaks. Rich itself would end the process and close standard output."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


@dataclass
class _StageProgress:
    """What has been shown of a running stage; times are values of `time.monotonic`."""

    last_line_s: float
    started_s: float = 0.0
    first_done: int = 0
    bar: TaskID | None = None

    def time_left(self, done: int, total: int, now: float) -> str:
        num_done_here = done - self.first_done
        if num_done_here <= 0 or done >= total:
            return ""
        return f", about {duration((total - done) * (now - self.started_s) / num_done_here)} left"


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:12}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeRemainingColumn(),
        console=console,
    )


def duration(seconds: float) -> str:
    """Return a time as people write it: `4.2 s`, `3 min 12 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
