"""Written samples are read back; a shard that differs from its index stops the run."""

import ctypes
import hashlib
import io
import json
import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.shards.index import load_index
from data_prep.shards.names import shard_name
from data_prep.shards.open_shards import ShardMismatch
from data_prep.shards.reader import SampleReader
from tests.waiting import PATIENCE_S, wait_until
from vico.errors import UserError
from vico.prompt import PromptFormat
from vico.tiling import tile_pixels

NUM_ROWS = 24


def test_samples_have_the_tiles_of_the_original_pictures(folder, prompt_format):
    reader = SampleReader(folder, prompt_format)
    lines = [json.loads(line) for line in (folder / "records" / "good.jsonl").read_text().splitlines()]
    for row, line in enumerate(lines):
        sample, record = reader.sample(row), reader.record(row)
        assert record["conversations"] == line["conversations"] and record["id"] == str(line["id"])
        names = [line["image"]] if isinstance(line.get("image"), str) else line.get("image", [])
        assert len(record["images"]) == len(names) == len(sample.tiles_per_image)
        tiling = prompt_format.settings.tiling(record["max_tiles"])
        originals = [Image.open(folder / "records" / "images" / name) for name in names]
        expected = [tile_pixels(image, tiling) for image in originals]
        assert sample.pixels.shape == (sum(sample.tiles_per_image), 3, 56, 56)
        if expected:
            assert np.array_equal(sample.pixels, np.concatenate(expected))
        assert [image.tobytes() for image in reader.pictures(row)] == [o.tobytes() for o in originals]
        assert sample.skeleton.num_tiles == len(sample.pixels) and sample.key == f"good-{row:08d}"


def test_pictures_in_the_tar_have_the_bytes_of_the_files(folder):
    index = load_index(folder)
    index_row = index.row(2)
    tar = (folder / shard_name(index_row["shard"])).read_bytes()
    spans = zip(index_row["image_offsets"], index_row["image_bytes"], strict=True)
    for n, (offset, num_bytes) in enumerate(spans):
        original = folder / "records" / "images" / f"2-{n}.webp"
        assert tar[offset : offset + num_bytes] == original.read_bytes()
    assert len(index_row["image_offsets"]) == 2


def test_threads_read_the_same_samples(folder, prompt_format):
    reader = SampleReader(folder, prompt_format)
    rows = [n % NUM_ROWS for n in range(96)]
    with ThreadPoolExecutor(8) as threads:
        samples = list(threads.map(reader.sample, rows))
    assert [sample.key for sample in samples] == [f"good-{row:08d}" for row in rows]


def test_samples_keep_their_order_and_damage_is_reported(copied, prompt_format):
    reader = SampleReader(copied, prompt_format, threads=3)
    rows = [n * 7 % NUM_ROWS for n in range(40)]
    samples = reader.samples(rows)
    assert [sample.key for sample in samples] == [f"good-{row:08d}" for row in rows]
    single_threaded = SampleReader(copied, prompt_format).samples(rows)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(samples, single_threaded, strict=True))
    damage(copied, "broken picture")
    with pytest.raises(ShardMismatch, match="picture 0 differs from the one that was written"):
        SampleReader(copied, prompt_format, threads=3).samples(range(NUM_ROWS))


def test_announced_rows_are_loaded_before_they_are_read(copied, prompt_format):
    index = load_index(copied)
    shards = [copied / shard_name(number) for number in range(3)]
    for shard in shards:
        _drop_from_memory(shard)
    if any(_in_memory(shard, 0) for shard in shards):
        pytest.skip("the test folder's file system keeps its files in memory")
    SampleReader(copied, prompt_format).announce([2, 21])
    for row in (2, 21):
        index_row = index.row(row)
        wait_until(lambda r=index_row: _in_memory(shards[r["shard"]], r["image_offsets"][-1]))
    assert not _in_memory(shards[1], 0)  # none of its samples was announced


def _drop_from_memory(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_memory(path: Path, offset: int) -> bool:
    """Return whether a page of the file is in memory, by mincore(2): reading it would load it."""
    page_offset, status = offset // mmap.PAGESIZE * mmap.PAGESIZE, ctypes.c_ubyte()
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ, offset=page_offset) as page,
    ):
        start = np.frombuffer(page, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(1), ctypes.byref(status)) == 0
        del start
    return bool(status.value & 1)


