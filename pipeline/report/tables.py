"""Tables and values as the report shows them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True)
class Row:
    """One row; its first cell is its header. `is_marked` sets it off from the others."""

    cells: Sequence[str]
    is_marked: bool = False
    begins_group: bool = False
    share: float | None = None
    """Between 0 and 1, drawn as a bar in the last cell."""


@dataclass(frozen=True)
class Table:
    """A table of texts. The last `num_numbers` columns are numbers, which are aligned at the right."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    num_numbers: int = 0
    notes: Sequence[str] = field(default_factory=tuple)
    """Sentences below it."""


def percent(value: float | None) -> str:
    """Return a share as `40.0 %`, "-" for None."""
    return "-" if value is None else f"{value * 100:.1f}\N{NO-BREAK SPACE}%"


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number in a format, "-" for None."""
    return "-" if value is None else f"{value:{form}}"


def span(ends: Sequence[float] | None, form: str = ".3f") -> str:
    """Return an interval as `0.967 to 1.011`, "-" for None."""
    return "-" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


def size(num_bytes: float) -> str:
    """Return a number of bytes as `31.0 MB`."""
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"


def moment(text: str | None) -> str:
    """Return a time of a record as `2026-11-28 14:35:13 UTC`; other text stays as it is."""
    if not text:
        return "-"
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M:%S %Z}"
    except ValueError:
        return text
