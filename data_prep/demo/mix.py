"""Count what the tiles of the demo show: `python -m data_prep.demo.mix 2000` prints it for 2000 records."""

import json
import sys
from collections import Counter

import numpy as np

from data_prep.demo.canvas import Box, Canvas
from data_prep.demo.records import drawn_record
from vico.tiling import Tiling, image_tiles, tile_boxes

SMALL_TEXT = (8.0, 18.0)
"""Font sizes of small text in pixels of the tile; smaller text is illegible, larger text is large."""
_PLAIN_SPREAD = 8.0
"""Standard deviation of gray levels up to which a tile without text or photograph is plain."""
_PHOTO_SHARE = 0.25
"""Share of the tile's area from which a tile without text is a photograph."""


def _font_pixels(canvas: Canvas, box: Box, tile_size: int) -> list[float]:
    """Return the font size, in pixels of the tile, of each text that reaches into the box."""
    left, top, right, bottom = box
    scale = tile_size / (bottom - top)
    sizes = []
    for run in canvas.runs:
        middle = run.top + 0.62 * run.size
        width = canvas.measure(run.text, run.font, run.size / canvas.scale) * canvas.scale
        if top <= middle < bottom and run.left < right and run.left + width > left:
            sizes.append(run.size * scale)
    return sizes


def _photo_share(canvas: Canvas, box: Box) -> float:
    left, top, right, bottom = box
    covered = sum(
        max(min(right, x1) - max(left, x0), 0) * max(min(bottom, y1) - max(top, y0), 0)
        for x0, y0, x1, y1 in canvas.photographs
    )
    return covered / ((right - left) * (bottom - top))


def tile_contents(canvas: Canvas, tiling: Tiling) -> list[str]:
    """Name what each tile of a picture shows, in prompt order: legible text comes first, then photographs."""
    contents = []
    tiles = image_tiles(canvas.image, tiling)
    for tile, box in zip(tiles, tile_boxes(*canvas.image.size, tiling), strict=True):
        sizes = _font_pixels(canvas, box, tiling.tile_size)
        if any(SMALL_TEXT[0] <= size <= SMALL_TEXT[1] for size in sizes):
            contents.append("small text")
        elif any(size > SMALL_TEXT[1] for size in sizes):
            contents.append("large text")
        elif sizes:
            contents.append("illegible text")
        elif _photo_share(canvas, box) >= _PHOTO_SHARE:
            contents.append("photograph")
        elif np.asarray(tile.convert("L"), np.float32).std() <= _PLAIN_SPREAD:
            contents.append("plain")
        else:
            contents.append("graphics")
    return contents


def demo_mix(num_samples: int, seed: int, tiling: Tiling) -> dict[str, dict[str, float]]:
    """Return the shares of tile contents, kinds, tasks and tile counts in the first records of a seed."""
    counters: dict[str, Counter[str]] = {
        name: Counter() for name in ("tiles", "kinds", "tasks", "tiles_per_record")
    }
    for line in range(num_samples):
        drawn = drawn_record(seed, line)
        contents = tile_contents(drawn.content.canvas, tiling) if drawn.content else []
        counters["tiles"].update(contents)
        counters["kinds"][drawn.kind] += 1
        counters["tasks"].update(question.task for question in drawn.questions)
        counters["tiles_per_record"][str(len(contents))] += 1
    return {
        name: {key: round(value / counter.total(), 4) for key, value in sorted(counter.items())}
        for name, counter in counters.items()
    }


if __name__ == "__main__":
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print(json.dumps(demo_mix(samples, 0, Tiling(112, 4)), indent=1))  # noqa: T201 - a program
