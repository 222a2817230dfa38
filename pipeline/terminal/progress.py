"""What a running command shows: bars on a terminal, plain lines elsewhere, and lines in the run's log."""

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from cluster.passwords import without_passwords
from pipeline.terminal.output import Terminal, unfiltered
from pipeline.terminal.tables import wrapped_lines
from vico.errors import one_line
from vico.shown_text import printable

logger = logging.getLogger(__name__)
LINE_EVERY_S = 10.0
"""At least so long between two plain lines about the progress of a stage."""
_FIGURES = {
    "loss": "loss {:.3g}",
    "learning_rate": "lr {:.1e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "tiles_per_second": "{:,.0f} tiles/s",
}
"""Figure of a training -> how it is shown."""
_OWN_LOGGERS = ("vico.", "data_prep.", "cluster.", "stages.", "pipeline.")
_WIDE = 100
"""Columns from which a terminal gets a bar beside the numbers."""


@dataclass(frozen=True)
class Progress:
    """How far a stage is, and the newest figures of a training (`loss`, `learning_rate`, ...)."""

    done: int
    total: int
    unit: str
    figures: Mapping[str, float] = field(default_factory=dict)

    def counts(self) -> str:
        return f"{self.done}/{self.total} {self.unit}"


def figures_text(figures: Mapping[str, float], separator: str = ", ") -> str:
    """Return the figures of a training as text, such as `loss 0.412, lr 2.9e-04, 1,240 tokens/s`."""
    return separator.join(form.format(figures[name]) for name, form in _FIGURES.items() if name in figures)


class Display(AbstractContextManager["Display"]):
    """Lines and progress of one command on a stream.

    `progress` may be called from any thread and very often.
    """

    def __init__(self, stream: TextIO):
        self._terminal = Terminal(stream)
        self._console = _LastingConsole(file=unfiltered(stream), highlight=False)
        self._bars = _bars(self._console) if self._console.is_terminal else None
        self._warnings = _WarningLines(self)
        self._lock = threading.Lock()
        self._stages: dict[str, _StageProgress] = {}

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self._warnings)
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger().removeHandler(self._warnings)
        if self._bars:
            with self._lock:  # the bars of stages that did not end would stay on the terminal
                for stage in self._stages.values():
                    if stage.bar is not None:
                        self._bars.remove_task(stage.bar)
                self._stages.clear()
            self._bars.stop()

    def line(self, text: str) -> None:
        """Show one line and log it. If the terminal or pipe is gone, the run continues with the log alone."""
        logger.info("%s", text)
        self.show(text)

    def show(self, text: str) -> None:
        """Show one line that is in the log already; a terminal gets it wrapped between words."""
        width = self._console.width
        # Masked first: a secret may have more than one word.
        shown = printable(without_passwords(text))
        lines = wrapped_lines(shown, width) if self._console.is_terminal else []
        with suppress(OSError):
            for line in lines or [shown]:
                self._console.print(self._terminal.drawn(line, width), soft_wrap=True)

    def stage_started(self, stage: str, text: str) -> None:
        """Show one line and accept the stage's progress from now on."""
        self.line(text)
        with self._lock:
            self._stages[stage] = _StageProgress(last_line_s=time.monotonic())

    def progress(self, stage: str, new: Progress) -> None:
        """Update the stage's bar; every LINE_EVERY_S also write a line, to the stream or only to the log."""
        with self._lock:
            progress = self._stages.get(stage)
            if progress is None:
                return
            now = time.monotonic()
            # What was done before this command, or was other work, must not enter the rate.
            if not progress.started_s or progress.first_done == 0 or progress.unit != new.unit:
                progress.started_s, progress.first_done, progress.unit = now, new.done, new.unit
            left_s = progress.seconds_left(new, now)
            if self._bars:
                self._update_bar(stage, progress, new, left_s)
            if now - progress.last_line_s < LINE_EVERY_S:
                return
            progress.last_line_s = now
            left = None if left_s is None else f"about {duration(left_s)} left"
            parts = [f"{stage}: {new.counts()}", figures_text(new.figures), left]
            text = ", ".join(part for part in parts if part)
        if self._bars:
            logger.info("%s", text)
        else:
            self.line(text)

    def _update_bar(
        self, stage: str, progress: "_StageProgress", new: Progress, left_s: float | None
    ) -> None:
        assert self._bars is not None
        texts: dict[str, Any] = {
            "counts": printable(new.counts()),
            "left": "" if left_s is None else f"{timedelta(seconds=round(left_s))} left",
            "figures": figures_text(new.figures, " "),
        }
        if progress.bar is None:
            progress.bar = self._bars.add_task(printable(stage), completed=new.done, total=new.total, **texts)
        else:
            self._bars.update(progress.bar, completed=new.done, total=new.total, **texts)

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
    unit: str = ""
    bar: TaskID | None = None

    def seconds_left(self, new: Progress, now: float) -> float | None:
        """Return the seconds that the rest takes at the speed so far; None if the speed is not known."""
        num_done_here = new.done - self.first_done
        if num_done_here <= 0 or new.done >= new.total:
            return None
        return (new.total - new.done) * (now - self.started_s) / num_done_here


class _WarningLines(logging.Handler):
    """Shows the warnings of this project on the terminal, each once; those of libraries are only in the log.

    Errors are left to the command, which ends with them.
    """

    def __init__(self, display: Display):
        super().__init__(logging.WARNING)
        self._display, self._shown = display, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = one_line(without_passwords(record.getMessage()), max_chars=None)
        if record.levelno != logging.WARNING or not record.name.startswith(_OWN_LOGGERS):
            return
        if text not in self._shown:
            self._shown.add(text)
            self._display.show(f"warning: {text}")


def _bars(console: Console) -> Bars:
    columns: list[ProgressColumn] = [TextColumn("{task.description:11}", markup=False)]
    if console.width >= _WIDE:
        columns.append(BarColumn(bar_width=20))
    fields = (f"{{task.fields[{name}]}}" for name in ("counts", "left", "figures"))
    columns += [TextColumn(field, markup=False) for field in fields]
    return Bars(*columns, console=console)


def duration(seconds: float) -> str:
    """Return a time as people write it: `4.2 s`, `3 min 12 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
