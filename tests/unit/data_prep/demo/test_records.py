"""The demo records: reproducible, answerable, in groups that share nothing, with a fixed mix of contents."""

import io
import re
from collections import defaultdict
from typing import Any

import pytest
from PIL import Image, ImageFont

from data_prep.demo import sources
from data_prep.demo.canvas import TextRun, font
from data_prep.demo.lexicon import LEXICON
from data_prep.demo.mix import demo_mix, tile_contents
from data_prep.demo.records import KIND_SHARES, demo_record, drawn_record
from data_prep.shards.split import SPLITS, Shares, side
from vico.tiling import Tiling, num_tiles

TILING = Tiling(tile_size=112, max_tiles=4)
SEED, NUM_RECORDS = 3, 400
Records = list[tuple[dict[str, Any], list[bytes]]]


@pytest.fixture(scope="module")
def records() -> Records:
    return [demo_record(SEED, line) for line in range(NUM_RECORDS)]


def test_a_record_depends_only_on_seed_and_line(records):
    for line in (399, 7, 123):
        assert demo_record(SEED, line) == records[line]
    assert demo_record(4, 7) != records[7]


def test_rows_are_internvl_rows_with_one_mark_per_picture(records):
    for line, (row, pictures) in enumerate(records):
        assert row["id"] == f"demo-{line:06d}"
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (
            len(row["conversations"]) // 2
        )
        marks = sum(turn["value"].count("<image>") for turn in row["conversations"])
        assert marks == len(pictures) == int("image" in row)
        for data in pictures:
            image = Image.open(io.BytesIO(data))
            assert image.size == (row["width"], row["height"])
            assert image.format == {"png": "PNG", "jpg": "JPEG"}[row["image"].rsplit(".", 1)[1]]


def test_every_kind_occurs_and_pictures_have_one_to_five_tiles(records):
    assert {row["kind"] for row, _ in records} == set(KIND_SHARES)
    tiles = {num_tiles(row["width"], row["height"], TILING) for row, pictures in records if pictures}
    assert tiles == {1, 3, 5}


def test_numbers_and_pictures_stay_in_one_group(records):
    owners = defaultdict(set)
    for line, (row, pictures) in enumerate(records):
        for data in pictures:
            owners[data].add(row["group"])
        if row["kind"] == "number":
            for question in drawn_record(SEED, line).questions:
                if question.task == "read":
                    owners[question.answer].add(row["group"])
    assert all(len(groups) == 1 for groups in owners.values())
    assert sum(isinstance(owner, str) for owner in owners) > 60


def test_records_ask_several_different_questions_and_at_most_one_transcription(records):
    turns = [[turn["value"] for turn in row["conversations"][::2]] for row, _ in records]
    assert all(len(set(questions)) == len(questions) for questions in turns)
    counts = [len(questions) for questions in turns]
    assert {1, 2, 3, 4} == set(counts) and sum(counts) > 1.7 * len(counts)
    for line, (row, _) in enumerate(records):
        questions = drawn_record(SEED, line).questions
        assert row["task"] == questions[-1].task
        assert sum(question.task == "transcribe" for question in questions) <= 1


def test_words_come_from_the_lexicon(records):
    drawn_records = [drawn_record(SEED, line) for line in range(len(records))]
    with_words = [drawn for drawn in drawn_records if drawn.kind in ("word", "caption")]
    questions = [question for drawn in with_words for question in drawn.questions]
    answers = {question.answer for question in questions if question.task == "read"}
    assert len(with_words) > 60 and answers <= set(LEXICON)
    assert len(LEXICON) == len(set(LEXICON)) >= 256


def test_groups_divide_the_sources():
    groups = range(sources.NUM_GROUPS)
    assert sorted(n for group in groups for n in sources.group_numbers(group)) == list(range(10, 10_000))
    passages = [passage for group in groups for passage in sources.group_passages(group)]
    assert len(passages) == len(set(passages)) >= 2 * sources.NUM_GROUPS
    listings = [listing for group in groups for listing in sources.group_listings(group)]
    assert len(listings) == len(set(listings)) >= sources.NUM_GROUPS
    tables = [table for group in groups for table in sources.group_tables(group)]
    assert len(tables) == len(set(tables)) >= 5 * sources.NUM_GROUPS
    assert len(set(sources.photo_groups())) == len(sources.photo_groups())


def test_all_sides_of_the_default_split_have_photographs():
    shares = Shares(calib=0.1, test=0.1)
    sides = [side(shares, "group", f"demo-{group:02d}".encode()) for group in sources.photo_groups()]
    assert all(sides.count(name) >= 2 for name in SPLITS)


def test_every_answer_is_drawn_in_the_picture():
    for line in range(300):
        drawn = drawn_record(5, line)
        if drawn.kind == "text":
            continue
        lines = [run.text.strip() for run in drawn.content.canvas.runs]
        for question in drawn.questions:
            if question.task == "transcribe":
                assert question.answer in lines
            elif question.task == "read":
                assert any(question.answer in text.split() for text in lines), (question, lines)


def test_no_answer_is_empty():
    """The code of record 7937 of the demo begins with a line that is indented by the whole width."""
    (question, _) = drawn_record(0, 7937).questions
    assert question.task == "transcribe" and question.answer
    assert all(question.answer for line in range(300) for question in drawn_record(0, line).questions)


def test_the_value_of_a_bar_is_above_its_label():
    for drawn in (drawn_record(5, line) for line in range(400)):
        if drawn.kind != "chart":
            continue
        runs = drawn.content.canvas.runs  # value and label of each bar in turn
        values = {label.text: value.text for value, label in zip(runs[::2], runs[1::2], strict=True)}
        for question in drawn.questions:
            if question.task != "read":
                continue
            assert values[re.search(r"bar ([A-H])", question.text)[1]] == question.answer


def test_text_is_inside_its_picture():
    for line in range(300):
        drawn = drawn_record(6, line)
        if drawn.content is None or drawn.kind in ("prose", "code", "figure"):
            continue
        canvas = drawn.content.canvas
        for run in canvas.runs:
            assert run.left >= 0 and run.top >= 0, (drawn.kind, run)
            assert run.left + canvas.draw.textlength(run.text, font=_font(run)) <= canvas.image.width + 1, run
            assert run.top + 1.05 * run.size <= canvas.image.height + 1, (drawn.kind, run)


def _font(run: TextRun) -> ImageFont.FreeTypeFont:
    return font(run.font, run.size)


def test_mix_keeps_its_bounds_and_adds_up():
    mix = demo_mix(500, seed=0, tiling=TILING)
    assert mix["tiles"]["plain"] <= 0.25
    assert mix["tiles"]["small text"] >= 0.35
    for shares in mix.values():
        assert sum(shares.values()) == pytest.approx(1, abs=2e-3)


def test_contents_of_tiles_follow_the_drawing():
    seen = set()
    for line in range(200):
        drawn = drawn_record(8, line)
        if drawn.content is None:
            continue
        contents = tile_contents(drawn.content.canvas, TILING)
        assert len(contents) == num_tiles(*drawn.content.canvas.image.size, TILING)
        if drawn.kind == "plain":
            assert set(contents) == {"plain"}
        if drawn.kind == "photograph":
            assert set(contents) == {"photograph"}
        if drawn.kind == "prose":
            assert any("text" in content for content in contents)
        seen.update(contents)
    assert {"plain", "photograph", "small text", "large text"} <= seen
