"""Damaged files, incomplete rows and videos in parquet files and WebDataset tars."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.sets import record_sets
from tests.record_files import row
from tests.record_samples import ANSWER, PICTURES, TURNS, samples_by_line, write_tar
from vico.errors import UserError


def test_a_parquet_file_without_turns_or_cut_short_is_refused(tmp_path):
    config = RecordsConfig(format="parquet", path=tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": ["x"], "picture": ["y"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="columns prompt, picture but none of conversations"):
        record_blocks(record_sets(config), 10)
    data = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(data[:-20])
    with pytest.raises(UserError, match=r"p.parquet is not a complete parquet file"):
        record_blocks(record_sets(config), 10)


def test_incomplete_rows_of_parquet_have_their_reasons(tmp_path, prompt_format):
    picture_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    good = {"bytes": PICTURES["a.png"], "path": None}
    table = pa.table(
        {
            "conversations": pa.array([TURNS, TURNS, None, TURNS, TURNS, TURNS], turns),
            "image": pa.array(
                [good, {"bytes": None, "path": None}, good, None, good, {"bytes": b"?", "path": "../x"}],
                picture_type,
            ),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    results = samples_by_line(RecordsConfig(format="parquet", path=tmp_path), prompt_format)
    reasons = ["missing_image", "broken_row", "image_count", "duplicate", "undecodable_image"]
    assert list(results.values())[1:] == reasons


@pytest.mark.parametrize("name", ["video", "videos"])
@pytest.mark.parametrize("as_list", [False, True])
def test_rows_of_parquet_with_a_video_are_not_text_samples(tmp_path, prompt_format, name, as_list):
    type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": b"v", "path": None}, {"bytes": None, "path": "v.mp4"}, {"bytes": None, "path": None}]
    if as_list:
        type_, values = pa.list_(type_), [[value] for value in values]
    texts = [[{"user": f"what {n}?", "assistant": ANSWER}] for n in range(4)]
    table = pa.table({"texts": texts, name: pa.array([*values, None], type_)})
    pq.write_table(table, tmp_path / "p.parquet")
    results = list(samples_by_line(RecordsConfig(format="parquet", path=tmp_path), prompt_format).values())
    assert results[:2] == ["video", "video"]
    assert [sample.kind for sample in results[2:]] == ["text", "text"], "nulls are not a video"


def test_samples_of_a_tar_with_a_video_are_not_text_samples(tmp_path, prompt_format):
    members = {}
    for n, end in enumerate(("mp4", "avi", "mov", "mkv", "webm", "0.MP4", "txt")):
        members |= {f"{n}.json": json.dumps(row(answer=f"{n}")).encode(), f"{n}.{end}": b"v"}
    write_tar(tmp_path / "w.tar", members)
    results = samples_by_line(RecordsConfig(format="webdataset", path=tmp_path / "w.tar"), prompt_format)
    assert [results[n] for n in range(6)] == ["video"] * 6 and results[6].kind == "text"


@pytest.mark.parametrize("kept", [700, 2048 + 300, -1024 * 10])
def test_a_cut_tar_is_refused_and_not_read_as_a_shorter_one(tmp_path, kept):
    turns = json.dumps({"conversations": TURNS}).encode()
    members = {"1.json": turns, "1.png": PICTURES["a.png"], "2.jpg": PICTURES["b.jpg"], "2.json": turns}
    write_tar(tmp_path / "w.tar", members)
    data = (tmp_path / "w.tar").read_bytes()
    (tmp_path / "w.tar").write_bytes(data[:kept])
    with pytest.raises(UserError, match=r"w.tar is (not a complete tar|cut off)"):
        record_blocks(record_sets(RecordsConfig(format="webdataset", path=tmp_path / "w.tar")), 10)


def test_a_sample_without_json_is_rejected_and_a_damaged_header_refused(tmp_path, prompt_format):
    config = RecordsConfig(format="webdataset", path=tmp_path / "w.tar")
    write_tar(
        tmp_path / "w.tar", {"a.png": PICTURES["a.png"], "b.json": json.dumps(row()).encode(), "b.txt": b"x"}
    )
    assert samples_by_line(config, prompt_format)[0] == "broken_row"
    data = bytearray((tmp_path / "w.tar").read_bytes())
    start = data.index(b"b.json")
    data[start : start + 512] = b"?" * 512
    (tmp_path / "w.tar").write_bytes(data)
    with pytest.raises(UserError, match="damaged at byte"):
        record_blocks(record_sets(config), 10)
