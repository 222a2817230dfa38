"""What the pixels of a tile say without a model: three measures of detail, and what a demo tile shows.

Used by the evaluate stage: the measures feed the pixel rule, the contents a figure.
"""

# N tiles, S tile size in pixels

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.demo import drawn_record
from data_prep.demo_mix import tile_contents
from data_prep.records import RecordsConfig
from stages.inference import InferenceSettings, opened_reader
from vico.errors import UserError
from vico.tiling import IMAGENET_MEAN, IMAGENET_STD

JPEG_QUALITY = 75  # Pillow's default; the order of the tiles hardly depends on it
FEATURES = ("jpeg_bytes_a_pixel", "gradient_energy", "gray_deviation")
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("image", pa.int32()),
        ("tile", pa.int32()),
        ("content", pa.string()),
        *((name, pa.float64()) for name in FEATURES),
    ]
)


def pixel_features(pixels_N3SS: np.ndarray) -> dict[str, np.ndarray]:
    """FEATURES of normalised tiles (float32 [N, 3, S, S], as the vision tower sees them), float64 [N] each.

    Bytes of the tile as JPEG over its pixels; mean squared gray gradient, both directions; standard deviation
    of gray levels. More of each means more to see.
    """
    shape = (3, 1, 1)
    mean, std = (np.asarray(values, np.float32).reshape(shape) for values in (IMAGENET_MEAN, IMAGENET_STD))
    found: dict[str, list[float]] = {name: [] for name in FEATURES}
    for tile_3SS in pixels_N3SS:
        levels = np.clip(np.rint((tile_3SS * std + mean) * 255), 0, 255).astype(np.uint8)
        image = Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=JPEG_QUALITY)
        gray_SS = np.asarray(image.convert("L"), np.float64)
        gradients = (np.diff(gray_SS, axis=axis) ** 2 for axis in (0, 1))
        values = len(data.getvalue()) / gray_SS.size, sum(one.mean() for one in gradients), gray_SS.std()
        for name, value in zip(FEATURES, values, strict=True):
            found[name].append(float(value))
    return {name: np.array(values, np.float64) for name, values in found.items()}


class TileMeasurer:
    """Reads samples and measures their tiles; `demo` maps source names of demo records to their config."""

    def __init__(self, settings: InferenceSettings, demo: Mapping[str, RecordsConfig]):
        self.reader, self.demo = opened_reader(settings), demo

    def measures(self, rows: Sequence[int]) -> pa.Table:
        """A row a tile in the order of SCHEMA; `content` is null where the record is not the demo's."""
        tables = [SCHEMA.empty_table()]
        for row in rows:
            entry, sample = self.reader.index.row(row), self.reader.sample(row)
            places = [(image, tile) for image, count in enumerate(entry["tiles"]) for tile in range(count)]
            columns = {
                "key": [entry["key"]] * len(places),
                "split": [entry["split"]] * len(places),
                "image": [image for image, _ in places],
                "tile": [tile for _, tile in places],
                "content": self._contents(entry, len(places)),
                **pixel_features(sample.pixels),
            }
            tables.append(pa.table(columns, SCHEMA))
        return pa.concat_tables(tables)

    def _contents(self, entry: Mapping, num_tiles: int) -> list[str | None]:
        """What each tile shows, told by drawing the demo record again: (seed, line) alone decide it."""
        config = self.demo.get(entry["source"])
        if config is None or not num_tiles:
            return [None] * num_tiles
        content = drawn_record(config.seed, entry["line"]).content
        tiling = self.reader.prompt_format.settings.tiling(entry["max_tiles"])
        contents = [] if content is None else tile_contents(content.canvas, tiling)
        if len(contents) != num_tiles:
            raise UserError(
                f"{entry['key']} has {num_tiles} tiles, this version draws {len(contents)}; the shards were "
                "written by another version of the demo: run again with --force shard"
            )
        return contents
