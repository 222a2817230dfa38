"""Annotation files as blocks of lines."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_prep.records.blocks import block_rows, estimated_bytes, record_blocks, repeated_lines
from data_prep.records.config import RecordsConfig
from data_prep.records.sets import RecordSet, record_sets
from tests.record_files import picture, row, write_lines, write_meta
from vico.errors import UserError


def sets_of(folder: Path, lines: list[dict | bytes]) -> list[RecordSet]:
    write_lines(folder / "a.jsonl", lines)
    return record_sets(RecordsConfig(format="internvl", path=write_meta(folder, a={})))


@pytest.mark.parametrize("samples_per_shard", [1, 3, 7, 100])
def test_blocks_hold_every_line_once_and_in_order(tmp_path, samples_per_shard):
    lines = [b'{"n": %d, "pad": "%s"}' % (n, b"x" * (n * 37 % 100)) for n in range(22)]
    blocks = record_blocks(sets_of(tmp_path, lines), samples_per_shard)
    assert [block.number for block in blocks] == list(range(-(-22 // samples_per_shard)))
    rows = [raw for block in blocks for raw in block_rows(block)]
    assert [raw.line for raw in rows] == list(range(22))
    assert [raw.content for raw in rows] == lines


def test_windows_line_ends_and_a_last_line_without_one_are_read(tmp_path):
    sets = sets_of(tmp_path, [])
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\r\n{"a": 2}\n{"a": 1}')
    (block,) = record_blocks(sets, 10)
    assert [raw.content for raw in block_rows(block)] == [b'{"a": 1}', b'{"a": 2}', b'{"a": 1}']
    assert block.duplicates == (2,)


def test_duplicates_are_found_across_blocks_and_the_first_is_kept(tmp_path):
    lines = [row(answer=text) for text in ("a", "b", "a", "c", "b", "a", "d")]
    blocks = record_blocks(sets_of(tmp_path, lines), 2)
    assert [block.duplicates for block in blocks] == [(), (2,), (4, 5), ()]
    assert [raw.line for block in blocks for raw in block_rows(block) if raw.is_duplicate] == [2, 4, 5]


def test_lines_that_share_half_of_a_digest_are_not_duplicates():
    digests = np.array([[1, 2], [1, 3], [2, 2], [1, 2]], np.uint64)
    assert repeated_lines(digests).tolist() == [3]


def test_long_files_are_streamed(tmp_path):
    sets = sets_of(tmp_path, [b'{"n": %d, "pad": "%s"}' % (n, b"x" * 1500) for n in range(20_000)])
    ticks = []
    tracemalloc.start()
    blocks = record_blocks(sets, 1000, lambda: ticks.append(1))
    num_rows = sum(1 for block in blocks[:3] for _ in block_rows(block))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_rows == 3000 and len(blocks) == 20 and ticks
    assert peak < 5_000_000, "the file has 30 MB"


def test_a_file_that_shrinks_while_it_is_read_stops_the_run(tmp_path):
    sets = sets_of(tmp_path, [row(answer=str(n)) for n in range(5)])
    blocks = record_blocks(sets, 5)
    write_lines(tmp_path / "a.jsonl", [row()])
    with pytest.raises(UserError, match=r"a.jsonl became shorter"):
        list(block_rows(blocks[0]))


def test_estimate_counts_pictures_and_survives_bad_rows(tmp_path):
    sets = sets_of(tmp_path, [row("a.png"), b"{", row("absent.png"), row()] * 25)
    data = picture(1, (300, 300))
    (tmp_path / "images" / "a.png").write_bytes(data)
    estimate = estimated_bytes(record_blocks(sets, 10))
    assert 25 * len(data) <= estimate <= 25 * len(data) + 100 * 5000
    assert estimated_bytes([]) == 0


def test_estimate_weighs_files_of_long_and_of_short_rows_by_their_rows(tmp_path):
    data = picture(1, (300, 300))
    (tmp_path / "a.png").write_bytes(data)
    for n in range(3):
        write_lines(tmp_path / f"{n}.jsonl", [row("a.png", answer=str(k)) for k in range(4)])
    write_lines(tmp_path / "9.jsonl", [row(answer=str(k)) for k in range(1000)])
    blocks = record_blocks(record_sets(RecordsConfig(format="llava", path=tmp_path)), 1000)
    estimate = estimated_bytes(blocks)
    assert 12 * len(data) <= estimate <= 12 * len(data) + 1012 * 3000


def test_demo_blocks_give_rows_with_their_pictures():
    demo = record_sets(RecordsConfig(format="demo", num_samples=7, seed=1))
    blocks = record_blocks(demo, 3)
    assert [block.num_lines for block in blocks] == [3, 3, 1]
    assert [raw.line for block in blocks for raw in block_rows(block)] == list(range(7))
