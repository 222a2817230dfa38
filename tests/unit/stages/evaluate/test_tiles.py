"""What the evaluation knows about its tiles."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.evaluate.points import EvaluatedTiles
from stages.evaluate.tiles import ratio_by_content, ratios_of_test_tiles
from stages.outputs import RATIOS_FILE


def test_evaluation_reads_only_the_ratios_of_test_tiles(tmp_path):
    """Those of train are most of a large table, and nothing needs them."""
    rows = [
        {"key": key, "split": split, "image": image, "tile": tile, "ratio": ratio}
        for key, split, image, tile, ratio in (
            ("a", "train", 0, 0, 1.0),
            ("b", "test", 0, 0, 2.0),
            ("b", "test", 1, 3, 3.0),
            ("c", "calib", 0, 0, 4.0),
        )
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / RATIOS_FILE)
    assert ratios_of_test_tiles(tmp_path / RATIOS_FILE) == {("b", 0, 0): 2.0, ("b", 1, 3): 3.0}


def test_ratios_by_content_are_medians_falling_with_plain_and_photograph_together():
    contents = ["plain", "small text", None, "photograph", "plain"]
    ratios = np.array([1.0, 9.0, 5.0, 4.0, 2.0])
    tiles = EvaluatedTiles([(5,)], np.zeros(5, np.float32), ratios, contents=contents)
    assert list(ratio_by_content(tiles).items()) == [
        ("small text", {"tiles": 1, "median": 9.0}),
        ("photograph", {"tiles": 1, "median": 4.0}),
        ("plain and photograph", {"tiles": 3, "median": pytest.approx(2.0)}),
        ("plain", {"tiles": 2, "median": 1.5}),
    ]
