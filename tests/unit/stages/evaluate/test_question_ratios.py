"""Which other records tell the blind oracle what a tile is worth."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.evaluate.config import EvaluateConfig
from stages.evaluate.tile_measures.question_ratios import SCHEMA, blind_ratios
from stages.outputs import QUESTION_RATIOS_FILE
from stages.ratio_scale import RatioScale
from tests.stage_context import stage_context

SAMPLES = pa.table(
    {
        "key": ["a", "b", "other cut", "other picture", "same question"],
        "image_sha256": [[b"1"], [b"1"], [b"1"], [b"2"], [b"1"]],
        "tiles": [[2], [2], [2], [2], [2]],
        "max_tiles": [4, 4, 12, 4, 4],
    }
)
ASKED = {"a": "Which?", "b": "How many?", "other cut": "Where?", "other picture": "Why?"}


@pytest.fixture
def context(tmp_path):
    """Return a context whose attempt before has measured the earlier questions: only a has some."""
    context = stage_context("evaluate", tmp_path, {})
    rows = [
        {"key": key, "image": 0, "tile": tile, "log_ratio": np.log(3.0) if key == "a" else None}
        | {"scored": ASKED.get(key, "Which?"), "asked": [ASKED.get(key, "Which?")]}
        for key in SAMPLES["key"].to_pylist()
        for tile in (0, 1)
    ]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), context.parts.partial(QUESTION_RATIOS_FILE))
    context.parts.publish(QUESTION_RATIOS_FILE)
    return context


def test_other_records_count_if_their_tiles_are_the_same_regions(context):
    ratios = {(key, 0, tile): 12.0 + tile for key in SAMPLES["key"].to_pylist() for tile in (0, 1)}
    blind = blind_ratios(EvaluateConfig(seed=0), context, SAMPLES, ratios, RatioScale("tile", 0.01))
    # of a: its own earlier question, 3, and the last one of b; "same question" asks what is scored
    assert blind["a", 0, 0] == pytest.approx((3 * 12) ** 0.5)
    assert blind["a", 0, 1] == pytest.approx((3 * 13) ** 0.5)
    assert blind["b", 0, 1] == pytest.approx(13)
    assert not {key for key, _, _ in blind} & {"other cut", "other picture"}
