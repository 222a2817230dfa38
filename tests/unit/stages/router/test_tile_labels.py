"""Labels of a sample's tiles as the router stage looks them up, ratios of tiles as evaluation does."""

import pyarrow as pa
import pyarrow.parquet as pq

from stages.evaluate.tiles import known_ratios
from stages.router.packs import TileLabels
from vico.objectives.router import IGNORED


def test_labels_stand_in_prompt_order_whatever_the_order_of_the_file(tmp_path):
    rows = [
        {"key": "b", "image": 1, "tile": 1, "label": 1},
        {"key": "a", "image": 0, "tile": 0, "label": 0},
        {"key": "b", "image": 0, "tile": 0, "label": 1},
        {"key": "b", "image": 1, "tile": 0, "label": 0},
        {"key": "a", "image": 0, "tile": 2, "label": 1},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labels.parquet")
    labels = TileLabels(tmp_path)
    assert labels.keys.to_pylist() == ["a", "b"]
    assert labels.of("a", (3,)).tolist() == [0, IGNORED, 1]
    assert labels.of("b", (1, 2)).tolist() == [1, 0, 1]
    assert labels.of("c", (2, 1)).tolist() == [IGNORED] * 3
    assert labels.of("c", ()).tolist() == []


def test_evaluation_reads_no_ratios_but_those_of_test(tmp_path):
    """Those of train are most of a large table, and nothing asks for them."""
    rows = [
        {"key": key, "split": split, "image": image, "tile": tile, "ratio": ratio}
        for key, split, image, tile, ratio in (
            ("a", "train", 0, 0, 1.0),
            ("b", "test", 0, 0, 2.0),
            ("b", "test", 1, 3, 3.0),
            ("c", "calib", 0, 0, 4.0),
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ratios.parquet")
    assert known_ratios(tmp_path / "ratios.parquet") == {("b", 0, 0): 2.0, ("b", 1, 3): 3.0}
