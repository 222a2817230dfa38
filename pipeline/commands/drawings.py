"""Where `vico route --out` draws: a file for one picture, a grid of several in one file, or a folder."""

import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageDraw, ImageFont

from vico.errors import UserError, one_line
from vico.inference.routed_picture import MAX_LONG_SIDE, MIN_LONG_SIDE
from vico.shown_text import printable

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_GAP, _TITLE, _TITLE_FONT = 24, 26, 16
_SHEET_WIDTH = 8000
"""Pixels; about half of what WebP allows, and with a sheet as high as that 200 MB in memory."""
_MAX_COLUMNS = 12
"""With more columns the drawings would have fewer than MIN_LONG_SIDE pixels."""


class Drawings(Protocol):
    """The drawings of one command; they are added in the order of the pictures."""

    long_side: int
    """Most pixels on the longer side of each drawn picture."""

    def add(self, path: Path, drawing: Image.Image) -> None:
        """Take the drawing of the picture at `path`."""

    def close(self) -> None:
        """Write what is not written yet."""


def drawings(out: Path, pictures: Sequence[Path]) -> Drawings:
    """Return where the drawings of `pictures` go, by the form of `out`: a folder, or a file.

    Raises UserError for a name that is neither, an `out` that is not writable or is one of the pictures, and
    for more pictures than fit into one file.
    """
    if out.is_dir() or not out.suffix:
        return _Folder(out, pictures)
    if out.suffix.lower() not in _FORMATS:
        raise UserError(
            f"--out={out}: the name must end in one of {', '.join(_FORMATS)}, or be that of a folder"
        )
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: the folder {out.parent} does not exist; create it first")
    _check_target(out, out.parent, pictures)
    if len(pictures) > _MAX_COLUMNS**2:
        raise UserError(
            f"--out={out}: {len(pictures)} pictures are too many for one file (at most {_MAX_COLUMNS**2}); "
            "give the name of a folder, for one file per picture"
        )
    return _File(out) if len(pictures) == 1 else _Sheet(out, len(pictures))


class _File:
    """A file with the drawing of one picture."""

    long_side = MAX_LONG_SIDE

    def __init__(self, out: Path) -> None:
        self._out = out

    def add(self, path: Path, drawing: Image.Image) -> None:
        _write(drawing, self._out)

    def close(self) -> None:
        return


class _Folder:
    """A folder with one PNG file per picture, named after it."""

    long_side = MAX_LONG_SIDE

    def __init__(self, out: Path, pictures: Sequence[Path]) -> None:
        parent = out if out.is_dir() else out.parent
        if not parent.is_dir():
            raise UserError(f"--out={out}: the folder {parent} does not exist; create it first")
        self._targets = [out / f"{name}.png" for name in _names(pictures)]
        self._num_written = 0
        for target in self._targets:
            _check_target(target, parent, pictures)
        try:
            out.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--out={out} is not writable ({error.strerror}); give another path") from error

    def add(self, path: Path, drawing: Image.Image) -> None:
        _write(drawing, self._targets[self._num_written])
        self._num_written += 1

    def close(self) -> None:
        return


class _Sheet:
    """One file with the drawings in a grid, each below its file's name.

    It holds the drawings of one row and the rows that are complete, no more pixels than the sheet has.
    """

    def __init__(self, out: Path, num_pictures: int) -> None:
        self._out, self._num_columns = out, math.ceil(math.sqrt(num_pictures))
        # A drawing is up to half wider than its picture, for the frames and the thumbnail beside it.
        cell = _SHEET_WIDTH // self._num_columns - _GAP
        self.long_side = max(MIN_LONG_SIDE, min(MAX_LONG_SIDE, round(cell / 1.5)))
        self._row: list[Image.Image] = []
        self._rows: list[Image.Image] = []

    def add(self, path: Path, drawing: Image.Image) -> None:
        self._row.append(_titled(path.name, drawing))
        if len(self._row) == self._num_columns:
            self._end_row()

    def close(self) -> None:
        self._end_row()
        size = max(row.width for row in self._rows), sum(row.height + _GAP for row in self._rows) - _GAP
        sheet, top = Image.new("RGB", size, "white"), 0
        for row in self._rows:
            sheet.paste(row, (0, top))
            top += row.height + _GAP
        self._rows = []
        _write(sheet, self._out)

    def _end_row(self) -> None:
        if not self._row:
            return
        size = sum(cell.width + _GAP for cell in self._row) - _GAP, max(cell.height for cell in self._row)
        row, left = Image.new("RGB", size, "white"), 0
        for cell in self._row:
            row.paste(cell, (left, 0))
            left += cell.width + _GAP
        self._rows.append(row)
        self._row = []


def _names(pictures: Sequence[Path]) -> list[str]:
    """Return a name per picture: its own without the ending, numbered from the second of equals on."""
    counts: Counter[str] = Counter()
    names: list[str] = []
    for path in pictures:
        name = path.stem
        while name in names:
            counts[path.stem] += 1
            name = f"{path.stem}-{counts[path.stem] + 1}"
        names.append(name)
    return names


def _titled(title: str, drawing: Image.Image) -> Image.Image:
    titled = Image.new("RGB", (drawing.width, drawing.height + _TITLE), "white")
    ImageDraw.Draw(titled).text(
        (4, 2), printable(title), fill="black", font=ImageFont.load_default(_TITLE_FONT)
    )
    titled.paste(drawing, (0, _TITLE))
    return titled


def _check_target(target: Path, folder: Path, pictures: Sequence[Path]) -> None:
    if target.is_dir():
        raise UserError(f"--out: {target} is a folder; move it away or give another name")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out={target} is not writable (no permission in {folder}); give another path")
    if target.exists() and any(target.samefile(picture) for picture in pictures):
        raise UserError(f"--out: {target} is one of the pictures and would be replaced; give another name")


def _write(drawing: Image.Image, target: Path) -> None:
    """Write a drawing completely or not at all."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        drawing.save(partial, _FORMATS[target.suffix.lower()])
        os.replace(partial, target)
    except (OSError, ValueError) as error:  # ValueError: a side is too long for the format
        raise UserError(f"--out={target} is not writable ({one_line(error)}); give another path") from error
    finally:
        partial.unlink(missing_ok=True)
