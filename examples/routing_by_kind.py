"""Count the tiles that a router keeps and compresses, by kind of picture: `python examples/routing_by_kind.py
MODEL FOLDER`.

FOLDER has a subfolder with pictures for each kind (photo, chart, line of text, ...). Tiles without content
are counted by themselves, whatever their picture: `white tile` and `blank tile` (any other uniform shade).

FOLDER may have a file `lines.json` with the text of pictures that show one line: {"line/1.png": "text"}.
Their tiles are counted as `legible line` if a character is at least 5 px wide in the tile, `illegible line`
if it is narrower, and `beside a line` if the tile has no ink. Wide gaps, as in headers, do not count.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vico.checkpoints import load_model
from vico.errors import UserError
from vico.model_files import check_model_folder, stored_threshold
from vico.picture_files import open_picture
from vico.settings import load_settings
from vico.tiling import Tiling, tile_boxes, tile_pixels

# N tiles of a picture, S side of a tile in pixels
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WHITE_LEVEL = 250
"""A tile is white if no pixel is darker."""
BLANK_SPREAD = 2.0
"""Standard deviation of its levels up to which another tile is blank."""
LEGIBLE_WIDTH = 5.0
"""Width of a character in a tile, in pixels, from which a line counts as legible."""
LINES_FILE = "lines.json"
_INK = 60  # levels from the median to a pixel of ink in the picture; scaling makes strokes paler
_TILE_INK, _INK_SHARE = 40, 0.005
_WIDE_GAP = 1.5
"""Gap over the height of the ink from which two texts are apart, as in the header of a page."""
_Z = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class KindRow:
    """The tiles of a kind; `low` and `high` bound the share compressed with 95 % confidence."""

    kind: str
    tiles: int
    compressed: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.compressed / self.tiles


def tile_kinds(pixels_N3SS: np.ndarray, kind: str) -> list[str]:
    """Return the kind of each tile: that of its picture, unless it is white or blank."""
    levels = pixels_N3SS.reshape(len(pixels_N3SS), -1)
    white = levels.min(axis=1) >= WHITE_LEVEL
    per_channel = pixels_N3SS.reshape(len(pixels_N3SS), 3, -1)
    blank = per_channel.std(axis=2).max(axis=1) <= BLANK_SPREAD
    return [
        "white tile" if is_white else "blank tile" if is_blank else kind
        for is_white, is_blank in zip(white.tolist(), blank.tolist(), strict=True)
    ]


def character_width(picture: Image.Image, text: str) -> float:
    """Return the mean width, in pixels, of a character of the line of text that a picture shows.

    A wide gap, as between title and page number of a header, counts neither as width nor as a character. The
    picture shows nothing but the text: a rule along the line would fill its gaps.
    """
    gray = np.asarray(picture.convert("L"), np.int16)
    ink = np.abs(gray - np.median(gray)) > _INK
    columns, rows = np.flatnonzero(ink.any(axis=0)), np.flatnonzero(ink.any(axis=1))
    if not len(columns):
        return 0.0
    gaps = np.diff(columns) - 1
    wide = gaps[gaps > _WIDE_GAP * (rows[-1] - rows[0] + 1)]
    line_width = columns[-1] - columns[0] + 1 - wide.sum()
    return float(line_width) / max(len(" ".join(text.split())) - len(wide), 1)


def line_kinds(picture: Image.Image, text: str, tiling: Tiling, pixels_N3SS: np.ndarray) -> list[str]:
    """Return the kind of each tile of a picture of one line of text."""
    picture_width = character_width(picture, text)
    kinds = []
    boxes = tile_boxes(*picture.size, tiling)
    for pixels_3SS, (left, _, right, _) in zip(pixels_N3SS, boxes, strict=True):
        level_SS = pixels_3SS.mean(axis=0)
        has_ink = np.mean(np.abs(level_SS - np.median(level_SS)) > _TILE_INK) >= _INK_SHARE
        width = picture_width * tiling.tile_size / (right - left)
        legibility = "legible line" if width >= LEGIBLE_WIDTH else "illegible line"
        kinds.append(legibility if has_ink else "beside a line")
    return kinds


def routed_tiles(model_folder: Path, folder: Path, threshold: float) -> Iterator[tuple[str, bool]]:
    """Yield (kind, compressed) of every tile of the pictures in the subfolders."""
    model, tiling = load_model(model_folder).eval(), load_settings(model_folder).tiling()
    if model.router is None:
        raise UserError(f"MODEL={model_folder} has no router; give a folder that `vico run` exported")
    lines_file = folder / LINES_FILE
    texts: dict[str, str] = json.loads(lines_file.read_text(encoding="utf-8")) if lines_file.exists() else {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        name = path.relative_to(folder)
        picture = open_picture(path.read_bytes())
        pixels_N3SS = tile_pixels(picture, tiling)
        with torch.no_grad():
            features = model.vision_features(torch.from_numpy(pixels_N3SS))
            compressed = model.router.compress_probability(features) >= threshold
        kinds = tile_kinds(pixels_N3SS, name.parts[0])
        if name.as_posix() in texts:
            of_line = line_kinds(picture, texts[name.as_posix()], tiling, pixels_N3SS)
            kinds = [
                line if kind == name.parts[0] else kind for kind, line in zip(kinds, of_line, strict=True)
            ]
        yield from zip(kinds, compressed.tolist(), strict=True)


def rows_by_kind(tiles: Sequence[tuple[str, bool]]) -> list[KindRow]:
    """Return a row for each kind, by falling share of compressed tiles."""
    rows = []
    for kind in sorted({kind for kind, _ in tiles}):
        decisions = [compressed for tile_kind, compressed in tiles if tile_kind == kind]
        low, high = wilson_interval(sum(decisions), len(decisions))
        rows.append(KindRow(kind, len(decisions), sum(decisions), low, high))
    return sorted(rows, key=lambda row: -row.share)


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    share, weight = successes / count, _Z**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return centre - half, centre + half


def table(rows: Sequence[KindRow]) -> str:
    """Return the rows as Markdown."""
    lines = ["| kind | tiles | compressed | kept | 95 % interval of compressed |", "|---|---:|---:|---:|---|"]
    lines += [
        f"| {row.kind} | {row.tiles:,} | {row.share:.1%} | {1 - row.share:.1%} | "
        f"{row.low:.1%} to {row.high:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Print the table for the words of a command line, by default those of this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a model folder with a router, as `vico export` writes it")
    parser.add_argument("folder", type=Path, help="a folder with one subfolder of pictures per kind")
    parser.add_argument("--threshold", type=float, help="default: the threshold in the model's config.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(words)
    try:
        check_model_folder(arguments.model, "MODEL")
        threshold = stored_threshold(arguments.model) if arguments.threshold is None else arguments.threshold
        rows = rows_by_kind(list(routed_tiles(arguments.model, arguments.folder, threshold)))
    except UserError as error:
        sys.exit(str(error))
    if not rows:
        sys.exit(f"FOLDER={arguments.folder} has no pictures ({', '.join(SUFFIXES)}) in subfolders")
    if arguments.json:
        print(json.dumps([{**vars(row), "share": row.share} for row in rows], indent=1))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
