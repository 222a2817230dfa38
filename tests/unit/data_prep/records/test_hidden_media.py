"""Media, weights and texts in fields, spellings and encodings that no list of forms names.

None of them may become a row that trains as if they were not there.
"""

import base64
import json
import signal
from contextlib import suppress
from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.forms.embedded import with_attachments
from data_prep.records.raw_rows import RawRow
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import normal_form, normal_row
from data_prep.records.sets import record_sets
from data_prep.shards.checks import Sample, checked_sample
from tests.record_files import picture
from tests.record_samples import RULES, samples_by_line, write_tar
from vico.errors import UserError

TURNS = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
SHOWN = [{"from": "human", "value": "<image>\nwhat?"}, TURNS[1]]
PNG = base64.b64encode(picture(1)).decode()
WAV = base64.b64encode(b"RIFF\0\0\0\0WAVEfmt " + bytes(60)).decode()


def sample_of(row: dict | bytes, prompt_format) -> Sample:
    content = row if isinstance(row, bytes) else json.dumps(row).encode()
    return checked_sample(RawRow(0, content, False, {"a.png": picture(1)}.__getitem__), RULES, prompt_format)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"image_id": 262148}, "unread_field"),
        ({"picture": "COCO_0001"}, "unread_field"),
        ({"Image-Path": "val/0001"}, "unread_field"),
        ({"imgs": ["0001", "0002"]}, "unread_field"),
        ({"photoUrl": {"s3": "bucket/0001"}}, "unread_field"),
        ({"video_id": "v_0001"}, "video"),
        ({"videoPath": "clips/0001"}, "video"),
        ({"Audio-File": "0001"}, "audio"),
        ({"Sounds": ["x"]}, "audio"),
        ({"shot": f"data:;base64,{PNG}"}, "unread_field"),
        ({"shot": f"data:application/octet-stream;base64,{PNG}"}, "unread_field"),
        ({"shot": f"\n data:image/png;base64,{PNG}"}, "unread_field"),
        ({"shot": {"raw": "\n".join(PNG[n : n + 60] for n in range(0, len(PNG), 60))}}, "unread_field"),
        ({"clip": WAV}, "audio"),
        ({"clip": f"data:;base64,{WAV}"}, "audio"),
    ],
)
def test_a_row_without_pictures_names_none_by_any_other_field(prompt_format, fields, reason):
    with pytest.raises(Rejected) as caught:
        sample_of({"conversations": TURNS, **fields}, prompt_format)
    assert caught.value.reason == reason and next(iter(fields)) in caught.value.message


def test_the_same_fields_beside_a_picture_are_information(prompt_format):
    fields = {"image_id": 262148, "video_id": "v_1", "imageName": "0001", "note": "data: see the table"}
    row = {"image": "a.png", "conversations": SHOWN, **fields}
    assert sample_of(row, prompt_format).conversations == SHOWN
    nothing = {"image_id": None, "picture": "", "video_path": [], "url": "x", "name": "y", "path": "z"}
    assert sample_of({"conversations": TURNS, **nothing}, prompt_format).kind == "text"


@pytest.mark.parametrize(
    "row, words",
    [
        ({"systemPrompt": "Be kind."}, "rename it to system_prompt"),
        ({"System-Message": "Be kind."}, "rename it to system_message"),
        ({"Conversation": TURNS}, "rename it to conversation"),
        ({"toolCalls": [{"name": "zoom"}]}, "toolCalls is not read"),
        ({"available_tools": "[1]"}, "available_tools is not read"),
        ({"rejectedAnswer": "no"}, "rejectedAnswer is one side"),
        ({"chosen_conversations": TURNS}, "chosen_conversations is one side"),
        ({"weights": [1, 0]}, "weights="),
        ({"turn_weights": [0.5, 1]}, "turn_weights="),
        ({"sampleWeight": 0.5}, "sampleWeight="),
        ({"no_loss": True}, "no_loss=True"),
        ({"train_on_inputs": True}, "train_on_inputs=True"),
        ({"masked": [0, 1]}, "masked="),
    ],
)
def test_names_in_another_spelling_are_refused(row, words, prompt_format):
    with pytest.raises(Rejected, match=words) as caught:
        sample_of({"conversations": TURNS, **row}, prompt_format)
    assert caught.value.reason == "unread_field"


def test_weights_that_change_nothing_are_information(prompt_format):
    fields = {
        "weights": [1, 1.0],
        "no_loss": False,
        "masked": 0,
        "train_on_prompt": False,
        "rejected_count": 3,
        "loss": True,
    }
    assert sample_of({"conversations": TURNS, **fields}, prompt_format).conversations == TURNS


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"Audio": "x"}, "audio"),
        ({"Image": "0001"}, "unread_field"),
        ({"toolCalls": [{"name": "zoom"}]}, "unread_field"),
        ({"reasoningContent": "hm"}, "unread_field"),
        ({"Loss": False}, "unread_field"),
        ({"trainable": False}, "unread_field"),
        ({"masked": True}, "unread_field"),
        ({"speaker": "tool"}, "unread_field"),
        ({"role": "user"}, "broken_row"),
        ({"content": "something else"}, "broken_row"),
    ],
)
def test_a_turn_holds_nothing_that_is_not_read(prompt_format, fields, reason):
    with pytest.raises(Rejected, match="turn 1") as caught:
        sample_of({"conversations": [TURNS[0], {**TURNS[1], **fields}]}, prompt_format)
    assert caught.value.reason == reason
    same = {"role": "assistant", "content": "this", "speaker": "GPT"}
    assert normal_row({"conversations": [TURNS[0], {**TURNS[1], **same}]})["conversations"] == TURNS


