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


def test_rows_of_several_sets_come_back_from_the_blocks_that_have_them(tmp_path):
    for name in ("b", "a"):
        write_lines(tmp_path / f"{name}.jsonl", [row(answer=f"{name}{n}") for n in range(9)])
    sets = record_sets(RecordsConfig(format="llava", path=tmp_path))
    wanted = [RowAddress("b", 8), RowAddress("a", 3), RowAddress("b", 0), RowAddress("a", 2)]
    blocks = record_blocks(sets, 3)
    again = repair_blocks(dict.fromkeys(wanted), sets, blocks, 1, 6)
    rows = [json.loads(raw.content) for block in again for raw in repair_block_rows(block)]
    assert [row["conversations"][1]["value"] for row in rows] == ["a2", "a3", "b0", "b8"]
    assert [[b.number for b in block.original_blocks] for block in again] == [[0], [1], [3], [5]]
