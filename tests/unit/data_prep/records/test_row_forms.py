"""Rows in the forms that people write: what is read, and what is refused because it would be left out."""

import base64
import json

import pytest

from data_prep.records.forms.embedded import Attachment, attachments, with_attachments
from data_prep.records.raw_rows import RawRow
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import normal_row
from data_prep.shards.checks import Sample, checked_sample
from tests.record_files import picture
from tests.record_samples import RULES

ASKED, MARKED, ANSWERED = "what?", "<image>\nwhat?", "this"
TURNS = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]
SHOWN = [{"from": "human", "value": MARKED}, {"from": "gpt", "value": ANSWERED}]
MESSAGES = [{"role": "user", "content": MARKED}, {"role": "assistant", "content": ANSWERED}]
PICTURE = {"bytes": None, "path": "a.png"}


def parts(*content: object) -> dict:
    return {"messages": [{"role": "user", "content": list(content)}, MESSAGES[1]]}


def sample_of(row: dict, prompt_format, **pictures: bytes) -> Sample:
    return checked_sample(
        RawRow(0, json.dumps(row).encode(), False, pictures.__getitem__), RULES, prompt_format
    )


TEXT = {"type": "text", "text": ASKED}
READ = {
    "images beside image null": {"image": None, "images": ["a.png"], "conversations": SHOWN},
    "images as one path": {"images": "a.png", "conversations": SHOWN},
    "image and images alike": {"image": "a.png", "images": ["a.png"], "messages": MESSAGES},
    "images as JSON text": {"images": '["a.png"]', "conversations": json.dumps(SHOWN)},
    "struct": {"image": PICTURE, "conversations": SHOWN},
    "list of structs": {"images": [PICTURE], "conversations": SHOWN},
    "roles of messages in conversations": {"images": ["a.png"], "conversations": MESSAGES},
    "turns as columns": {
        "images": ["a.png"],
        "conversations": {"from": ["human", "gpt"], "value": [MARKED, ANSWERED]},
    },
    "other speakers": {
        "image": "a.png",
        "messages": [{"role": "User", "content": MARKED}, {"role": "model", "content": ANSWERED}],
    },
    "part without a name": {**parts({"type": "image"}, TEXT), "images": ["a.png"]},
    "part with a place": {**parts({"type": "image", "index": 0}, TEXT), "images": ["a.png"]},
    "part image": parts({"type": "image", "image": "a.png"}, TEXT),
    "part path": parts({"type": "image", "path": "a.png"}, TEXT),
    "part url": parts({"type": "image", "url": "a.png"}, TEXT),
    "part image_url": parts({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT),
    "part image_url as text": parts({"type": "image_url", "image_url": "a.png"}, TEXT),
    "part input_image": parts(
        {"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": ASKED}
    ),
    "part source": parts({"type": "image", "source": {"type": "base64", "data": "a.png"}}, TEXT),
    "part without a type": parts({"image": "a.png"}, {"text": ASKED}),
    "parts of one parquet type": parts(
        {"type": "image", "text": None, "image": PICTURE}, {**TEXT, "image": {"bytes": None, "path": None}}
    ),
    "parts in value": {
        "conversations": [
            {
                "from": "human",
                "value": [{"type": "image", "value": "a.png"}, {"type": "text", "value": ASKED}],
            },
            {"from": "gpt", "value": [{"type": "text", "value": ANSWERED}]},
        ]
    },
    "picture of a turn": {"messages": [{"role": "user", "content": ASKED, "images": ["a.png"]}, MESSAGES[1]]},
    "texts": {"images": ["a.png"], "texts": [{"user": ASKED, "assistant": ANSWERED}]},
    "pairs of human and assistant": {
        "images": "a.png",
        "conversation": [{"human": ASKED, "assistant": ANSWERED}],
    },
    "speakers and texts in lists": {
        "images": "a.png",
        "messages": [["User", MARKED], ["assistant", ANSWERED]],
    },
    "query and response": {"images": ["a.png"], "query": ASKED, "response": ANSWERED},
    "query with a mark": {"images": ["a.png"], "query": MARKED, "response": ANSWERED},
    "question and answer": {"image": "a.png", "question": ASKED, "answer": ANSWERED},
    "instruction and output": {"image": "a.png", "instruction": ASKED, "input": "", "output": ANSWERED},
    "prompt and completion": {"image": "a.png", "prompt": [MESSAGES[0]], "completion": [MESSAGES[1]]},
}


@pytest.mark.parametrize("form", READ)
def test_every_form_of_a_row_gives_the_same_turns_and_pictures(form):
    row = normal_row(READ[form])
    assert (row["conversations"], row["image"]) == (SHOWN, ["a.png"])
    assert normal_row(row) == row


def test_pictures_of_parts_go_in_the_order_of_the_parts():
    content = [{"type": "image", "index": 1}, TEXT, {"type": "image", "index": 0}]
    row = normal_row({**parts(*content), "images": ["a.png", "b.png"]})
    assert row["image"] == ["b.png", "a.png"]
    first, second = parts({"type": "image", "image": "b.png"}, TEXT)["messages"]
    more = [first, second, {"role": "user", "content": [{"type": "image", "image": "a.png"}, TEXT]}, second]
    assert normal_row({"messages": more})["image"] == ["b.png", "a.png"]


def test_a_history_comes_before_the_question_and_pictures_before_all():
    row = normal_row({"images": ["a.png"], "history": [["one", "1"]], "query": "two", "response": 2})
    assert [turn["value"] for turn in row["conversations"]] == ["<image>\none", "1", "two", "2"]


LAYOUT = json.dumps([{"type": "text", "text": "1 Intro", "text_level": 1}, {"type": "text", "text": "Body"}])
SPELLED = json.dumps([{"type": "text", "text": "hi"}])


@pytest.mark.parametrize("answer", [LAYOUT, SPELLED, json.dumps([{"type": "image"}])])
def test_an_answer_that_is_json_is_learned_as_it_is(answer):
    turns = [TURNS[0], {"from": "gpt", "value": answer}]
    assert normal_row({"conversations": turns})["conversations"] == turns
    question = [{"from": "human", "value": LAYOUT}, TURNS[1]]
    assert normal_row({"conversations": question})["conversations"] == question, "more than parts have"


def test_answers_in_parts_are_read_where_questions_are():
    content = [json.dumps([{"type": "text", "text": text}]) for text in (ASKED, ANSWERED)]
    turns = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant"), content, strict=True)
    ]
    assert normal_row({"messages": turns})["conversations"] == TURNS


