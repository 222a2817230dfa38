"""What was written is read back; a shard that disagrees with its index stops the run."""

import ctypes
import hashlib
import io
import json
import mmap
import os
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig, record_sets
from data_prep.shards.checks import RowRules
from data_prep.shards.folder import contents, write_index, write_sidecar
from data_prep.shards.index import load_index
from data_prep.shards.names import shard_name, sidecar_name
from data_prep.shards.reader import SampleReader, ShardMismatch
from data_prep.shards.split import Shares
from data_prep.shards.write import ShardSettings, write_shard
from tests.integration.demo_pipeline import wait_until
from tests.record_files import write_good_records
from vico.errors import UserError
from vico.prompt import PromptFormat
from vico.tiling import pixel_values

SETTINGS = ShardSettings(RowRules(12, 10**6, 4096, True), Shares(0.2, 0.2))
NUM_ROWS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prompt_format):
    """Three shards with their index, and the records they were made of beside them."""
    root = tmp_path_factory.mktemp("shards")
    meta = write_good_records(root / "records", NUM_ROWS)
    blocks = record_blocks(record_sets(RecordsConfig(format="internvl", path=meta)), 10)
    (root / "sidecars").mkdir()
    for block in blocks:
        content = write_shard(root / shard_name(block.number), block, SETTINGS, prompt_format)
        assert content.quarantine == []
        write_sidecar(root / sidecar_name(block.number), content)
    write_index(root / "index.parquet", contents(root, len(blocks)))
    return root


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


def test_the_index_is_one_row_a_sample_in_order(folder):
    index = load_index(folder)
    assert len(index) == NUM_ROWS
    assert [index.row(n)["key"] for n in range(NUM_ROWS)] == [f"good-{n:08d}" for n in range(NUM_ROWS)]
    assert [index.row(n)["shard"] for n in (0, 9, 10, 23)] == [0, 0, 1, 2]
    with pytest.raises(IndexError, match="row 24 of 24"):
        index.row(24)


def test_columns_of_the_splits_cover_the_index(folder):
    index = load_index(folder)
    splits = {name: index.columns(name) for name in ("train", "calib", "test")}
    assert sorted(np.concatenate([c.rows for c in splits.values()]).tolist()) == list(range(NUM_ROWS))
    for name, columns in splits.items():
        assert len(columns) > 0
        for i, row in enumerate(columns.rows.tolist()):
            entry = index.row(row)
            assert entry["split"] == name and columns.name(i) == entry["key"]
            tiles = columns.image_tiles[columns.image_starts[i] : columns.image_starts[i + 1]]
            assert tiles.tolist() == entry["tiles"] and columns.num_tiles[i] == sum(entry["tiles"])
    table = index.table(["key", "kind"], "calib")
    assert table.column_names == ["key", "kind", "row"]
    assert table["row"].to_pylist() == splits["calib"].rows.tolist()


def test_an_index_goes_to_another_process(folder):
    assert pickle.loads(pickle.dumps(load_index(folder))).row(3) == load_index(folder).row(3)


def test_samples_are_the_tiles_of_the_original_pictures(folder, prompt_format):
    reader = SampleReader(folder, prompt_format)
    lines = [json.loads(line) for line in (folder / "records" / "good.jsonl").read_text().splitlines()]
    for row, line in enumerate(lines):
        sample, record = reader.sample(row), reader.record(row)
        assert record["conversations"] == line["conversations"] and record["id"] == str(line["id"])
        names = [line["image"]] if isinstance(line.get("image"), str) else line.get("image", [])
        assert len(record["images"]) == len(names) == len(sample.tiles_per_image)
        tiling = prompt_format.settings.tiling(record["max_tiles"])
        originals = [Image.open(folder / "records" / "images" / name) for name in names]
        expected = [pixel_values(image, tiling) for image in originals]
        assert sample.pixels.shape == (sum(sample.tiles_per_image), 3, 56, 56)
        if expected:
            assert np.array_equal(sample.pixels, np.concatenate(expected))
        found = reader.pictures(row)
        assert [f.tobytes() for f in found] == [o.tobytes() for o in originals]
        assert sample.skeleton.num_tiles == len(sample.pixels) and sample.key == f"good-{row:08d}"


