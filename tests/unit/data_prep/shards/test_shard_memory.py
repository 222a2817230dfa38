"""A task that writes a shard holds the pictures of one row, however many rows there are."""

import tracemalloc

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.sets import record_sets
from data_prep.shards.checks import RowRules
from data_prep.shards.split import Shares
from data_prep.shards.write import ShardSettings, write_shard
from tests.record_files import picture, row, write_lines, write_meta

PICTURE_BYTES = 1_000_000


def test_memory_depends_on_the_largest_row_only(tmp_path, prompt_format):
    meta = write_meta(tmp_path, large={})
    data = picture(1, format="JPEG")
    (tmp_path / "images" / "a.jpg").write_bytes(data + bytes(PICTURE_BYTES - len(data)))
    rows = [row(["a.jpg"] * (1 + n % 2), answer=str(n)) for n in range(40)]
    write_lines(tmp_path / "large.jsonl", rows)
    (block,) = record_blocks(record_sets(RecordsConfig(format="internvl", path=meta)), 1000)
    for decode in (False, True):
        settings = ShardSettings(RowRules(12, 10**6, 4096, decode), Shares(0.1, 0.1))
        write_shard(tmp_path / "warm.tar", block, settings, prompt_format)
        tracemalloc.start()
        content = write_shard(tmp_path / "a.tar", block, settings, prompt_format)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert content.entry["samples"] == 40 and content.entry["bytes"] > 60 * PICTURE_BYTES
        assert peak < 3 * 2 * PICTURE_BYTES, "the row, its bytes joined for the tar, and the row before it"