@pytest.mark.parametrize("answer", ["None", "null", "[]", "{}", 0])
def test_an_answer_may_be_any_text(answer):
    for asked, answered in (("question", "answer"), ("query", "response"), ("instruction", "output")):
        row = normal_row({asked: ASKED, answered: answer})
        assert row["conversations"] == [TURNS[0], {"from": "gpt", "value": str(answer)}]
    assert (
        normal_row({"texts": [{"user": ASKED, "assistant": answer}]})["conversations"][1]["value"] == answer
    )
    alpaca = normal_row({"instruction": "Evaluate", "input": "[]", "output": "empty"})
    assert alpaca["conversations"][0]["value"] == "Evaluate\n[]"
    assert normal_row({"instruction": ASKED, "input": " ", "output": ANSWERED})["conversations"] == TURNS


@pytest.mark.parametrize("lists", [("[1, 2]", "[2, 1]"), ('[["a", "b"]]', '[["c", "d"]]'), ("[]", "[]")])
def test_a_question_and_its_answer_may_both_be_lists_as_text(lists):
    turns = normal_row(dict(zip(("question", "answer"), lists, strict=True)))["conversations"]
    assert tuple(turn["value"] for turn in turns) == lists


def test_a_letter_and_information_beside_a_question_are_no_options():
    row = {"question": ASKED, "answer": ANSWERED, "a": "x", "category": "choice", "hint": " "}
    assert normal_row(row)["conversations"] == TURNS


@pytest.mark.parametrize("field", ["loss", "weight", "train"])
def test_a_pair_says_whether_its_answer_is_learned(field):
    pairs = [{"user": ASKED, "assistant": ANSWERED, field: 0}, {"user": ASKED, "assistant": ANSWERED}]
    row = normal_row({"texts": pairs})
    assert row["conversations"] == [TURNS[0], {**TURNS[1], "loss": False}, *TURNS]


def answered(*content: object) -> dict:
    return {"messages": [MESSAGES[0] | {"content": ASKED}, {"role": "assistant", "content": list(content)}]}


def pair_with(**fields: object) -> dict:
    return {"texts": [{"user": ASKED, "assistant": ANSWERED, **fields}]}