@pytest.mark.parametrize("space", ["", "\n "])
def test_parts_that_are_written_as_json_text_are_parts(prompt_format, space):
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]
    turns = [{"from": "human", "value": space + json.dumps(parts)}, TURNS[1]]
    assert sample_of({"conversations": turns}, prompt_format).conversations == SHOWN
    audio = json.dumps([{"type": "input_audio", "input_audio": {"data": "x"}}])
    with pytest.raises(Rejected, match="turn 0: a part of the content is audio"):
        sample_of({"conversations": [{"from": "human", "value": audio}, TURNS[1]]}, prompt_format)
    for text in ('[{"type": "bicycle"}]', "[]", '{"type": "image"}', '[{"type": ["text"]}]', '["\\ud83d"]'):
        turns = [TURNS[0], {"from": "gpt", "value": text}]
        assert sample_of({"conversations": turns}, prompt_format).conversations == turns


@pytest.mark.parametrize("mark", ["<AUDIO>", " <Video>", "\t<audio>"])
def test_marks_of_sounds_and_videos_have_no_case(prompt_format, mark):
    with pytest.raises(Rejected, match="turn 0 has the mark") as caught:
        sample_of(
            {"conversations": [{"from": "human", "value": f"Listen.\n{mark}"}, TURNS[1]]}, prompt_format
        )
    assert caught.value.reason in ("audio", "video")


def test_a_name_that_a_row_has_twice_rejects_it_and_none_wins(prompt_format, tmp_path):
    """json keeps the last of two values: the picture would be gone."""
    line = b'{"image": "a.png", "conversations": %s, "image": null}' % json.dumps(TURNS).encode()
    with pytest.raises(Rejected, match="the name 'image' appears twice"):
        sample_of(line, prompt_format)
    write_tar(tmp_path / "w.tar", {"1.json": line})
    config = RecordsConfig(format="webdataset", path=tmp_path / "w.tar")
    assert samples_by_line(config, prompt_format) == {0: "not_json"}


@pytest.mark.parametrize("inside", [False, True])
def test_two_columns_with_one_name_are_refused(tmp_path, inside):
    pictures = pa.array([picture(1)]), pa.array([None], pa.binary())
    if inside:
        struct = pa.StructArray.from_arrays(pictures, names=["bytes", "bytes"])
        columns = {"image": pa.array([[None]], pa.list_(struct.type)), "question": ["q"], "answer": ["a"]}
        table = pa.table(columns)
    else:
        table = pa.table(
            [*pictures, pa.array(["q"]), pa.array(["a"])], ["image", "image", "question", "answer"]
        )
    pq.write_table(table, tmp_path / "a.parquet")
    name = "bytes" if inside else "image"
    with pytest.raises(UserError, match=rf"a\.parquet has two columns or fields '{name}'; rename"):
        record_blocks(record_sets(RecordsConfig(format="parquet", path=tmp_path / "a.parquet")), 5)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_a_missing_value(tmp_path, prompt_format, number):
    """Pandas writes one for an empty cell. The row is kept, and the cell is never an answer."""
    lines = [
        f'{{"image": "a.png", "score": {number}, "conversations": {json.dumps(SHOWN)}}}',
        f'{{"image": {number}, "conversations": {json.dumps(TURNS)}}}',
        f'{{"question": "how many?", "answer": {number}}}',
    ]
    assert sample_of(lines[0].encode(), prompt_format).pictures
    assert not sample_of(lines[1].encode(), prompt_format).pictures
    with pytest.raises(Rejected, match="no field holds turns"):
        sample_of(lines[2].encode(), prompt_format)
    cells = {"question": ["how many?", "how many?"], "answer": [2.5, float(number)]}
    pq.write_table(pa.table({**cells, "score": [float(number), 0.5]}), tmp_path / "a.parquet")
    first, second = samples_by_line(
        RecordsConfig(format="parquet", path=tmp_path / "a.parquet"), prompt_format
    ).values()
    assert first.conversations[-1]["value"] == "2.5" and second == "broken_row"


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "\n" * 300_000 + "x <audio>"}, TURNS[1]]},
        {"image": PNG[:64].replace("=", "") * 80 + " " * 300_000 + "!", "conversations": SHOWN},
        {"note": PNG[:64].replace("=", "") * 80 + " " * 300_000 + "!", "conversations": TURNS},
        {"conversations": [{"from": "human", "value": "[" * 300_000 + '"type"'}, TURNS[1]]},
    ],
    ids=["line breaks", "base64 name", "base64 elsewhere", "brackets"],
)
def test_a_long_text_keeps_no_check_busy(prompt_format, row):
    """The time for the first three grew with the square of the length, to minutes here."""

    def hangs(*_: object) -> NoReturn:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    try:
        with suppress(Rejected, KeyError):
            sample_of(row, prompt_format)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def test_bytes_are_looked_at_wherever_a_name_is(prompt_format):
    row = with_attachments({"conversations": TURNS, "image_id": b"\0\1", "a": {"b": [{"c": picture(1)}]}})
    with pytest.raises(Rejected, match=r"image_id|a\.b\[0\]\.c"):
        normal_form(RawRow(0, row, False, {}.__getitem__))
