"""Damaged files, incomplete rows and videos in parquet files and WebDataset tars."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.sets import record_sets
from tests.record_files import picture, row
from tests.record_samples import ANSWER, PICTURES, QUESTION, TURNS, samples_by_line, write_tar
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


def test_turns_of_parquet_may_be_json_text(tmp_path, prompt_format):
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    table = pa.table(
        {
            "conversations": [json.dumps(TURNS), None, "not JSON", '{"a": 1}', "[1, 2", None],
            "messages": [None, json.dumps(messages), None, None, None, None],
            "texts": [*[None] * 5, json.dumps([{"user": "what?", "assistant": ANSWER}])],
            "image": [picture(n) for n in range(6)],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    results = list(samples_by_line(RecordsConfig(format="parquet", path=tmp_path), prompt_format).values())
    assert results[2:5] == ["broken_row"] * 3
    assert [result.conversations for result in results if not isinstance(result, str)] == [TURNS] * 3


@pytest.mark.parametrize("names", [("question", "answer"), ("query", "response")])
def test_a_question_and_its_answer_may_be_two_columns_of_parquet(tmp_path, prompt_format, names):
    pictures = [[picture(n)] for n in range(4)]
    pictures[1].append(picture(9))
    table = pa.table(
        {
            names[0]: ["what?", "compare", "<image>\nwhat?", None],
            names[1]: [ANSWER, "two", ANSWER, ANSWER],
            "images": pictures,
            "score": [1, 2, 3, 4],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    config = RecordsConfig(format="parquet", path=tmp_path)
    one, two, marked, bad = samples_by_line(config, prompt_format).values()
    assert one.conversations == marked.conversations == TURNS
    assert two.conversations[0]["value"] == "<image>\n<image>\ncompare" and bad == "broken_row"
    assert [p.data for p in two.pictures] == pictures[1]
    assert one.fields == {"score": 1}, "question and answer are in the turns"


BYTES_AND_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    "name, value, type_, reason",
    [
        ("picture", picture(1), pa.binary(), "unread_field"),
        ("jpg", picture(1, format="JPEG"), pa.large_binary(), "unread_field"),
        ("image_0", {"bytes": picture(1), "path": None}, BYTES_AND_PATH, "unread_field"),
        ("screenshot", {"bytes": None, "path": "a.png"}, BYTES_AND_PATH, "unread_field"),
        ("frames", [{"bytes": picture(1), "path": None}], pa.list_(BYTES_AND_PATH), "unread_field"),
        ("photo", b"\0\0\0\x18ftypheic", pa.binary(), "unread_field"),
        ("clip", {"bytes": b"\0\0\0\x18ftypisom", "path": None}, BYTES_AND_PATH, "video"),
        ("image", b"\0\0\0\x18ftypisom", pa.binary(), "video"),
        ("audio", {"bytes": b"x", "path": "a.wav"}, BYTES_AND_PATH, "audio"),
        ("sound", {"bytes": b"RIFF\0\0\0\0WAVEfmt ", "path": None}, BYTES_AND_PATH, "audio"),
        ("speech", {"bytes": None, "path": "x.flac"}, BYTES_AND_PATH, "audio"),
        (
            "speech",
            {"array": [0.5], "sampling_rate": 16000},
            pa.struct([("array", pa.list_(pa.float32())), ("sampling_rate", pa.int32())]),
            "audio",
        ),
        ("embedding", b"\x00\x01\x02\x03", pa.binary(), None),
        ("empty", {"bytes": None, "path": None}, BYTES_AND_PATH, None),
    ],
)
def test_a_column_that_holds_media_and_is_not_read_rejects_the_row(
    tmp_path, prompt_format, name, value, type_, reason
):
    texts = [[{"user": f"what {n}?", "assistant": ANSWER}] for n in range(2)]
    columns = {"texts": texts, name: pa.array([value, None], type_)}
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    first, second = samples_by_line(RecordsConfig(format="parquet", path=tmp_path), prompt_format).values()
    assert first == reason if reason else first.kind == "text"
    assert second.kind == "text"


def test_two_columns_of_pictures_reject_the_row_unless_one_is_empty(tmp_path, prompt_format):
    columns = {
        "conversations": [TURNS] * 3,
        "image": [PICTURES["a.png"], None, PICTURES["b.jpg"]],
        "images": [[PICTURES["b.jpg"]], [PICTURES["b.jpg"]], []],
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    config = RecordsConfig(format="parquet", path=tmp_path)
    both, images, image = samples_by_line(config, prompt_format).values()
    assert both == "broken_row"
    assert [p.data for p in (*images.pictures, *image.pictures)] == [PICTURES["b.jpg"]] * 2


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


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_tar_that_goes_on_after_its_end_is_refused(tmp_path, compress):
    turns = json.dumps({"conversations": TURNS}).encode()
    write_tar(tmp_path / "w.tar", {"1.json": turns, "1.png": PICTURES["a.png"]})
    data = compress((tmp_path / "w.tar").read_bytes())
    config = RecordsConfig(format="webdataset", path=tmp_path / "w.tar")
    for more in (data, compress(b"junk")):
        (tmp_path / "w.tar").write_bytes(data + more)
        with pytest.raises(UserError, match=r"w.tar goes on after the end of its tar"):
            record_blocks(record_sets(config), 10)


def test_a_picture_of_a_tar_may_have_any_number_in_its_name(tmp_path, prompt_format):
    turns = json.dumps({"conversations": TURNS}).encode()
    write_tar(tmp_path / "w.tar", {"1.json": turns, f"1.{'9' * 5000}.png": PICTURES["a.png"]})
    results = samples_by_line(RecordsConfig(format="webdataset", path=tmp_path / "w.tar"), prompt_format)
    assert not isinstance(results[0], str)


@pytest.mark.parametrize(
    "value, kind",
    [(2**30, pa.date32()), (2**62, pa.timestamp("us")), (5, pa.timestamp("us", "Nowhere/City"))],
)
def test_a_value_that_python_cannot_hold_rejects_its_row(tmp_path, prompt_format, value, kind):
    texts = [json.dumps([TURNS[0] | {"value": "what?"}, TURNS[1] | {"value": str(n)}]) for n in range(3)]
    when = pa.array([None, value, None], pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
    pq.write_table(pa.table({"conversations": texts, "when": when}), tmp_path / "p.parquet")
    results = samples_by_line(RecordsConfig(format="parquet", path=tmp_path / "p.parquet"), prompt_format)
    assert results[1] == "broken_row" and not any(isinstance(results[n], str) for n in (0, 2))


def test_rows_with_lists_of_other_lengths_are_no_duplicates(tmp_path, prompt_format):
    turns = json.dumps([TURNS[0] | {"value": "what?"}, TURNS[1]])
    lists = [[[1, 2, 3, 4], [5, 6]], [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]]
    blobs = [b"None", b"None", b"None"]
    table = pa.table({"conversations": [turns] * 3, "boxes": lists, "x": pa.array(blobs, pa.binary())})
    pq.write_table(table, tmp_path / "p.parquet")
    results = samples_by_line(RecordsConfig(format="parquet", path=tmp_path / "p.parquet"), prompt_format)
    assert "duplicate" not in (results[0], results[1]) and results[2] == "duplicate"


def test_a_large_row_group_is_a_warning_with_the_remedy(tmp_path, caplog):
    turns = [json.dumps([TURNS[0], TURNS[1] | {"value": str(n)}]) for n in range(50)]
    config = RecordsConfig(format="parquet", path=tmp_path / "p.parquet")
    for size, words in ((50, "row_group_size=2 "), (5, "")):
        caplog.clear()
        pq.write_table(pa.table({"conversations": turns}), tmp_path / "p.parquet", row_group_size=size)
        assert len(record_blocks(record_sets(config), 2)) == 25
        assert words in caplog.text and bool(words) == bool(caplog.records)


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
