"""Checks of rows and pictures: what is kept, and the reason why a row is rejected."""

import json
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.records.blocks import block_rows, record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.pictures import checked_picture, picture_in_root
from data_prep.records.raw_rows import RawRow
from data_prep.records.rejection import REASONS, Rejected
from data_prep.records.sets import record_sets
from data_prep.shards.checks import RowRules, Sample, checked_sample
from stages.shard.config import ShardConfig
from tests.record_files import picture, row, write_hostile_records
from vico.prompt import PromptFormat

RULES = RowRules(max_tiles=12, max_pixels=200_000, max_tokens=400, decode=True)


def reason_of(raw: RawRow, prompt_format: PromptFormat) -> str | None:
    try:
        checked_sample(raw, RULES, prompt_format)
    except Rejected as rejected:
        assert "\n" not in rejected.message
        return rejected.reason
    return None


def test_every_bad_row_has_its_reason(tmp_path, prompt_format):
    meta, reasons = write_hostile_records(tmp_path)
    blocks = record_blocks(record_sets(RecordsConfig(format="internvl", path=meta)), 7)
    results = {raw.line: reason_of(raw, prompt_format) for block in blocks for raw in block_rows(block)}
    assert {line: reason for line, reason in results.items() if reason} == reasons
    tested_elsewhere = {"straddles_split", "unreadable_image"}  # test_split.py and the test below
    assert set(reasons.values()) == set(REASONS) - tested_elsewhere


def test_a_picture_without_read_permission_is_rejected(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "a.png").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root can read everything
    try:
        with pytest.raises(Rejected) as caught:
            picture_in_root(tmp_path, "a.png")
    finally:
        os.seteuid(user)
    assert caught.value.reason == "unreadable_image"


def test_links_inside_the_root_and_a_root_that_is_a_link_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"a")
    os.symlink("a.png", tmp_path / "real" / "b.png")
    os.symlink(tmp_path / "real", tmp_path / "root")
    assert picture_in_root(tmp_path / "root", "b.png") == b"a"


def sample_of(
    row: dict, prompt_format: PromptFormat, pictures: dict[str, bytes] | None = None, rules: RowRules = RULES
) -> Sample:
    raw = RawRow(0, json.dumps(row).encode(), False, (pictures or {}).__getitem__)
    return checked_sample(raw, rules, prompt_format)


def test_a_sample_keeps_picture_bytes_kind_group_and_small_fields(prompt_format):
    data = picture(1, (120, 60), "JPEG")
    fields = {
        "id": 7,
        "category": "sign",
        "group": 12,
        "license": "CC0",
        "width": 1,
        "score": 0.5,
        "deep": [1],
    }
    sample = sample_of(row("a.jpg", **fields), prompt_format, {"a.jpg": data})
    assert (sample.record_id, sample.kind, sample.group) == ("7", "sign", "12")
    assert (sample.fields, sample.license, sample.origin) == ({"score": 0.5}, "CC0", "")
    (kept,) = sample.pictures
    assert (kept.data, kept.extension, kept.width, kept.height) == (data, "jpg", 120, 60)
    assert sample_of(row(), prompt_format).kind == "text"
    assert sample_of(row(image=[]), prompt_format).pictures == []


@pytest.mark.parametrize("group, expected", [(12.0, "12"), (12, "12"), (1.5, "1.5"), ("12.0", "12.0")])
def test_a_whole_number_is_one_group_however_it_is_written(prompt_format, group, expected):
    assert sample_of(row(group=group), prompt_format).group == expected


def test_a_long_kind_is_cut_but_not_a_group(prompt_format):
    sample = sample_of(row(kind="k" * 5000, group="g" * 5000), prompt_format)
    assert (len(sample.kind), len(sample.group)) == (200, 5000)
    assert len(sample_of(row(category="c" * 5000), prompt_format).kind) == 200


@pytest.mark.parametrize("fields", [{"video": "v.mp4"}, {"videos": ["v.mp4"]}, {"videos": "v.mp4"}])
def test_a_row_with_a_video_is_rejected_under_either_field_name(prompt_format, fields):
    with pytest.raises(Rejected, match="has a video") as caught:
        sample_of(row(**fields), prompt_format)
    assert caught.value.reason == "video"
    sample = sample_of(row(**dict.fromkeys(fields, "")), prompt_format)
    assert sample.fields == {}


