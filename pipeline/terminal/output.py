"""Output of the commands: every text for people passes `Terminal`, every answer for programs `print_json`.

Nothing else writes to the terminal; a test looks for other writers. What libraries and tracebacks write goes
through a `PlainStream`, which `main` puts in the place of the standard streams.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from cluster.passwords import without_passwords
from vico.shown_text import json_line, printable, printable_lines

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from pipeline.terminal.tables import Cell, TextTable

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CURSOR_OF_BARS = re.compile(r"[\r\n]*(\x1b\[A)*")
_ANY_WIDTH = 10_000
"""Columns for rich if the output is not a terminal, so that no line of a table breaks."""
View: TypeAlias = "Sequence[str | TextTable]"
"""Lines and tables, one below the other."""


class Terminal:
    """Writes to one stream. Texts may come from anywhere: they are obeyed by nobody, and shown as they are
    except for secrets, which `cluster/passwords.py` takes out."""

    def __init__(self, stream: TextIO):
        self._stream = unfiltered(stream)
        self.is_terminal = self._stream.isatty()

    def line(self, text: object) -> None:
        """Write one line; a line feed in it is shown as `\\n`."""
        self._write(printable(without_passwords(str(text))))

    def lines(self, text: str) -> None:
        """Write a text of several lines."""
        self._write(printable_lines(without_passwords(text)))

    def wrapped(self, text: str) -> None:
        """Write one line; on a terminal it wraps, and its rest is indented below its beginning."""
        from pipeline.terminal.tables import wrapped_lines

        line = printable(without_passwords(text))
        if self.is_terminal and line:
            line = "\n".join(wrapped_lines(line, get_terminal_size().columns))
        self._write(line)

    def errors(self, message: str) -> None:
        """Write every line of a message as an `error:` line."""
        for line in message.split("\n"):
            if line:
                self.line(f"error: {line}")

    def table(self, table: TextTable) -> None:
        """Write a table: on a terminal long cells wrap between words; none is cut. Elsewhere a line has no
        trailing spaces."""
        from rich.console import Console

        from pipeline.terminal.tables import rendered

        size = get_terminal_size()
        width = size.columns if self.is_terminal else None
        # Without a height rich takes 80 columns for TERM=dumb (Emacs, CI) and cuts what is wider.
        plain = io.StringIO()
        stream = self._stream if self.is_terminal else plain
        console = Console(file=stream, width=width or _ANY_WIDTH, height=size.lines)
        console.print(rendered(table, width, self._shown), soft_wrap=True)
        self._stream.writelines(f"{line.rstrip()}\n" for line in plain.getvalue().split("\n")[:-1])

    def view(self, view: View) -> None:
        """Write lines and tables one below the other, as `wrapped` and `table` do."""
        for part in view:
            if isinstance(part, str):
                self.wrapped(part)
            else:
                self.table(part)

    def drawn(self, part: str | TextTable, width: int) -> Table | Text:
        """Return a line or table for rich, which reads no markup and no names of emoji in it."""
        from rich.text import Text

        from pipeline.terminal.tables import rendered

        return Text(self._shown(part)) if isinstance(part, str) else rendered(part, width, self._shown)

    def _shown(self, cell: Cell) -> str:
        lines: Sequence[object] = cell if isinstance(cell, tuple) else (cell,)
        shown = (printable(without_passwords(str(line))) for line in lines)
        return self._encodable("\n".join(shown))

    def _write(self, text: str) -> None:
        self._stream.write(f"{self._encodable(text)}\n")
        self._stream.flush()

    def _encodable(self, text: str) -> str:
        """Return the text with escapes for characters that the stream's encoding lacks."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)


class PlainStream:
    """A text stream that escapes control characters, for writers that are not ours.

    A carriage return before a text passes, and so does the movement of the cursor between bars of tqdm.
    Colours, in which Ray writes, are left out.
    """

    def __init__(self, stream: TextIO):
        self.unfiltered = stream

    def write(self, text: str) -> int:
        """Write the text and return its length."""
        if _CURSOR_OF_BARS.fullmatch(text):
            self.unfiltered.write(text)
        else:
            rest = text.removeprefix("\r")
            shown = printable_lines(without_passwords(_COLOURS.sub("", rest)))
            self.unfiltered.write(text[: len(text) - len(rest)] + shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write the texts one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


class TerminalHandler(logging.Handler):
    """Shows log records on standard error, tracebacks included."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            error_terminal().lines(self.format(record))
        except Exception:  # as every handler of logging: a lost line must not end the program
            self.handleError(record)


def filter_standard_streams() -> None:
    """Put a PlainStream in the place of standard output and standard error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, PlainStream):
            setattr(sys, name, PlainStream(stream))


def unfiltered(stream: TextIO) -> TextIO:
    """Return the stream below a PlainStream, or the stream itself."""
    inner: TextIO = stream.unfiltered if isinstance(stream, PlainStream) else stream
    return inner


def terminal() -> Terminal:
    """Return the terminal of standard output."""
    return Terminal(sys.stdout)


def error_terminal() -> Terminal:
    """Return the terminal of standard error."""
    return Terminal(sys.stderr)


def print_errors(message: str) -> None:
    """Write every line of a message as an `error:` line to standard error."""
    error_terminal().errors(message)


def print_json(stream: TextIO, value: Any) -> None:
    """Write a value as one line of JSON, without secrets."""
    inner, text = unfiltered(stream), without_passwords(json_line(value))
    try:
        text.encode(getattr(inner, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = without_passwords(json.dumps(value))
    inner.write(text + "\n")
    inner.flush()