PNG = base64.b64encode(picture(1)).decode()
TRAINED = {"conversations": TURNS}
REFUSED = {
    "other field": ({**TRAINED, "thumbnail": "x/a.JPG"}, "unread_field", "thumbnail"),
    "second picture": (
        {"image": "a.png", "image_2": "b.png", "conversations": SHOWN},
        "unread_field",
        "image_2",
    ),
    "struct elsewhere": (
        {**TRAINED, "picture": {"bytes": None, "path": "a.jfif"}},
        "unread_field",
        "picture",
    ),
    "list elsewhere": ({**TRAINED, "photos": ["my photo.heic"]}, "unread_field", "photos"),
    "data URI elsewhere": ({**TRAINED, "shot": "data:image/png;base64,iVBO"}, "unread_field", "shot"),
    "address elsewhere": ({**TRAINED, "link": "https://x.org/a.png?w=3"}, "unread_field", "link"),
    "address without an ending": (
        {**TRAINED, "image_url": "https://x.org/get?id=3"},
        "unread_field",
        "image_url",
    ),
    "other spelling": ({**TRAINED, "System": "Be kind."}, "unread_field", "rename it to system"),
    "mask of a turn": (
        {"conversations": [TURNS[0], {**TURNS[1], "loss_mask": 0}]},
        "unread_field",
        "loss_mask",
    ),
    "mark of audio": (
        {"conversations": [{**TURNS[0], "value": "Listen.\n<audio>"}, TURNS[1]]},
        "audio",
        "turn 0 has the mark <audio>",
    ),
    "field of a turn": (
        {"conversations": [{**TURNS[0], "photo": "a.png"}, TURNS[1]]},
        "unread_field",
        "photo",
    ),
    "different lists": (
        {"image": "a", "images": ["b"], "conversations": SHOWN},
        "broken_row",
        "image and images",
    ),
    "part and list": (
        {**parts({"type": "image", "image": "a.png"}, TEXT), "images": ["b.png"]},
        "broken_row",
        "different pictures",
    ),
    "part that names nothing": (
        parts({"type": "image", "image": "a.png"}, {"type": "image"}, TEXT),
        "image_count",
        "some marks",
    ),
    "part beyond the list": (
        {**parts({"type": "image", "index": 3}), "images": ["a"]},
        "image_count",
        "index",
    ),
    "picture in an answer": (
        {"messages": [MESSAGES[0], {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}]},
        "unread_field",
        "answer with a picture",
    ),
    "struct of nulls": (
        {"image": {"bytes": None, "path": None}, "conversations": SHOWN},
        "missing_image",
        "image",
    ),
    "audio": ({**TRAINED, "audios": ["x.wav"]}, "audio", "audios"),
    "audio by name": ({**TRAINED, "clip": "x.mp3"}, "audio", "clip"),
    "audio by samples": ({**TRAINED, "clip": {"array": [0.1], "sampling_rate": 8000}}, "audio", "clip"),
    "audio part": (parts({"type": "input_audio", "input_audio": {"data": "x"}}, TEXT), "audio", "turn 0"),
    "video": ({**TRAINED, "videos": ["x.mp4"]}, "video", "videos"),
    "video part": (parts({"type": "video_url", "video_url": {"url": "x"}}), "video", "turn 0"),
    "other part": (parts({"type": "tool_use", "input": {}}, TEXT), "unread_field", "tool_use"),
    "tools": ({**TRAINED, "tools": [{"type": "function"}]}, "unread_field", "tools"),
    "tools as text": ({**TRAINED, "tools": '[{"name": "zoom"}]'}, "unread_field", "tools"),
    "tool call": (
        {"messages": [MESSAGES[0], {**MESSAGES[1], "tool_calls": [{"type": "function"}]}]},
        "unread_field",
        "tool_calls",
    ),
    "turn of a tool": ({"messages": [*MESSAGES, {"role": "tool", "content": "7"}]}, "unread_field", "'tool'"),
    "thoughts": (
        {"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning_content": "hm"}]},
        "unread_field",
        "reasoning_content",
    ),
    "preference": ({**TRAINED, "rejected_response": "no"}, "unread_field", "rejected_response"),
    "preference pair": ({"prompt": ASKED, "chosen": "a", "rejected": "b"}, "unread_field", "chosen"),
    "answer to avoid": ({**TRAINED, "label": False}, "unread_field", "label"),
    "weight of a row": ({**TRAINED, "weight": 0.5}, "unread_field", "weight=0.5"),
    "weight of a turn": (
        {"conversations": [TURNS[0], {**TURNS[1], "weight": 0.5}]},
        "unread_field",
        "weight=0.5",
    ),
    "learned question": ({"conversations": [{**TURNS[0], "train": True}, TURNS[1]]}, "unread_field", "train"),
    "contradiction": (
        {"conversations": [TURNS[0], {**TURNS[1], "loss": True, "weight": 0}]},
        "broken_row",
        "disagree",
    ),
    "two conversations": (
        {"conversations": TURNS, "messages": [MESSAGES[0], {"role": "assistant", "content": "that"}]},
        "broken_row",
        "different turns",
    ),
    "two questions": (
        {"query": "a", "response": "b", "question": "c", "answer": "d"},
        "broken_row",
        "different questions",
    ),
    "two system messages": (
        {**TRAINED, "system": "a", "system_prompt": "b"},
        "broken_row",
        "system messages",
    ),
    "system that is no text": ({**TRAINED, "system": {"a": 1}}, "broken_row", "system is a dict"),
    "no turns": ({"id": 5}, "broken_row", "no field holds turns"),
    "choices": ({"question": ASKED, "answer": "B", "choices": ["a", "b"]}, "unread_field", "choices"),
    "context": ({"question": ASKED, "answer": "B", "context": "a text"}, "unread_field", "context"),
    **{
        f"{name} of a question": ({"question": ASKED, "answer": "B", name: "a text"}, "unread_field", name)
        for name in (
            "Options",
            "choice_a",
            "optionB",
            "option_1",
            "Context",
            "hints",
            "choicesList",
            "Answer Choices",
        )
    },
    "columns of options": (
        {"question": ASKED, "answer": "B", "A": "a dog", "B": "a cat", "C": None},
        "unread_field",
        "A is not read",
    ),
    "thoughts of a row": ({**TRAINED, "reasoning_content": "hm"}, "unread_field", "reasoning_content"),
    "thoughts of a question": (
        {"question": ASKED, "answer": "B", "thinking": "hm"},
        "unread_field",
        "thinking",
    ),
    "history of speakers": (
        {"history": [["user", "hi"], ["assistant", "hello"]], "query": ASKED, "response": ANSWERED},
        "broken_row",
        "history is not",
    ),
    "tools in lists": ({"messages": [["user", ASKED], ["tool", "7"]]}, "unread_field", "'tool'"),
    "loss beside columns of turns": (
        {"conversations": {"from": ["human", "gpt"], "value": [ASKED, ANSWERED], "loss": False}},
        "unread_field",
        "loss beside lists",
    ),
    "input of a question": ({"question": ASKED, "answer": "B", "input": "x"}, "unread_field", "input"),
    "numbered address": (
        {"image": "a.png", "image_2": "https://x.org/b.png", "conversations": SHOWN},
        "unread_field",
        "image_2",
    ),
    "name beside base64": (
        {"image": f"data:image/png;base64,{PNG}", "reference": "b.png", "conversations": SHOWN},
        "unread_field",
        "reference",
    ),
    "half a character in JSON text": (
        {"conversations": json.dumps([TURNS[0], {"from": "gpt", "value": "\ud83d"}])},
        "not_utf8",
        "surrogate",
    ),
    "part that is not learned": (
        answered({"type": "text", "text": "a", "weight": 0}),
        "unread_field",
        "weight",
    ),
    "part with train false": (
        answered({"type": "text", "text": "a", "train": False}),
        "unread_field",
        "train",
    ),
    "part with tools": (
        answered({"type": "text", "text": "a", "tool_calls": [1]}),
        "unread_field",
        "tool_calls",
    ),
    "nameless picture in an answer": (
        answered(TEXT, {"type": "image"}),
        "unread_field",
        "answer with a picture",
    ),
    "picture in a part of text": (parts({**TEXT, "image_url": "b.png"}), "unread_field", "image_url"),
    "weight of a pair": (pair_with(weight=0.5), "unread_field", "weight=0.5"),
    "picture of a pair": (pair_with(image="b.png"), "unread_field", "image"),
    "video of a pair": (pair_with(video="b.mp4"), "video", "video"),
    "system of a pair": (pair_with(system="be rude"), "unread_field", "system"),
    "input of a pair": (pair_with(input="bonjour"), "unread_field", "input"),
    "options of a pair": (pair_with(options=["a"]), "unread_field", "options"),
    "two questions of a pair": (pair_with(question="else?"), "broken_row", "different questions"),
    "pair of a history": (
        {"history": [{"user": "a", "assistant": "b", "hint": "c"}], "query": ASKED, "response": ANSWERED},
        "unread_field",
        "hint",
    ),
    "other answer that is None": (
        {"question": ASKED, "answer": "None", "response": "a rationale"},
        "broken_row",
        "different questions or answers",
    ),
    "empty name": ({"image": [""], "conversations": SHOWN}, "missing_image", "empty text"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_read_rejects_the_row_and_names_the_field(form, prompt_format):
    row, reason, words = REFUSED[form]
    with pytest.raises(Rejected, match=words) as caught:
        sample_of(row, prompt_format)
    assert (
        caught.value.reason == reason and "\n" not in caught.value.message and len(caught.value.message) < 300
    )


@pytest.mark.parametrize(
    "fields",
    [
        {
            "video": None,
            "audio": [],
            "tools": "[]",
            "functions": [],
            "rejected": None,
            "videos": {"path": None},
        },
        {"url": "https://x.org/a.png", "id": "a.png", "group": "b.png", "source": "c.png"},
        {"image": f"data:image/png;base64,{PNG}", "file_name": "b.png"},
        {"question_id": 3, "item_weight": "3 kg", "homepage": "https://x.org/get?id=3", "Rating": 2},
        {"file_name": "x/a.png", "caption": "a text about b.png", "embedding": [0.1] * 100},
        {"objects": {"ref": ["cup"], "bbox": [[1, 2, 3, 4]]}, "answer": "b.png", "weight": 1, "label": True},
    ],
)
def test_information_rejects_no_row(fields, prompt_format):
    sample = sample_of(
        {"image": "a.png", "conversations": SHOWN, **fields}, prompt_format, **{"a.png": picture(1)}
    )
    assert sample.conversations == SHOWN


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message", "system_instruction"])
def test_the_system_message_of_a_row_is_its_first_turn(name, prompt_format):
    system = {"from": "system", "value": "Be brief."}
    assert sample_of({**TRAINED, name: "Be brief."}, prompt_format).conversations == [system, *TURNS]
    both = {"conversations": [system, *TURNS], name: "Be brief."}
    assert sample_of(both, prompt_format).conversations == [system, *TURNS]
    assert sample_of({**TRAINED, name: None}, prompt_format).conversations == TURNS
    developer = {"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES]}
    assert normal_row({"image": "a", **developer})["conversations"][0] == system


@pytest.mark.parametrize("field, value", [("loss", False), ("weight", 0), ("weight", 0.0), ("train", False)])
def test_an_answer_that_is_not_learned_stays_in_the_prompt(field, value, prompt_format):
    second = [{"from": "human", "value": "and?"}, {"from": "gpt", "value": "more words"}]
    learned = sample_of({"conversations": [*TURNS, *second]}, prompt_format)
    sample = sample_of({"conversations": [TURNS[0], {**TURNS[1], field: value}, *second]}, prompt_format)
    assert sample.conversations == [TURNS[0], {**TURNS[1], "loss": False}, *second]
    both = prompt_format.encode(learned.conversations, [])
    last = prompt_format.encode(sample.conversations, [])
    alone = prompt_format.encode([TURNS[0], {**TURNS[1], "loss": False}, *second][2:], [])
    assert last.ids.tolist() == both.ids.tolist() and sample.text_tokens == learned.text_tokens
    assert last.num_answer_tokens == alone.num_answer_tokens == sample.answer_tokens < learned.answer_tokens
    assert last.ids[last.answer].tolist() == alone.ids[alone.answer].tolist()
    with pytest.raises(Rejected, match="no answer is learned"):
        sample_of({"conversations": [TURNS[0], {**TURNS[1], field: value}]}, prompt_format)


@pytest.mark.parametrize("given", [True, 1, 1.0, None])
def test_a_weight_of_one_changes_nothing(given):
    row = {"conversations": [{**TURNS[0], "weight": given}, {**TURNS[1], "loss": given}]}
    assert normal_row(row)["conversations"] == TURNS


def test_a_mark_goes_before_the_first_question_of_one_picture_only():
    system = {"from": "system", "value": "s"}
    assert normal_row({"image": "a", "conversations": TURNS}, mark_first=True)["conversations"] == SHOWN
    both = normal_row({"images": ["a"], "conversations": [system, *TURNS]}, mark_first=True)
    assert both["conversations"] == [system, *SHOWN]
    assert (
        normal_row({"image": ["a", "b"], "conversations": TURNS}, mark_first=True)["conversations"] == TURNS
    )
    assert normal_row({"conversations": TURNS}, mark_first=True)["conversations"] == TURNS
    later = [*TURNS, *SHOWN]
    assert normal_row({"image": "a", "conversations": later}, mark_first=True)["conversations"] == later
    assert normal_row({"image": "a", "conversations": TURNS})["conversations"] == TURNS


def test_bytes_of_a_row_are_pictures_sounds_or_text():
    values = {
        "image": {"bytes": picture(1), "path": "a.png"},
        "thumb": picture(2),
        "vector": b"\0\1",
        "n": [b"ID3x"],
        "note": "größer".encode(),
        "again": picture(1),
        "rate": float("nan"),
    }
    row = with_attachments(values)
    named = {attached.name: attached for attached in attachments(row)}
    assert [named[name].media for name in ("image.bytes", "thumb", "vector", "n[0]")] == [
        "picture",
        "picture",
        None,
        "audio",
    ]
    assert row["note"] == "größer" and row["rate"] is None and row["again"] is row["image"]["bytes"]
    read = {name: row[name] for name in ("image", "again", "vector", "note", "rate")}
    assert normal_row({**read, "conversations": SHOWN})["image"] == [named["image.bytes"]]
    with pytest.raises(Rejected, match="thumb holds a picture that is not read"):
        normal_row({"image": row["image"], "thumb": row["thumb"], "conversations": SHOWN})
    with pytest.raises(Rejected, match=r"n\[0\] holds audio"):
        normal_row({"n": row["n"], **TRAINED})
    for place in ("answer", "group", "source", "id"):
        with pytest.raises(Rejected, match="thumb holds a picture"):
            normal_row({"image": row["image"], place: [row["thumb"]], "conversations": SHOWN})


@pytest.mark.parametrize("form", READ)
def test_bytes_may_be_wherever_a_picture_may_be_named(form, prompt_format):
    """As in a parquet file: each name of a picture in the forms above is replaced by its bytes."""
    data = picture(1)

    def with_bytes(value: object) -> object:
        if isinstance(value, dict):
            if value == PICTURE:
                return {"bytes": data, "path": "a.png"}
            return {name: with_bytes(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [with_bytes(inner) for inner in value]
        return data if value in ("a.png", '["a.png"]') else value

    row = normal_row(with_attachments(with_bytes(READ[form])))
    (attached,) = row["image"]
    assert isinstance(attached, Attachment) and attached.data == data
    assert row["conversations"] == SHOWN


def test_bytes_in_the_place_of_a_text_reject_the_row(prompt_format):
    unknown = with_attachments({"x": b"\xff\xfe\0"})["x"]
    for row in (
        {"conversations": [{"from": "human", "value": unknown}, TURNS[1]]},
        {"question": unknown, "answer": ANSWERED},
        {"conversations": unknown},
        {**TRAINED, "system": unknown},
        parts({"type": "text", "text": unknown}),
    ):
        with pytest.raises(Rejected) as caught:
            checked_sample(RawRow(0, row, False, {}.__getitem__), RULES, prompt_format)
        assert caught.value.reason == "broken_row"


def test_information_in_other_forms_becomes_text(prompt_format):
    fields = {
        "category": ["sign", 2],
        "license": ["MIT", "CC0"],
        "source": {"name": "web"},
        "group": 1.5,
        "id": 2.5,
    }
    sample = sample_of({**TRAINED, **fields}, prompt_format)
    assert (sample.kind, sample.license, sample.origin) == ("sign, 2", "MIT, CC0", '{"name": "web"}')
    assert (sample.group, sample.record_id) == ("1.5", "2.5")
    assert sample_of({**TRAINED, "kind": 1.5}, prompt_format).kind == "1.5"
    assert sample_of({**TRAINED, "group": ["a", {"b": 1}]}, prompt_format).group == '["a", {"b": 1}]'