def test_picture_bytes_in_the_tar_are_the_files(folder):
    index = load_index(folder)
    entry = index.row(2)
    tar = (folder / shard_name(entry["shard"])).read_bytes()
    for n, (offset, num_bytes) in enumerate(zip(entry["image_offsets"], entry["image_bytes"], strict=True)):
        assert (
            tar[offset : offset + num_bytes] == (folder / "records" / "images" / f"2-{n}.webp").read_bytes()
        )
    assert len(entry["image_offsets"]) == 2


def test_threads_read_the_same_samples(folder, prompt_format):
    reader = SampleReader(folder, prompt_format)
    rows = [n % NUM_ROWS for n in range(96)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(reader.sample, rows))
    assert [sample.key for sample in found] == [f"good-{row:08d}" for row in rows]


def test_samples_come_in_the_order_asked_for_and_damage_is_not_lost(copied, prompt_format):
    reader = SampleReader(copied, prompt_format, threads=3)
    rows = [n * 7 % NUM_ROWS for n in range(40)]
    found = reader.samples(rows)
    assert [sample.key for sample in found] == [f"good-{row:08d}" for row in rows]
    alone = SampleReader(copied, prompt_format).samples(rows)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(found, alone, strict=True))
    damaged(copied, "broken picture")
    with pytest.raises(ShardMismatch, match="picture 0 has other bytes"):
        SampleReader(copied, prompt_format, threads=3).samples(range(NUM_ROWS))


def test_what_is_announced_is_fetched_before_it_is_read(copied, prompt_format):
    index = load_index(copied)
    shards = [copied / shard_name(number) for number in range(3)]
    for shard in shards:
        _out_of_memory(shard)
    if any(_in_memory(shard, 0) for shard in shards):
        pytest.skip("the test folder's file system keeps its files in memory")
    SampleReader(copied, prompt_format).announce([2, 21])
    for row in (2, 21):
        entry = index.row(row)
        wait_until(lambda e=entry: _in_memory(shards[e["shard"]], e["image_offsets"][-1]), 10)
    assert not _in_memory(shards[1], 0)  # none of its samples was named


def _out_of_memory(path) -> None:
    with open(path, "rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_memory(path, offset) -> bool:
    """Asked through mincore(2): trying to read would fetch the page."""
    place, found = offset // mmap.PAGESIZE * mmap.PAGESIZE, ctypes.c_ubyte()
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ, offset=place) as page,
    ):
        start = np.frombuffer(page, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(1), ctypes.byref(found)) == 0
        del start
    return bool(found.value & 1)


def test_no_more_shards_stay_open_than_are_used(folder, prompt_format, monkeypatch):
    monkeypatch.setattr("data_prep.shards.reader._OPEN_SHARDS", 1)
    reader = SampleReader(folder, prompt_format)
    before = len(os.listdir("/proc/self/fd"))
    for row in (0, 10, 20, 1, 11, 21):
        reader.record(row)
    assert len(os.listdir("/proc/self/fd")) == before + 1


def damaged(folder, what):
    """Spoil shard 1 in one way."""
    tar = folder / shard_name(1)
    entry = load_index(folder).row(11)
    offset = entry["image_offsets"][0]
    content = bytearray(tar.read_bytes())
    if what == "missing":
        tar.unlink()
        return
    if what == "cut":
        content = content[: offset + 10]
    elif what == "swapped":
        content = bytearray((folder / shard_name(0)).read_bytes()).ljust(len(content), b"\0")
    elif what == "broken picture":
        content[offset : offset + 40] = bytes(40)
    elif what == "other picture":
        data = io.BytesIO()
        Image.new("RGB", (8, 8)).save(data, "PNG")
        content[offset : offset + len(data.getvalue())] = data.getvalue()
    elif (
        what == "undecodable from the start"
    ):  # sharded with verify=header: the digest is of the broken bytes
        end = offset + entry["image_bytes"][0]
        content[offset : offset + 40] = bytes(40)
        table = pq.read_table(folder / "index.parquet")
        digests = table["image_sha256"].to_pylist()
        digests[11][0] = hashlib.sha256(content[offset:end]).digest()
        place = table.schema.get_field_index("image_sha256")
        table = table.set_column(
            place, table.schema.field(place), pa.array(digests, table.schema[place].type)
        )
        pq.write_table(table, folder / "index.parquet")
    elif what == "other line":
        start, end = entry["json_offset"], entry["json_offset"] + entry["json_bytes"]
        content[start:end] = bytes(content[start:end]).replace(b'"line": 11', b'"line": 12')
    tar.write_bytes(content)


