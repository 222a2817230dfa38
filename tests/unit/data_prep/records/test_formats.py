"""LLaVA lists, ShareGPT, parquet and WebDataset tars give the same rows and pictures."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.records.blocks import block_rows, record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.identity import records_fingerprint
from data_prep.records.sets import record_sets
from data_prep.shards.checks import checked_sample
from data_prep.shards.split import Shares
from data_prep.shards.write import ShardSettings, write_shard
from tests.record_files import row, write_good_records
from tests.record_samples import ANSWER, PICTURES, QUESTION, RULES, TURNS, samples_by_line, write_tar
from vico.errors import UserError

MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def llava(folder: Path) -> RecordsConfig:
    rows = [
        {"id": 1, "image": "a.png", "conversations": TURNS},
        {"id": 2, "image": "b.jpg", "conversations": TURNS, "license": "CC0", "source": "web"},
    ]
    (folder / "llava.json").write_text(json.dumps(rows, indent=1))
    return RecordsConfig(format="llava", path=folder / "llava.json")


def sharegpt(folder: Path) -> RecordsConfig:
    rows = [
        {"id": 1, "messages": MESSAGES, "images": ["a.png"]},
        {"id": 2, "conversations": TURNS, "images": ["b.jpg"], "license": "CC0", "source": "web"},
    ]
    (folder / "sharegpt.json").write_text(json.dumps(rows))
    return RecordsConfig(format="sharegpt", path=folder / "sharegpt.json")


def sharegpt_lines(folder: Path) -> RecordsConfig:
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": parts}, MESSAGES[1]]
    rows = [
        {"id": 1, "messages": messages, "images": ["a.png"]},
        {"id": 2, "messages": MESSAGES, "images": [{"path": "b.jpg"}], "license": "CC0", "source": "web"},
    ]
    (folder / "sharegpt.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return RecordsConfig(format="sharegpt", path=folder / "sharegpt.jsonl")


def parquet(folder: Path) -> RecordsConfig:
    rows = [
        {"id": 1, "conversations": TURNS, "image": {"bytes": PICTURES["a.png"], "path": None}},
        {
            "id": 2,
            "conversations": TURNS,
            "image": {"bytes": PICTURES["b.jpg"], "path": "x"},
            "license": "CC0",
            "source": "web",
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema(rows)), folder / "p.parquet", row_group_size=1)
    return RecordsConfig(format="parquet", path=folder)


def parquet_texts(folder: Path) -> RecordsConfig:
    """Write the form of FineVision: `texts` of pairs, `images` with bytes or paths."""
    texts = [{"user": "what?", "assistant": ANSWER}]
    rows = [
        {"id": 1, "texts": texts, "images": [{"bytes": PICTURES["a.png"], "path": None}]},
        {
            "id": 2,
            "texts": texts,
            "images": [{"bytes": None, "path": "b.jpg"}],
            "license": "CC0",
            "source": "web",
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema(rows)), folder / "t.parquet")
    return RecordsConfig(format="parquet", path=folder / "*.parquet", root=folder)


def _schema(rows: list[dict]) -> pa.Schema:
    """Return the inferred schema, with both bytes and path even if no row of the test has one of them."""
    picture_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {"image": picture_type, "images": pa.list_(picture_type)}
    inferred = pa.Table.from_pylist([{k: v for k, v in rows[1].items() if k not in types}]).schema
    return pa.schema([*inferred, *((name, types[name]) for name in rows[0] if name in types)])


def webdataset(folder: Path) -> RecordsConfig:
    rows = [
        {"id": 1, "conversations": TURNS},
        {"id": 2, "messages": MESSAGES, "license": "CC0", "source": "web"},
    ]
    members = {
        "x/0001.json": json.dumps(rows[0]).encode(),
        "x/0001.png": PICTURES["a.png"],
        "x/0002.jpg": PICTURES["b.jpg"],
        "x/0002.json": json.dumps(rows[1]).encode(),
    }
    write_tar(folder / "w.tar", members)
    return RecordsConfig(format="webdataset", path=folder / "w.tar")


@pytest.mark.parametrize(
    "write_records",
    [llava, sharegpt, sharegpt_lines, parquet, parquet_texts, webdataset],
    ids=lambda write_records: write_records.__name__,
)
def test_every_format_gives_the_same_samples(
    tmp_path, prompt_format, write_records: Callable[[Path], RecordsConfig]
):
    for name, data in PICTURES.items():
        (tmp_path / name).write_bytes(data)
    config = write_records(tmp_path)
    first, second = samples_by_line(config, prompt_format, samples_per_shard=1).values()
    assert (first.record_id, second.record_id) == ("1", "2")
    assert first.conversations == second.conversations == TURNS
    assert [picture.data for picture in first.pictures] == [PICTURES["a.png"]], "the original bytes"
    assert [picture.data for picture in second.pictures] == [PICTURES["b.jpg"]]
    assert (second.license, second.origin, first.license) == ("CC0", "web", "")
    assert RecordsConfig.model_validate_json(config.model_dump_json()) == config


def test_our_own_shards_are_read_as_records(tmp_path, prompt_format):
    """Shards give the turns and pictures of the records they were written from."""
    meta = write_good_records(tmp_path, num_rows=9)
    (block,) = record_blocks(record_sets(RecordsConfig(format="internvl", path=meta)), 100)
    original = [checked_sample(raw, RULES, prompt_format) for raw in block_rows(block)]
    write_shard(tmp_path / "00000.tar", block, ShardSettings(RULES, Shares(0.1, 0.1)), prompt_format)
    again = samples_by_line(RecordsConfig(format="webdataset", path=tmp_path / "*.tar"), prompt_format)
    for before, after in zip(original, again.values(), strict=True):
        assert after.conversations == before.conversations and after.record_id == before.record_id
        assert after.pictures == before.pictures
        assert after.group == before.group and after.kind == before.kind


def test_bad_and_repeated_rows_of_a_list_have_their_reasons(tmp_path, prompt_format):
    good = json.dumps(row(answer="x")).encode()
    elements = [
        good,
        b'"text"',
        b"12",
        b'{"id": 1, "id": 2}',
        b'{"id": "\xff"}',
        good,
        b"{}",
        b'{"a": "]},{"}',
    ]
    (tmp_path / "l.json").write_bytes(b"\xef\xbb\xbf [\n" + b" ,\n".join(elements) + b"\n]\n")
    config = RecordsConfig(format="llava", path=tmp_path / "l.json")
    for samples_per_shard in (1, 3, 100):
        results = list(samples_by_line(config, prompt_format, samples_per_shard).values())
        reasons = [
            "not_an_object",
            "not_an_object",
            "not_json",
            "not_utf8",
            "duplicate",
            "broken_row",
            "broken_row",
        ]
        assert results[0].text_tokens > 0 and results[1:] == reasons


@pytest.mark.parametrize(
    "text, words",
    [
        (b'[{"a": 1} {"a": 2}]', r"byte 10 on: ',' is expected"),
        (b'[{"a": 1}, {"a" 2}]', "Expecting ':' delimiter at byte 16"),
        (b'[{"a": 1}, {"a": 2}', "the file ends inside the list"),
        (b'[{"a": 1}, {"a": "never', "Unterminated string"),
        (b'[{"a": 1}]\n[{"a": 2}]', "byte 11 on: the list has ended before"),
        (b"[ ]\n" + b" " * 2_000_000 + b"x", "byte 2000004 on: the list has ended before"),
        (b'[{"from": "human"}]\n[{"from": "human"}]\n', "one row per line"),
        (b"[" + b"[" * 100_000, "nested too deep|Expecting value"),
    ],
)
def test_an_error_in_a_list_is_one_line_with_its_byte(tmp_path, text, words):
    (tmp_path / "l.json").write_bytes(text)
    with pytest.raises(UserError, match=words) as caught:
        record_blocks(record_sets(RecordsConfig(format="llava", path=tmp_path / "l.json")), 10)
    assert "l.json" in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_list_has_no_rows(tmp_path):
    (tmp_path / "l.json").write_text(" [ ] ")
    assert record_blocks(record_sets(RecordsConfig(format="llava", path=tmp_path / "l.json")), 10) == []


def test_a_long_list_is_streamed_and_read_block_by_block(tmp_path):
    with open(tmp_path / "l.json", "w") as file:
        file.write("[")
        for n in range(20_000):
            file.write(
                ("," if n else "") + json.dumps({"n": n, "pad": "ü" * (500 + n % 700)}, ensure_ascii=False)
            )
        file.write("]")
    tracemalloc.start()
    blocks = record_blocks(record_sets(RecordsConfig(format="llava", path=tmp_path / "l.json")), 999)
    numbers = [json.loads(raw.content)["n"] for block in blocks[17:19] for raw in block_rows(block)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == list(range(17 * 999, 19 * 999)) and blocks[-1].num_lines == 20_000 - 20 * 999
    assert peak < 12_000_000, "the file has 33 MB"


def test_several_files_are_several_sets_and_a_pattern_without_files_is_refused(tmp_path):
    for name in ("b.tar", "a.tar"):
        write_tar(tmp_path / name, {"x.json": json.dumps(row()).encode()})
    config = RecordsConfig(format="webdataset", path=tmp_path, license="CC0", source="web")
    sets = record_sets(config, heldout=True)
    assert [(record_set.name, record_set.license, record_set.origin) for record_set in sets] == [
        ("heldout-a", "CC0", "web"),
        ("heldout-b", "CC0", "web"),
    ]
    assert records_fingerprint(config) != records_fingerprint(config.model_copy(update={"license": ""}))
    with pytest.raises(UserError, match=r"path=.*none\*\.tar matches no file"):
        record_sets(RecordsConfig(format="webdataset", path=tmp_path / "none*.tar"))
    with pytest.raises(UserError, match=r"root=.* is not a folder"):
        record_sets(RecordsConfig(format="llava", path=tmp_path / "a.tar", root=tmp_path / "none"))
    with pytest.raises(UserError, match=r"ftp:// cannot be read"):
        record_sets(RecordsConfig(format="llava", path="ftp://host/a.json"))
