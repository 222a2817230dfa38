"""LLaVA lists, ShareGPT, parquet and WebDataset tars come to the same rows and pictures."""

import io
import json
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.records.blocks import block_rows, record_blocks
from data_prep.records.config import RecordsConfig, record_sets, records_fingerprint
from data_prep.records.rejection import Rejected
from data_prep.shards.checks import RowRules, checked_sample
from data_prep.shards.split import Shares
from data_prep.shards.write import ShardSettings, write_shard
from tests.record_files import picture, row, write_good_records
from vico.errors import UserError

RULES = RowRules(max_tiles=12, max_pixels=200_000, max_tokens=400, decode=True)
PICTURES = {"a.png": picture(1), "b.jpg": picture(2, format="JPEG"), "c.webp": picture(3, format="WEBP")}
QUESTION, ANSWER = "<image>\nwhat?", "this"
TURNS = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def samples_of(config, prompt_format, samples_per_shard=2):
    """line -> sample, or the reason of what is refused; read block by block, the last block first."""
    found = {}
    for block in reversed(record_blocks(record_sets(config), samples_per_shard)):
        for raw in block_rows(block):
            try:
                found[raw.line] = checked_sample(raw, RULES, prompt_format)
            except Rejected as rejected:
                found[raw.line] = rejected.reason
    return dict(sorted(found.items()))


def llava(folder):
    rows = [
        {"id": 1, "image": "a.png", "conversations": TURNS},
        {"id": 2, "image": "b.jpg", "conversations": TURNS, "license": "CC0", "source": "web"},
    ]
    (folder / "llava.json").write_text(json.dumps(rows, indent=1))
    return RecordsConfig(format="llava", path=folder / "llava.json")


def sharegpt(folder):
    rows = [
        {"id": 1, "messages": MESSAGES, "images": ["a.png"]},
        {"id": 2, "conversations": TURNS, "images": ["b.jpg"], "license": "CC0", "source": "web"},
    ]
    (folder / "sharegpt.json").write_text(json.dumps(rows))
    return RecordsConfig(format="sharegpt", path=folder / "sharegpt.json")


def sharegpt_lines(folder):
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": parts}, MESSAGES[1]]
    rows = [
        {"id": 1, "messages": messages, "images": ["a.png"]},
        {"id": 2, "messages": MESSAGES, "images": [{"path": "b.jpg"}], "license": "CC0", "source": "web"},
    ]
    (folder / "sharegpt.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return RecordsConfig(format="sharegpt", path=folder / "sharegpt.jsonl")


def parquet(folder):
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


def parquet_texts(folder):
    """As in FineVision: `texts` of pairs, `images` of the bytes or paths."""
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


def _schema(rows):
    """As inferred, but with bytes and path also where no row of the test has one."""
    picture_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {"image": picture_type, "images": pa.list_(picture_type)}
    inferred = pa.Table.from_pylist([{k: v for k, v in rows[1].items() if k not in types}]).schema
    return pa.schema([*inferred, *((name, types[name]) for name in rows[0] if name in types)])


def webdataset(folder):
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


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    "make",
    [llava, sharegpt, sharegpt_lines, parquet, parquet_texts, webdataset],
    ids=lambda make: make.__name__,
)
def test_every_format_gives_the_same_samples(tmp_path, prompt_format, make):
    for name, data in PICTURES.items():
        (tmp_path / name).write_bytes(data)
    config = make(tmp_path)
    first, second = samples_of(config, prompt_format, samples_per_shard=1).values()
    assert (first.record_id, second.record_id) == ("1", "2")
    assert first.conversations == second.conversations == TURNS
    assert [one.data for one in first.pictures] == [PICTURES["a.png"]], "the original bytes"
    assert [one.data for one in second.pictures] == [PICTURES["b.jpg"]]
    assert (second.license, second.origin, first.license) == ("CC0", "web", "")
    assert RecordsConfig.model_validate_json(config.model_dump_json()) == config