@pytest.mark.parametrize(
    "what, words",
    [
        ("missing", "the file is missing"),
        ("cut", "bytes before the sample does"),
        ("swapped", "does not match its index"),
        ("broken picture", "picture 0 has other bytes than when it was written"),
        ("other picture", "picture 0 has other bytes than when it was written"),
        ("undecodable from the start", "picture 0 does not decode"),
        ("other line", "line 12 of good lies at its offset"),
    ],
)
def test_a_shard_that_disagrees_with_its_index_is_named(copied, prompt_format, what, words):
    damaged(copied, what)
    with pytest.raises(ShardMismatch, match=words) as caught:
        SampleReader(copied, prompt_format).sample(11)
    assert "00001.tar" in str(caught.value) and "good-00000011" in str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_a_page_that_was_wrong_once_is_read_again(copied, prompt_format, caplog):
    """The shard is put right while the reader waits, as a network file system does."""
    tar = copied / shard_name(1)
    whole = tar.read_bytes()
    damaged(copied, "broken picture")
    reader = SampleReader(copied, prompt_format)

    def mend():
        while "good-00000011: picture 0 has a wrong digest, reading it again" not in caplog.text:
            time.sleep(0.01)
        (copied / "mended").write_bytes(whole)
        os.replace(copied / "mended", tar)

    mended = threading.Thread(target=mend, daemon=True)
    mended.start()
    assert reader.sample(11).key == "good-00000011"
    mended.join(10)
    assert not mended.is_alive()


def test_another_tiling_or_tokenizer_than_the_index_is_refused(copied, prompt_format):
    fewer_tiles = PromptFormat(prompt_format.tokenizer, replace(prompt_format.settings, max_tiles=1))
    with pytest.raises(ShardMismatch, match=r"pictures give \[1\] tiles, the index has \[3\]"):
        SampleReader(copied, fewer_tiles).sample(1)
    table = pq.read_table(copied / "index.parquet")
    one_more = pc.add(table["text_tokens"], pa.scalar(1, pa.int32()))
    place = table.schema.get_field_index("text_tokens")
    table = table.set_column(place, "text_tokens", one_more)
    pq.write_table(table.replace_schema_metadata({b"vico.schema": b"2"}), copied / "index.parquet")
    with pytest.raises(ShardMismatch, match="the text gives"):
        SampleReader(copied, prompt_format).sample(1)


def test_a_missing_or_foreign_index_is_refused(copied, tmp_path):
    with pytest.raises(UserError, match=r"index.parquet does not exist"):
        load_index(tmp_path)
    table = pq.read_table(copied / "index.parquet")
    pq.write_table(table.replace_schema_metadata({b"vico.schema": b"99"}), copied / "index.parquet")
    with pytest.raises(UserError, match="has schema 99, this version reads 2"):
        load_index(copied)


def test_a_tar_of_another_size_than_written_is_found_before_the_index_is_made(copied):
    with open(copied / shard_name(2), "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"00002.tar has \d+ bytes but was written with"):
        list(contents(copied, 3))


def test_row_groups_are_even_and_rows_are_found_in_them(copied, monkeypatch):
    monkeypatch.setattr("data_prep.shards.folder._ROWS_PER_GROUP", 7)
    monkeypatch.setattr("data_prep.shards.index._CACHED_ROW_GROUPS", 2)
    whole = load_index(copied)
    expected = [whole.row(n) for n in range(NUM_ROWS)]
    write_index(copied / "index.parquet", contents(copied, 3))
    metadata = pq.ParquetFile(copied / "index.parquet").metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [7, 7, 7, 3]
    index = load_index(copied)
    order = [23, 0, 7, 6, 14, 21, 1, *range(NUM_ROWS)]
    assert [index.row(n) for n in order] == [expected[n] for n in order]
