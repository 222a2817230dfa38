"""Measures of a tile's pixels that need no model, and the actor that takes them.

For records of the built-in demo the actor also names what each tile shows.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.demo.mix import tile_contents
from data_prep.demo.records import drawn_record
from data_prep.records.config import RecordsConfig
from stages.inference import InferenceSettings, open_reader
from vico.errors import UserError

# N tiles, S side of a tile in pixels
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
    """Return FEATURES of tiles, uint8 [N, 3, S, S], float64 [N] each.

    They are the bytes of the tile as JPEG divided by its pixels, the mean squared gradient of its gray levels
    in both directions, and the standard deviation of its gray levels. Higher values mean more detail.
    """
    columns: dict[str, list[float]] = {name: [] for name in FEATURES}
    for tile_3SS in pixels_N3SS:
        image = Image.fromarray(np.ascontiguousarray(tile_3SS.transpose(1, 2, 0)))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=JPEG_QUALITY)
        gray_SS = np.asarray(image.convert("L"), np.float64)
        energy = sum((np.diff(gray_SS, axis=axis) ** 2).mean() for axis in (0, 1))
        values = len(data.getvalue()) / gray_SS.size, energy, gray_SS.std()
        for name, value in zip(FEATURES, values, strict=True):
            columns[name].append(float(value))
    return {name: np.array(values, np.float64) for name, values in columns.items()}


class TileMeasurer:
    """Measures the tiles of samples; `demo` maps the source names of demo records to their configs."""

    def __init__(self, settings: InferenceSettings, demo: Mapping[str, RecordsConfig]):
        self.reader, self.demo = open_reader(settings), demo

    def measures(self, rows: Sequence[int]) -> pa.Table:
        """Return one row per tile (SCHEMA); `content` is null if the record is not the demo's."""
        return pa.concat_tables([SCHEMA.empty_table(), *(self._sample_measures(row) for row in rows)])

    def _sample_measures(self, row: int) -> pa.Table:
        indexed = self.reader.index.row(row)
        tiles = [(image, tile) for image, count in enumerate(indexed["tiles"]) for tile in range(count)]
        columns = {
            "key": [indexed["key"]] * len(tiles),
            "split": [indexed["split"]] * len(tiles),
            "image": [image for image, _ in tiles],
            "tile": [tile for _, tile in tiles],
            "content": self._contents(indexed, len(tiles)),
            **pixel_features(self.reader.sample(row).pixels),
        }
        return pa.table(columns, SCHEMA)

    def _contents(self, indexed: Mapping[str, Any], num_tiles: int) -> Sequence[str | None]:
        """Return what each tile shows, by drawing the demo record again from its seed and line."""
        config = self.demo.get(indexed["source"])
        if config is None or not num_tiles:
            return [None] * num_tiles
        content = drawn_record(config.seed, indexed["line"]).content
        tiling = self.reader.prompt_format.settings.tiling(indexed["max_tiles"])
        contents = [] if content is None else tile_contents(content.canvas, tiling)
        if len(contents) != num_tiles:
            raise UserError(
                f"{indexed['key']} has {num_tiles} tiles in the shards, but this version of the demo draws "
                f"{len(contents)}; another version wrote the shards: run again with --force shard"
            )
        return contents
