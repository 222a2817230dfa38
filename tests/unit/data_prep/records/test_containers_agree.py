"""A row means the same in a text file, a tar and a parquet file."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.records.config import RecordsConfig
from data_prep.shards.checks import Sample
from tests.record_files import picture, write_lines
from tests.record_samples import ANSWER, QUESTION, TURNS, samples_by_line, write_tar
from vico.prompt import PromptFormat

PNG = picture(1)
MORE = [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "x"}]
FOUND = [{"role": "user", "content": "<image>Find <ref-object>."}, {"role": "assistant", "content": "<bbox>"}]
ASKED = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
]


def results(folder: Path, prompt_format: PromptFormat, row: dict[str, Any]) -> list[Sample | str]:
    """Return what becomes of a row with one picture as JSON lines, in a tar, and in a parquet file."""
    (folder / "a.png").write_bytes(PNG)
    write_lines(folder / "a.jsonl", [{**row, "image": "a.png"}])
    write_tar(folder / "a.tar", {"1.json": json.dumps(row).encode(), "1.png": PNG})
    columns = {name: [value] for name, value in row.items()}
    pq.write_table(pa.table({**columns, "image": [PNG]}), folder / "a.parquet")
    formats = {"llava": "jsonl", "webdataset": "tar", "parquet": "parquet"}
    configs = [RecordsConfig(format=f, path=folder / f"a.{end}") for f, end in formats.items()]
    return [samples_by_line(config, prompt_format)[0] for config in configs]


READ = {
    "turns": {"conversations": TURNS},
    "JSON text": {"conversations": json.dumps(TURNS)},
    "messages": {"messages": ASKED},
    "parts": {"messages": PARTS},
    "pairs": {"texts": [{"user": "what?", "assistant": ANSWER}]},
    "question": {"question": "what?", "answer": ANSWER},
    "query": {"query": "what?", "response": ANSWER},
    "instruction": {"instruction": "what?", "output": ANSWER},
    "prompt": {"prompt": "what?", "completion": ANSWER},
}


@pytest.mark.parametrize("form", READ)
def test_every_form_is_read_from_every_container(tmp_path, prompt_format, form):
    row = {**READ[form], "system": "Be brief.", "category": ["a", "b"], "score": 1.5}
    for sample in results(tmp_path, prompt_format, row):
        assert isinstance(sample, Sample), sample
        assert sample.conversations == [{"from": "system", "value": "Be brief."}, *TURNS]
        assert [p.data for p in sample.pictures] == [PNG]
        assert (sample.kind, sample.fields) == ("a, b", {"score": 1.5})


def test_answers_out_of_the_loss_and_boxes_are_the_same_in_every_container(tmp_path, prompt_format):
    kept = [TURNS[0], {**TURNS[1], "loss": False}, *MORE]
    for sample in results(tmp_path, prompt_format, {"conversations": kept}):
        assert isinstance(sample, Sample) and sample.conversations == kept
    row = {"messages": FOUND, "objects": {"ref": ["cup"], "bbox": [[3, 4, 20, 30]]}}
    for sample in results(tmp_path, prompt_format, row):
        assert isinstance(sample, Sample)
        texts = [turn["value"] for turn in sample.conversations]
        assert texts == ["<image>Find <ref>cup</ref>.", "<box>[[50, 100, 333, 750]]</box>"]


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"tools": '[{"name": "zoom"}]'}, "unread_field"),
        ({"rejected_response": "no"}, "unread_field"),
        ({"weight": 0.5}, "unread_field"),
        ({"photo": "b.jpg"}, "unread_field"),
        ({"System": "Be kind."}, "unread_field"),
        ({"conversations": [TURNS[0], {**TURNS[1], "loss_mask": 0}]}, "unread_field"),
        ({"conversations": [{**TURNS[0], "value": f"{TURNS[0]['value']}\n<audio>"}, TURNS[1]]}, "audio"),
        ({"audios": ["a.wav"]}, "audio"),
        ({"sound_path": "a.mp3"}, "audio"),
        ({"video": "a.mp4"}, "video"),
        ({"system": "a", "system_prompt": "b"}, "broken_row"),
        ({"messages": FOUND}, "broken_row"),
        ({"conversations": json.dumps([TURNS[0], {"from": "gpt", "value": "\ud83d"}])}, "not_utf8"),
    ],
)
def test_what_is_refused_is_refused_in_every_container(tmp_path, prompt_format, fields, reason):
    row = {"conversations": TURNS, **fields}
    assert results(tmp_path, prompt_format, row) == [reason] * 3


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary()])
def test_text_stored_as_binary_is_text_and_other_bytes_are_not(tmp_path, prompt_format, type_):
    questions = ["größer?".encode(), b"\xff\xfe\0"]
    table = {"image": [PNG, PNG], "question": pa.array(questions, type_), "answer": [ANSWER, ANSWER]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    config = RecordsConfig(format="parquet", path=tmp_path / "a.parquet")
    good, bad = samples_by_line(config, prompt_format).values()
    assert good.conversations[0]["value"] == "<image>\ngrößer?" and bad == "broken_row"


def test_empty_bytes_are_a_broken_picture_and_not_a_text_row(tmp_path, prompt_format):
    table = {"image": [b"", None], "question": ["what?", "what?"], "answer": [ANSWER, ANSWER]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    config = RecordsConfig(format="parquet", path=tmp_path / "a.parquet")
    empty, none = samples_by_line(config, prompt_format).values()
    assert empty == "undecodable_image" and none.kind == "text"
