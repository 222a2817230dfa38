"""Output of the commands: every text for people passes `Terminal`, every answer for programs `print_json`.

Nothing else writes to the terminal; a test looks for other writers. What libraries and tracebacks write goes
through a `PlainStream`, which `main` puts in the place of the standard streams.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from cluster.passwords import without_passwords
from vico.shown_text import json_line, printable, printable_lines

if TYPE_CHECKING:
    from rich.text import Text

_PLAIN_WIDTH = 240
"""Columns if the output is not a terminal, so that no line of a table breaks."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_CURSOR_OF_BARS = re.compile(r"[\r\n]*(\x1b\[A)*")
Cell: TypeAlias = object | tuple[str, ...]
"""A cell of a table: a value, or a tuple with one text per line."""


@dataclass(frozen=True)
class TextTable:
    """A table of texts, with a row of names above it and perhaps a title."""

    names: tuple[object, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str | None = None


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
        line = printable(without_passwords(text))
        if self.is_terminal and line:
            indent = " " * (len(line) - len(line.lstrip()) + 4)
            line = "\n".join(_wrapped(line, get_terminal_size().columns, indent))
        self._write(line)

    def errors(self, message: str) -> None:
        """Write every line of a message as an `error:` line."""
        for line in message.split("\n"):
            if line:
                self.line(f"error: {line}")

    def table(self, table: TextTable) -> None:
        """Write a table: on a terminal long cells wrap, none is cut."""
        from rich.console import Console
        from rich.table import Column, Table

        columns = [Column(self.text(name), overflow="fold") for name in table.names]
        title = None if table.title is None else self.text(table.title)
        rich_table = Table(*columns, box=None, pad_edge=False, title=title, title_justify="left")
        for row in table.rows:
            rich_table.add_row(*map(self.text, row))
        width = None if self.is_terminal else _PLAIN_WIDTH
        Console(file=self._stream, width=width).print(rich_table)

    def text(self, cell: Cell) -> Text:
        """Return a text or cell for rich, which reads no markup and no names of emoji in it."""
        from rich.text import Text

        lines: Sequence[object] = cell if isinstance(cell, tuple) else (cell,)
        shown = (printable(without_passwords(str(line))) for line in lines)
        return Text(self._encodable("\n".join(shown)))

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


def _wrapped(line: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)


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
