"""The labels of the label stage, looked up by sample."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.outputs import LABELS_FILE
from vico.objectives.router import IGNORED


class TileLabels:
    """Labels by sample and tile, in arrays over all tiles and one span per sample."""

    def __init__(self, label_folder: Path):
        columns = ["key", "image", "tile", "label"]
        table = pq.read_table(label_folder / LABELS_FILE, columns=columns).sort_by("key")
        self._image, self._tile, self._label = (
            table[name].to_numpy().astype(np.int16) for name in ("image", "tile", "label")
        )
        counts = pc.value_counts(table["key"])  # in the order of the sorted keys
        self.keys: pa.Array = counts.field("values")
        ends = np.cumsum(counts.field("counts").to_numpy())
        self._spans: dict[str, tuple[int, int]] = {
            key: (end - count, end)
            for key, count, end in zip(
                self.keys.to_pylist(), counts.field("counts").to_pylist(), ends.tolist(), strict=True
            )
        }

    def of(self, key: str, tiles_per_image: tuple[int, ...]) -> np.ndarray:
        """Return the labels of a sample's tiles in prompt order, int64 [T], -100 if a tile has none."""
        labels = [np.full(count, IGNORED, np.int64) for count in tiles_per_image]
        for row in range(*self._spans.get(key, (0, 0))):
            labels[self._image[row]][self._tile[row]] = self._label[row]
        return np.concatenate(labels) if labels else np.zeros(0, np.int64)
