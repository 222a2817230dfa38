"""Files that hold no rows of JSON: each is named in one line, and none is left out of a folder."""

import bz2
import gzip
import json
import lzma
import pickle

import pytest

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.sets import record_sets
from tests.record_files import row, write_lines, write_meta
from tests.record_samples import samples_by_line
from vico.errors import UserError

LINE = json.dumps(row()) + "\n"
WRONG = {
    "UTF-16": LINE.encode("utf-16"),
    "UTF-16 ": LINE.encode("utf-16-le"),
    "UTF-32": LINE.encode("utf-32"),
    "gzip": gzip.compress(LINE.encode()),
    "bzip2": bz2.compress(LINE.encode()),
    "xz": lzma.compress(LINE.encode()),
    "lz4": b"\x04\x22\x4d\x18" + bytes(20),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c" + bytes(20),
    "a rar archive": b"Rar!\x1a\x07\1\0",
    "a git-annex pointer": b"/annex/objects/SHA256E-s12--00.jsonl\n",
    "an SQLite database": b"SQLite format 3\0" + bytes(20),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(20),
    "an Avro file": b"Obj\1" + bytes(20),
    "a Python pickle": pickle.dumps([row()]),
    "a zip archive": b"PK\x03\x04" + bytes(20),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "an HTML page": b"<!DOCTYPE html>\n<html>404</html>",
    "a parquet file": b"PAR1" + bytes(20),
    "an Arrow file": b"ARROW1\0\0" + bytes(20),
    "an Arrow stream": b"\xff\xff\xff\xff" + bytes(20),
    "zero bytes": bytes(3000),
    "XML": b"<?xml version='1.0'?>\n<Error><Code>NoSuchKey</Code></Error>",
    "alone": LINE.strip().encode() + b"\r" + LINE.strip().encode(),
    "over several lines": json.dumps(row(), indent=2).encode() * 2,
    "over several lines ": json.dumps({"rows": [row()] * 20_000}, indent=2).encode(),
}


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.parametrize("format", ["llava", "sharegpt", "internvl"])
def test_a_file_that_cannot_hold_rows_is_named_in_one_line(tmp_path, words, format):
    (tmp_path / "a.jsonl").write_bytes(WRONG[words])
    path = write_meta(tmp_path, a={}) if format == "internvl" else tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=words.strip()) as caught:
        record_blocks(record_sets(RecordsConfig(format=format, path=path)), 5)
    assert "a.jsonl" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("words", ["a Git LFS pointer", "an HTML page", "a zip archive", "an Arrow file"])
@pytest.mark.parametrize("format, name", [("parquet", "a.parquet"), ("webdataset", "a.tar")])
def test_a_file_that_is_no_tar_or_parquet_file_is_named_in_one_line(tmp_path, words, format, name):
    (tmp_path / name).write_bytes(WRONG[words])
    with pytest.raises(UserError, match=f"{name} is {words}"):
        record_blocks(record_sets(RecordsConfig(format=format, path=tmp_path / name)), 5)


def test_a_table_as_text_is_named_and_not_read_as_lines(tmp_path):
    (tmp_path / "a.csv").write_text("image,question,answer\na.png,what?,this\n")
    with pytest.raises(UserError, match=r"a\.csv is a table as text; convert it to parquet"):
        record_blocks(record_sets(RecordsConfig(format="llava", path=tmp_path / "a.csv")), 5)


def test_a_list_is_no_lines_of_internvl_and_a_meta_file_may_be_a_pointer(tmp_path):
    config = RecordsConfig(format="internvl", path=write_meta(tmp_path, a={}))
    (tmp_path / "a.jsonl").write_text(json.dumps([row()]))
    with pytest.raises(UserError, match="a JSON list; write one row per line"):
        record_blocks(record_sets(config), 5)
    (tmp_path / "meta.json").write_bytes(WRONG["a Git LFS pointer"])
    with pytest.raises(UserError, match=r"meta.json is a Git LFS pointer"):
        record_sets(config)


@pytest.mark.parametrize("first", [b'{"conversations": [', b"[1, 2]", b"{}", b"{", b"\xff"])
def test_a_bad_first_line_rejects_itself_and_not_the_file(tmp_path, prompt_format, first):
    write_lines(tmp_path / "a.jsonl", [first, row(), {**row(), "id": 1}])
    config = RecordsConfig(format="internvl", path=write_meta(tmp_path, a={}))
    results = list(samples_by_line(config, prompt_format).values())
    assert isinstance(results[0], str) and len(results) == 3 and not isinstance(results[1], str)


def test_a_folder_gives_all_of_its_files(tmp_path):
    for name in ("part1.jsonl", "part2.JSON", "part3.ndjson", "part4.json"):
        write_lines(tmp_path / name, [row()])
    (tmp_path / "readme.txt").write_text("about")
    config = RecordsConfig(format="llava", path=tmp_path)
    assert [record_set.name for record_set in record_sets(config)] == ["part1", "part2", "part3", "part4"]
    (tmp_path / "part5.jsonl.gz").write_bytes(WRONG["gzip"])
    with pytest.raises(UserError, match=r"part5.jsonl.gz is compressed and would be left out"):
        record_sets(config)
    (tmp_path / "part5.jsonl.gz").rename(tmp_path / "part5.jsonl.lz4")
    with pytest.raises(UserError, match=r"part5.jsonl.lz4 is compressed and would be left out"):
        record_sets(config)
    (tmp_path / "part5.jsonl.lz4").unlink()
    (tmp_path / "part5.jsonl").symlink_to("not-fetched")
    with pytest.raises(UserError, match=r"part5.jsonl is not a file"):
        record_sets(config)
    (tmp_path / "part5.jsonl").unlink()
    (tmp_path / "._part1.jsonl").write_bytes(b"\0" * 100)
    pattern = config.model_copy(update={"path": str(tmp_path / "*.jsonl")})
    assert [record_set.name for record_set in record_sets(pattern)] == ["part1"]
    write_lines(tmp_path / "part1.json", [row()])
    with pytest.raises(UserError, match="'part1' and 'part1'"):
        record_sets(config)