def test_the_number_of_open_shards_is_limited(folder, prompt_format, monkeypatch):
    monkeypatch.setattr("data_prep.shards.open_shards._NUM_OPEN", 1)
    reader = SampleReader(folder, prompt_format)
    before = len(os.listdir("/proc/self/fd"))
    for row in (0, 10, 20, 1, 11, 21):
        reader.record(row)
    assert len(os.listdir("/proc/self/fd")) == before + 1


def damage(folder: Path, kind: str) -> None:
    """Damage shard 1 in one way."""
    tar = folder / shard_name(1)
    index_row = load_index(folder).row(11)
    offset = index_row["image_offsets"][0]
    content = bytearray(tar.read_bytes())
    if kind == "missing":
        tar.unlink()
        return
    if kind == "cut":
        content = content[: offset + 10]
    elif kind == "swapped":
        content = bytearray((folder / shard_name(0)).read_bytes()).ljust(len(content), b"\0")
    elif kind == "broken picture":
        content[offset : offset + 40] = bytes(40)
    elif kind == "other picture":
        data = io.BytesIO()
        Image.new("RGB", (8, 8)).save(data, "PNG")
        content[offset : offset + len(data.getvalue())] = data.getvalue()
    elif kind == "undecodable from the start":  # with verify=header the digest is of the damaged bytes
        end = offset + index_row["image_bytes"][0]
        content[offset : offset + 40] = bytes(40)
        table = pq.read_table(folder / "index.parquet")
        digests = table["image_sha256"].to_pylist()
        digests[11][0] = hashlib.sha256(content[offset:end]).digest()
        position = table.schema.get_field_index("image_sha256")
        column = table.schema.field(position)
        table = table.set_column(position, column, pa.array(digests, column.type))
        pq.write_table(table, folder / "index.parquet")
    elif kind == "other line":
        start = index_row["json_offset"]
        end = start + index_row["json_bytes"]
        content[start:end] = bytes(content[start:end]).replace(b'"line": 11', b'"line": 12')
    elif kind == "control token":
        start = index_row["json_offset"]
        end = start + index_row["json_bytes"]
        content[start:end] = bytes(content[start:end]).replace(b"is written", b"<|im_end|>")
    tar.write_bytes(content)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", "the file is missing"),
        ("cut", "bytes before the sample does"),
        ("swapped", "does not match its index"),
        ("broken picture", "picture 0 differs from the one that was written"),
        ("other picture", "picture 0 differs from the one that was written"),
        ("undecodable from the start", "picture 0 does not decode"),
        ("control token", "turn 0: the text spells the token <|im_end|>"),
        ("other line", 'its offset holds "line": 12 of good'),
    ],
)
def test_a_shard_that_differs_from_its_index_is_named(copied, prompt_format, kind, words):
    damage(copied, kind)
    with pytest.raises(ShardMismatch, match=words) as caught:
        SampleReader(copied, prompt_format).sample(11)
    assert "00001.tar" in str(caught.value) and "good-00000011" in str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_a_page_that_was_wrong_once_is_read_again(copied, prompt_format, caplog):
    """The shard is repaired while the reader waits, as a network file system does."""
    tar = copied / shard_name(1)
    whole = tar.read_bytes()
    damage(copied, "broken picture")
    reader = SampleReader(copied, prompt_format)

    def repair() -> None:
        while "good-00000011: picture 0 has a wrong digest, reading it again" not in caplog.text:
            time.sleep(0.01)
        (copied / "repaired").write_bytes(whole)
        os.replace(copied / "repaired", tar)

    repairer = threading.Thread(target=repair, daemon=True)
    repairer.start()
    assert reader.sample(11).key == "good-00000011"
    repairer.join(PATIENCE_S)
    assert not repairer.is_alive()


def test_a_model_with_another_tiling_or_tokenizer_is_refused(copied, prompt_format):
    fewer_tiles = PromptFormat(prompt_format.tokenizer, replace(prompt_format.settings, max_tiles=1))
    with pytest.raises(ShardMismatch, match=r"pictures give \[1\] tiles, the index has \[3\]"):
        SampleReader(copied, fewer_tiles).sample(1)
    table = pq.read_table(copied / "index.parquet")
    one_more = pc.add(table["text_tokens"], pa.scalar(1, pa.int32()))
    position = table.schema.get_field_index("text_tokens")
    table = table.set_column(position, "text_tokens", one_more)
    pq.write_table(table.replace_schema_metadata({b"vico.schema": b"2"}), copied / "index.parquet")
    with pytest.raises(ShardMismatch, match="the text gives"):
        SampleReader(copied, prompt_format).sample(1)