def test_our_own_shards_are_read_as_records(tmp_path, prompt_format):
    """What was sharded once gives the same turns and pictures when the tar is the source."""
    meta = write_good_records(tmp_path, num_rows=9)
    (block,) = record_blocks(record_sets(RecordsConfig(format="internvl", path=meta)), 100)
    original = [checked_sample(raw, RULES, prompt_format) for raw in block_rows(block)]
    write_shard(tmp_path / "00000.tar", block, ShardSettings(RULES, Shares(0.1, 0.1)), prompt_format)
    again = samples_of(RecordsConfig(format="webdataset", path=tmp_path / "*.tar"), prompt_format)
    for before, after in zip(original, again.values(), strict=True):
        assert after.conversations == before.conversations and after.record_id == before.record_id
        assert [one.data for one in after.pictures] == [one.data for one in before.pictures]
        assert after.group == before.group and after.kind == before.kind


def test_bad_rows_of_a_list_have_their_reasons_and_repeated_ones_are_found(tmp_path, prompt_format):
    good = json.dumps(row(answer="x")).encode()
    elements = [good, b'"text"', b"12", b'{"id": NaN}', b'{"id": "\xff"}', good, b"{}", b'{"a": "]},{"}']
    (tmp_path / "l.json").write_bytes(b"\xef\xbb\xbf [\n" + b" ,\n".join(elements) + b"\n]\n")
    config = RecordsConfig(format="llava", path=tmp_path / "l.json")
    for samples_per_shard in (1, 3, 100):
        found = list(samples_of(config, prompt_format, samples_per_shard).values())
        reasons = [
            "not_an_object",
            "not_an_object",
            "not_json",
            "not_utf8",
            "duplicate",
            "broken_row",
            "broken_row",
        ]
        assert found[0].text_tokens > 0 and found[1:] == reasons


@pytest.mark.parametrize(
    "text, words",
    [
        (b'[{"a": 1} {"a": 2}]', r"byte 10 on: ',' is expected"),
        (b'[{"a": 1}, {"a" 2}]', "Expecting ':' delimiter at byte 16"),
        (b'[{"a": 1}, {"a": 2}', "the file ends inside the list"),
        (b'[{"a": 1}, {"a": "never', "Unterminated string"),
        (b"[" + b"[" * 100_000, "nested too deep|Expecting value"),
    ],
)
def test_a_broken_list_is_one_line_with_its_place(tmp_path, text, words):
    (tmp_path / "l.json").write_bytes(text)
    with pytest.raises(UserError, match=words) as caught:
        record_blocks(record_sets(RecordsConfig(format="llava", path=tmp_path / "l.json")), 10)
    assert "l.json" in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_list_has_no_rows(tmp_path):
    (tmp_path / "l.json").write_text(" [ ] ")
    assert record_blocks(record_sets(RecordsConfig(format="llava", path=tmp_path / "l.json")), 10) == []


