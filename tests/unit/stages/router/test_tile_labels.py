"""Labels of a sample's tiles as the router stage looks them up."""

import pyarrow as pa
import pyarrow.parquet as pq

from stages.outputs import LABELS_FILE
from stages.router.tile_labels import TileLabels
from vico.objectives.router import IGNORED


def test_labels_are_in_prompt_order_for_any_order_of_the_file(tmp_path):
    rows = [
        {"key": "b", "image": 1, "tile": 1, "label": 1},
        {"key": "a", "image": 0, "tile": 0, "label": 0},
        {"key": "b", "image": 0, "tile": 0, "label": 1},
        {"key": "b", "image": 1, "tile": 0, "label": 0},
        {"key": "a", "image": 0, "tile": 2, "label": 1},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / LABELS_FILE)
    labels = TileLabels(tmp_path)
    assert labels.keys.to_pylist() == ["a", "b"]
    assert labels.of("a", (3,)).tolist() == [0, IGNORED, 1]
    assert labels.of("b", (1, 2)).tolist() == [1, 0, 1]
    assert labels.of("c", (2, 1)).tolist() == [IGNORED] * 3
    assert labels.of("c", ()).tolist() == []
