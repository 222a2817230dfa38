"""Tables that fit the terminal: texts wrap between words, and no word is broken.

So an id, a key or a path can be copied from any table. A table with words too long for columns beside each
other is shown row by row, one `name: text` per line.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from rich.cells import cell_len

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

Cell: TypeAlias = "object | tuple[str, ...]"
"""A cell of a table: a value, or a tuple with one text per line."""
_GAP = 2
"""Columns of the terminal between two columns of a table."""


@dataclass(frozen=True)
class TextTable:
    """A table of texts, with a row of names above it and perhaps a title."""

    names: tuple[object, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str | None = None


def rendered(table: TextTable, width: int | None, shown: Callable[[Cell], str]) -> Table | Text:
    """Return a table for rich, at most `width` columns wide (None: as wide as it is).

    `shown` makes a cell the text that the terminal takes, without anything that it would obey.
    """
    from rich.table import Column, Table
    from rich.text import Text

    names = [shown(name) for name in table.names]
    rows = [[shown(cell) for cell in row] for row in table.rows]
    columns = list(zip(names, *rows, strict=True))
    most = [max(map(_longest_line, column)) for column in columns]
    least = [max(map(_longest_word, column)) for column in columns]
    title = None if table.title is None else shown(table.title)
    available = sum(most) if width is None else width - _GAP * (len(columns) - 1)
    if sum(least) > available:
        return Text("\n".join(_row_by_row(names, rows, title, width or available)))
    widths = _column_widths(least, most, available)
    laid_out = Table(
        *(Column(Text(name), width=width) for name, width in zip(names, widths, strict=True)),
        box=None,
        pad_edge=False,
        padding=(0, _GAP, 0, 0),
        title=None if title is None else Text(title),
        title_justify="left",
    )
    for row in rows:
        laid_out.add_row(*map(Text, row))
    return laid_out


def wrapped_lines(text: str, width: int) -> list[str]:
    """Return one line as lines of at most `width`, the later ones indented below its beginning.

    A longer word is not broken: the terminal itself continues it on the next line, and it can be copied.
    """
    indent = " " * (len(text) - len(text.lstrip()) + 4)
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _row_by_row(
    names: Sequence[str], rows: Sequence[Sequence[str]], title: str | None, width: int
) -> list[str]:
    lines = [] if title is None else [title]
    for row in rows:
        lines += [""] if lines else []
        for name, cell in zip(names, row, strict=True):
            first, *others = cell.split("\n")
            lines += wrapped_lines(f"{name}: {first}", width)
            lines += [line for other in others for line in wrapped_lines(f"    {other}", width)]
    return lines


def _column_widths(least: Sequence[int], most: Sequence[int], available: int) -> list[int]:
    """Give each column what its longest word takes, and share the rest among those that have longer lines."""
    widths, rest = list(least), available - sum(least)
    wishes = sorted(
        (longest - own, number) for number, (own, longest) in enumerate(zip(least, most, strict=True))
    )
    for position, (wish, number) in enumerate(wishes):
        more = min(wish, rest // (len(wishes) - position))
        widths[number] += more
        rest -= more
    return widths


def _longest_line(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)
