"""Repaired rows as blocks; `tests/integration/test_repaired_rows.py` runs the whole stage with them."""

import json

import pytest

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.rejection import Rejected
from data_prep.records.repairs import RowAddress, repair_block_rows, repair_blocks, repaired_rows
from data_prep.records.sets import record_sets
from tests.record_files import row, write_lines


def test_a_repaired_row_of_the_demo_may_have_text_only(tmp_path):
    """The demo has no folder of pictures: a row that names one is rejected like any missing picture."""
    path = write_lines(
        tmp_path / "rows.jsonl",
        [{"source": "demo", "line": n, "row": new_row} for n, new_row in ((2, row("a.png")), (5, row()))],
    )
    quarantined = {RowAddress("demo", line) for line in (1, 2, 5)}
    sets = record_sets(RecordsConfig(format="demo", num_samples=7))
    (block,) = repair_blocks(repaired_rows(path, quarantined), sets, record_blocks(sets, 3), 10, 4)
    assert (block.number, block.first_line, block.num_lines) == (4, 2, 2)
    with_picture, text_only = repair_block_rows(block)
    assert json.loads(text_only.content) == row()
    with pytest.raises(Rejected) as caught:
        with_picture.picture_bytes("a.png")
    assert caught.value.reason == "missing_image"
