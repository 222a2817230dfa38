"""What the tiles of the demo show: plain, photograph, small text; `python -m data_prep.demo.mix 2000`."""

import json
import sys
from collections import Counter

import numpy as np

from data_prep.demo.canvas import Canvas
from data_prep.demo.records import drawn_record
from vico.tiling import Tiling, image_tiles, tile_boxes

SMALL_TEXT = (
    8.0,
    18.0,
)  # font pixels in the tile: below nobody reads it at this tile size, above it is large
_PLAIN_SPREAD = (
    8.0  # standard deviation of gray levels up to which a tile without text or photograph is plain
)
_PHOTO_SHARE = 0.25  # of the tile's area


def _font_pixels(canvas: Canvas, box: tuple[float, float, float, float], tile_size: int) -> list[float]:
    """Font size, in pixels of the tile, of every run of text that reaches into the box."""
    left, top, right, bottom = box
    scale = tile_size / (bottom - top)
    sizes = []
    for run in canvas.runs:
        middle = run.top + 0.62 * run.size
        width = canvas.measure(run.text, run.font, run.size / canvas.scale) * canvas.scale
        if top <= middle < bottom and run.left < right and run.left + width > left:
            sizes.append(run.size * scale)
    return sizes


def _photo_share(canvas: Canvas, box: tuple[float, float, float, float]) -> float:
    left, top, right, bottom = box
    covered = sum(
        max(min(right, x1) - max(left, x0), 0) * max(min(bottom, y1) - max(top, y0), 0)
        for x0, y0, x1, y1 in canvas.photographs
    )
    return covered / ((right - left) * (bottom - top))


def tile_contents(canvas: Canvas, tiling: Tiling) -> list[str]:
    """What each tile of a picture shows, in prompt order: legible text decides, then photographs."""
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
    """Shares of tile contents, kinds, tasks and tile counts over the first records of a seed."""
    contents, kinds, tasks, counts = Counter(), Counter(), Counter(), Counter()
    for line in range(num_samples):
        drawn = drawn_record(seed, line)
        found = tile_contents(drawn.content.canvas, tiling) if drawn.content else []
        contents.update(found)
        kinds[drawn.kind] += 1
        tasks.update(question.task for question in drawn.questions)
        counts[str(len(found))] += 1
    named = {"tiles": contents, "kinds": kinds, "tasks": tasks, "tiles_per_record": counts}
    return {
        name: {key: round(value / counter.total(), 4) for key, value in sorted(counter.items())}
        for name, counter in named.items()
    }


if __name__ == "__main__":
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print(json.dumps(demo_mix(samples, 0, Tiling(112, 4)), indent=1))  # noqa: T201 - a program