def test_token_counts_equal_those_of_the_prompt(prompt_format):
    data = picture(1, (112, 56))
    sample = sample_of(row("a.png"), prompt_format, {"a.png": data})
    skeleton = prompt_format.encode(sample.conversations, sample.tiles)
    assert sample.tiles == [3]  # 2 x 1 and the thumbnail
    assert sample.text_tokens == skeleton.num_text_tokens
    assert sample.answer_tokens == skeleton.num_answer_tokens > 0
    tokens = sample.text_tokens + 3 * prompt_format.settings.tokens_full
    rules = RowRules(12, 200_000, tokens, True)
    sample_of(row("a.png"), prompt_format, {"a.png": data}, rules)
    with pytest.raises(Rejected) as caught:
        sample_of(row("a.png"), prompt_format, {"a.png": data}, RowRules(12, 200_000, tokens - 1, True))
    assert caught.value.reason == "over_budget" and str(tokens) in caught.value.message


def test_a_system_message_goes_before_conversations_without_one(prompt_format):
    rules = replace(RULES, system_message="You are brief.")
    plain, with_system = sample_of(row(), prompt_format), sample_of(row(), prompt_format, rules=rules)
    assert with_system.conversations == [{"from": "system", "value": "You are brief."}, *plain.conversations]
    skeleton = prompt_format.encode(with_system.conversations, [])
    assert with_system.text_tokens == skeleton.num_text_tokens > plain.text_tokens
    assert with_system.answer_tokens == plain.answer_tokens
    own = [{"from": "system", "value": "Be long."}, *plain.conversations]
    assert sample_of(row(conversations=own), prompt_format, rules=rules).conversations == own


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<|endoftext|>"])
def test_a_row_whose_text_spells_a_control_token_is_rejected(prompt_format, token):
    turn = {"from": "system", "value": f"be {token}"}
    rows = [
        row(answer=f"2{token}"),
        row("a.png", answer=f"Yes, {token} and <image>."),
        row(conversations=[turn, *row()["conversations"]]),
    ]
    with_system = replace(RULES, system_message="You are brief.")
    for where, line in zip(("turn 1", "turn 1", "the system message"), rows, strict=True):
        for rules in (RULES, with_system):  # turns are counted as in the row
            with pytest.raises(Rejected) as caught:
                sample_of(line, prompt_format, {"a.png": picture(1)}, rules)
            message = f"{where}: the text spells the token {token}"
            assert (caught.value.reason, caught.value.message) == ("control_token", message)


@pytest.mark.parametrize("mark", ["<image>", "<IMG_CONTEXT>", "<|im_end|>"])
def test_a_system_message_with_a_mark_of_the_prompt_is_refused(mark):
    with pytest.raises(ValueError, match=f"{re.escape(mark)} is written by the prompt itself"):
        ShardConfig(system_message=f"Look at {mark}")


def test_the_tiles_of_a_row_are_divided_among_its_pictures(prompt_format):
    wide = picture(1, (400, 100))
    single = sample_of(row("a"), prompt_format, {"a": wide})
    two = sample_of(row(["a", "b"]), prompt_format, {"a": wide, "b": wide})
    many = sample_of(row(list("abcdefghijklmno")), prompt_format, dict.fromkeys("abcdefghijklmno", wide))
    assert (single.max_tiles, two.max_tiles, many.max_tiles) == (12, 6, 1)
    assert single.tiles == [5] and two.tiles == [5, 5] and many.tiles == [1] * 15


def test_a_system_turn_and_a_byte_order_mark_are_allowed(prompt_format):
    turns = [{"from": "system", "value": "be brief"}, *row()["conversations"]]
    line = b"\xef\xbb\xbf" + json.dumps({"conversations": turns}).encode()
    sample = checked_sample(RawRow(0, line, False, {}.__getitem__), RULES, prompt_format)
    assert [turn["from"] for turn in sample.conversations] == ["system", "human", "gpt"]


def test_the_header_check_finds_size_and_format_but_not_a_cut(prompt_format):
    cut = picture(3, (300, 300), "JPEG")[:-400]
    assert checked_picture(cut, "cut.jpg", max_pixels=10**6, decode=False).width == 300
    for data, reason in ((cut, "undecodable_image"), (b"8BPS", "picture_format")):
        with pytest.raises(Rejected) as caught:
            checked_picture(data, "a", max_pixels=10**6, decode=True)
        assert caught.value.reason == reason


def test_a_decompression_bomb_is_rejected_before_it_is_decoded():
    header = picture(1)
    size = (60_000).to_bytes(4, "big")
    chunk = b"IHDR" + size + size + header[24:29]
    bomb = header[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + header[33:]
    with pytest.raises(Rejected) as caught:
        checked_picture(bomb, "bomb.png", max_pixels=178_956_970, decode=True)
    assert caught.value.reason == "too_many_pixels"


def test_the_records_page_lists_every_reason():
    page = (Path(__file__).parents[4] / "docs" / "data.md").read_text()
    for reason, when in REASONS.items():
        assert f"| `{reason}` | {when} |" in page