def test_a_long_list_is_streamed_and_found_again_block_by_block(tmp_path):
    with open(tmp_path / "l.json", "w") as file:
        file.write("[")
        for n in range(20_000):
            file.write(
                ("," if n else "") + json.dumps({"n": n, "pad": "ü" * (500 + n % 700)}, ensure_ascii=False)
            )
        file.write("]")
    tracemalloc.start()
    blocks = record_blocks(record_sets(RecordsConfig(format="llava", path=tmp_path / "l.json")), 999)
    found = [json.loads(raw.content)["n"] for block in blocks[17:19] for raw in block_rows(block)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == list(range(17 * 999, 19 * 999)) and blocks[-1].num_lines == 20_000 - 20 * 999
    assert peak < 12_000_000, "the file has 33 MB"


def test_a_parquet_file_without_turns_or_cut_short_is_refused(tmp_path):
    config = RecordsConfig(format="parquet", path=tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": ["x"], "picture": ["y"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="columns prompt, picture but none of conversations"):
        record_blocks(record_sets(config), 10)
    data = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(data[:-20])
    with pytest.raises(UserError, match=r"p.parquet is no whole parquet file"):
        record_blocks(record_sets(config), 10)


def test_rows_of_parquet_that_lack_something_have_their_reasons(tmp_path, prompt_format):
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
    found = samples_of(RecordsConfig(format="parquet", path=tmp_path), prompt_format)
    reasons = ["missing_image", "broken_row", "image_count", "duplicate", "undecodable_image"]
    assert list(found.values())[1:] == reasons


@pytest.mark.parametrize("name", ["video", "videos"])
@pytest.mark.parametrize("as_list", [False, True])
def test_rows_of_parquet_with_a_video_are_no_text_samples(tmp_path, prompt_format, name, as_list):
    type_ = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": b"v", "path": None}, {"bytes": None, "path": "v.mp4"}, {"bytes": None, "path": None}]
    if as_list:
        type_, values = pa.list_(type_), [[value] for value in values]
    texts = [[{"user": f"what {n}?", "assistant": ANSWER}] for n in range(4)]
    table = pa.table({"texts": texts, name: pa.array([*values, None], type_)})
    pq.write_table(table, tmp_path / "p.parquet")
    found = list(samples_of(RecordsConfig(format="parquet", path=tmp_path), prompt_format).values())
    assert found[:2] == ["video", "video"]
    assert [one.kind for one in found[2:]] == ["text", "text"], "nulls are no video"


def test_samples_of_a_tar_with_a_video_are_no_text_samples(tmp_path, prompt_format):
    members = {}
    for n, end in enumerate(("mp4", "avi", "mov", "mkv", "webm", "0.MP4", "txt")):
        members |= {f"{n}.json": json.dumps(row(answer=f"{n}")).encode(), f"{n}.{end}": b"v"}
    write_tar(tmp_path / "w.tar", members)
    found = samples_of(RecordsConfig(format="webdataset", path=tmp_path / "w.tar"), prompt_format)
    assert [found[n] for n in range(6)] == ["video"] * 6 and found[6].kind == "text"


@pytest.mark.parametrize("kept", [700, 2048 + 300, -1024 * 10])
def test_a_cut_tar_is_refused_and_never_taken_for_a_short_one(tmp_path, kept):
    webdataset(tmp_path)
    data = (tmp_path / "w.tar").read_bytes()
    (tmp_path / "w.tar").write_bytes(data[:kept])
    with pytest.raises(UserError, match=r"w.tar is (no whole tar|cut off)"):
        record_blocks(record_sets(RecordsConfig(format="webdataset", path=tmp_path / "w.tar")), 10)


def test_a_tar_with_a_damaged_header_or_a_sample_without_json(tmp_path, prompt_format):
    config = RecordsConfig(format="webdataset", path=tmp_path / "w.tar")
    write_tar(
        tmp_path / "w.tar", {"a.png": PICTURES["a.png"], "b.json": json.dumps(row()).encode(), "b.txt": b"x"}
    )
    assert samples_of(config, prompt_format)[0] == "broken_row"
    data = bytearray((tmp_path / "w.tar").read_bytes())
    start = data.index(b"b.json")
    data[start : start + 512] = b"?" * 512
    (tmp_path / "w.tar").write_bytes(data)
    with pytest.raises(UserError, match="damaged at byte"):
        record_blocks(record_sets(config), 10)


def test_several_files_are_several_sets_and_a_pattern_without_files_is_refused(tmp_path):
    for name in ("b.tar", "a.tar"):
        write_tar(tmp_path / name, {"x.json": json.dumps(row()).encode()})
    config = RecordsConfig(format="webdataset", path=tmp_path, license="CC0", source="web")
    sets = record_sets(config, heldout=True)
    assert [(one.name, one.license, one.origin) for one in sets] == [
        ("heldout-a", "CC0", "web"),
        ("heldout-b", "CC0", "web"),
    ]
    assert records_fingerprint(config) != records_fingerprint(config.model_copy(update={"license": ""}))
    with pytest.raises(UserError, match=r"path=.*none\*\.tar names no file"):
        record_sets(RecordsConfig(format="webdataset", path=tmp_path / "none*.tar"))
    with pytest.raises(UserError, match=r"root=.* is not a folder"):
        record_sets(RecordsConfig(format="llava", path=tmp_path / "a.tar", root=tmp_path / "none"))
    with pytest.raises(UserError, match=r"ftp:// is not read"):
        record_sets(RecordsConfig(format="llava", path="ftp://host/a.json"))
