"""WebDataset tars: which members belong to a sample, the order of its pictures, other media, captions."""

import io
import json
import logging
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from data_prep.records.blocks import block_rows, record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.containers.tar_samples import sample_digests, tar_samples
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import normal_form
from data_prep.records.sets import record_sets
from data_prep.shards.checks import Sample
from tests.record_files import picture, row
from tests.record_samples import samples_by_line, write_tar
from vico.errors import UserError
from vico.prompt import PromptFormat

DATA = {name: picture(n, format="JPEG") for n, name in enumerate(("red", "blue", "green"), start=40)}


def marked(*names: str, num_marks: int = 2, **fields: object) -> bytes:
    """Return a row as JSON with marks; names are its pictures."""
    conversations = row(["x"] * num_marks)["conversations"]
    image = {"image": names} if names else {}
    return json.dumps({"conversations": conversations, **image, **fields}).encode()


def results(path: Path, prompt_format: PromptFormat) -> list[Sample | str]:
    return list(samples_by_line(RecordsConfig(format="webdataset", path=path), prompt_format).values())


def pictures_of(sample: Sample | str) -> list[str]:
    """Return the names in DATA of the sample's pictures, in its order."""
    assert isinstance(sample, Sample), sample
    return [next(name for name, data in DATA.items() if data == p.data) for p in sample.pictures]


@pytest.mark.parametrize(
    "extensions, names, order",
    [
        (["p2.jpg", "p10.jpg"], [], ["red", "blue"]),
        (["p10.jpg", "p2.jpg"], [], ["red", "blue"]),
        (["right.jpg", "left.jpg"], [], ["red", "blue"]),
        (["1.jpg", "0.jpg"], [], ["blue", "red"]),
        (["10.jpg", "9.jpg"], [], ["blue", "red"]),
        (["jpg", "0.jpg"], [], ["red", "blue"]),
        (["left.jpg", "right.jpg"], ["right.jpg", "left.jpg"], ["blue", "red"]),
        (["left.JPG", "right.jpg"], ["RIGHT.jpg", "left.jpg"], ["blue", "red"]),
        (["0.jpg", "1.jpg"], ["1.jpg", "0.jpg"], ["blue", "red"]),
        (["a.jpg", "b.jpg"], ["x/s.b.jpg", "x/s.a.jpg"], ["blue", "red"]),
        (["a.jpg", "b.jpg"], ["./x/s.b.jpg", "s.a.jpg"], ["blue", "red"]),
        (["e\u0301.jpg", "b.jpg"], ["s.b.jpg", "s.\u00c9.jpg"], ["blue", "red"]),
        (["jpg", "png"], ["png", "jpg"], ["blue", "red"]),
        (["a.jpg", "b.jpg"], ["b.jpg", "c.jpg"], "missing_image"),
        (["a.jpg", "b.jpg"], ["coco/000.jpg", "coco/001.jpg"], "missing_image"),
        (["a.jpg", "b.jpg"], ["other.b.jpg", "other.a.jpg"], "missing_image"),
        (["a.jpg", "b.jpg"], ["a.jpg"], "unread_field"),
    ],
)
@pytest.mark.parametrize("json_first", [True, False])
@pytest.mark.parametrize("field", ["image", "images"])
def test_the_names_of_the_row_order_its_pictures_and_otherwise_the_tar(
    tmp_path, prompt_format, extensions, names, order, json_first, field
):
    text = {"x/s.json": marked(num_marks=2, **({field: names} if names else {"image": None}))}
    members = {f"x/s.{extension}": DATA[name] for extension, name in zip(extensions, DATA, strict=False)}
    write_tar(tmp_path / "w.tar", text | members if json_first else members | text)
    (result,) = results(tmp_path / "w.tar", prompt_format)
    assert (result if isinstance(result, str) else pictures_of(result)) == order


def test_a_message_names_the_missing_picture_and_those_that_are_there(tmp_path):
    write_tar(tmp_path / "w.tar", {"s.json": marked("c.jpg"), "s.a.jpg": DATA["red"]})
    (block,) = record_blocks(record_sets(RecordsConfig(format="webdataset", path=tmp_path / "w.tar")), 9)
    (raw,) = block_rows(block)
    with pytest.raises(Rejected) as caught:
        normal_form(raw)
    message = "c.jpg is not a picture of the sample s (its pictures: s.a.jpg)"
    assert (caught.value.reason, caught.value.message) == ("missing_image", message)


@pytest.mark.parametrize(
    "members, expected",
    [
        (["._1.jpg", "1.jpg", "._1.json", "1.json"], ["1"]),
        (["x/._1.jpg", "x/1.jpg", "x/._1.json", "x/1.json"], ["x/1"]),
        (["./._1.jpg", "./1.jpg", "./._1.json", "./1.json"], ["./1"]),
        (["__MACOSX/x/._1.jpg", "x/1.jpg", "__MACOSX/._1", "x/1.json"], ["x/1"]),
        ([".DS_Store", "x/.DS_Store", "x/1.jpg", "x/1.json"], ["x/1"]),
        (["1.JPG", "1.JSON"], ["1"]),
        (["a.b/c.d/1.jpg", "a.b/c.d/1.json"], ["a.b/c.d/1"]),
        (["README", "x/LICENSE", "1.jpg", "__meta__/info.json", "1.json", "__index__"], ["1"]),
        (["1.0.jpg", "1.json", "2.jpeg", "2.json", "1.txt", "1.jpg"], ["1", "2", "1"]),
        (["1..jpg", "1.json", "2..json", "2.jpg"], ["1", "2"]),
    ],
)
def test_members_form_the_samples_of_webdatasets_own_rule(tmp_path, prompt_format, members, expected):
    """Hidden members aside: webdataset takes `x/._1.jpg` for the member `_1.jpg` of a sample `x/`."""
    content = {
        name: marked(num_marks=1) if name.lower().endswith("json") and "._" not in name else DATA["red"]
        for name in members
    }
    path = tmp_path / "w.tar"
    write_tar(path, content)
    own = list(tar_samples(path, 0))
    assert [sample.key for sample in own] == expected
    url = [str(path)]
    theirs = [
        {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in webdataset.WebDataset(url, shardshuffle=False)
        if not sample["__key__"].endswith(("/", "/._1"))
    ]
    if not any("x/." in name for name in members):  # there webdataset cuts the sample in two
        assert [{m.extension: m.data for m in sample.members} for sample in own] == theirs
    starts = [start for start, _ in sample_digests(path)]
    assert len(starts) == len(own)
    for number, start in enumerate(starts):
        assert list(tar_samples(path, start)) == own[number:], "a task reads its block from its start"
    good = [result for result in results(path, prompt_format) if isinstance(result, Sample)]
    assert all(pictures_of(sample) == ["red"] for sample in good) and good


def test_members_without_a_sample_are_logged(tmp_path, caplog):
    write_tar(tmp_path / "w.tar", {"README": b"x", "1.json": marked(num_marks=0), "._1.json": b"x"})
    with caplog.at_level(logging.WARNING):
        record_blocks(record_sets(RecordsConfig(format="webdataset", path=tmp_path / "w.tar")), 9)
    assert "w.tar: 2 members belong to no sample by webdataset's rule" in caplog.text
    assert "the first is README" in caplog.text


def test_a_member_that_is_there_twice_rejects_its_sample_alone(tmp_path, prompt_format):
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for name, data in (
            ("1.json", marked(num_marks=1)),
            ("1.jpg", DATA["red"]),
            ("1.JPG", DATA["blue"]),
            ("2.jpg", DATA["red"]),
            ("2.json", marked(num_marks=1, id=2)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    first, second = results(tmp_path / "w.tar", prompt_format)
    assert first == "broken_row" and pictures_of(second) == ["red"]


def test_a_tar_with_links_in_the_place_of_members_is_refused(tmp_path):
    (tmp_path / "1.json").write_bytes(marked(num_marks=1))
    (tmp_path / "1.jpg").write_bytes(DATA["red"])
    (tmp_path / "2.json").write_bytes(marked(num_marks=1))
    os.link(tmp_path / "1.jpg", tmp_path / "2.jpg")
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for name in ("1.json", "1.jpg", "2.json", "2.jpg"):
            tar.add(tmp_path / name, name)
    with pytest.raises(UserError, match=r"w\.tar: the member 2\.jpg is a link .*--hard-dereference"):
        record_blocks(record_sets(RecordsConfig(format="webdataset", path=tmp_path / "w.tar")), 9)


@pytest.mark.parametrize(
    "extension, data, expected",
    [
        ("jfif", DATA["red"], ["red"]),
        ("jpe", DATA["red"], ["red"]),
        ("img", DATA["red"], ["red"]),
        ("0", DATA["red"], ["red"]),
        ("heic", b"\0\0\0\x18ftypheic", "picture_format"),
        ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "picture_format"),
        ("picture", b"8BPS\0\1" + bytes(20), "picture_format"),
        ("jxl", b"\xff\x0a" + bytes(20), ("picture_format", "undecodable_image")),
        ("mp4", b"v", "video"),
        ("0.MP4", b"v", "video"),
        ("m4v", b"v", "video"),
        ("clip", b"\0\0\0\x18ftypisom", "video"),
        ("wav", b"x", "audio"),
        ("FLAC", b"x", "audio"),
        ("mp3", b"x", "audio"),
        ("sound", b"RIFF\0\0\0\0WAVEfmt ", "audio"),
        ("ogg", b"OggS", "audio"),
    ],
)
@pytest.mark.parametrize("num_marks", [0, 1])
def test_a_member_that_is_a_picture_or_other_media_never_leaves_a_text_row(
    tmp_path, prompt_format, extension, data, expected, num_marks
):
    write_tar(tmp_path / "w.tar", {"s.json": marked(num_marks=num_marks), f"s.{extension}": data})
    (result,) = results(tmp_path / "w.tar", prompt_format)
    if isinstance(result, str):
        reasons = (expected,) if isinstance(expected, str) else expected
        assert result in reasons or (result == "image_count" and num_marks == 0)
    else:
        assert pictures_of(result) == expected


def test_other_members_are_not_media(tmp_path, prompt_format):
    others = {"cls": b"7", "txt": b"<svg in a text", "npy": b"\x93NUMPY", "meta.json": b"{}", "xml": b"<svg>"}
    members = {"s.json": marked(num_marks=1), "s.jpg": DATA["red"]}
    write_tar(tmp_path / "w.tar", members | {f"s.{end}": data for end, data in others.items()})
    (result,) = results(tmp_path / "w.tar", prompt_format)
    assert pictures_of(result) == ["red"]


def test_a_caption_in_txt_is_the_answer_to_the_picture(tmp_path, prompt_format):
    """Members as img2dataset writes them: its .json has no turns."""
    write_tar(
        tmp_path / "w.tar",
        {
            "0.jpg": DATA["red"],
            "0.json": json.dumps({"url": "http://x/0.jpg", "caption": "a", "key": "0"}).encode(),
            "0.txt": "\ufeffein rotes Bild ü\n".encode(),
            "1.0.jpg": DATA["red"],
            "1.1.jpg": DATA["blue"],
            "1.txt": b"two",
            "2.jpg": DATA["red"],
            "2.json": marked(num_marks=1),
            "2.txt": b"not read, since the row has turns",
            "3.txt": b"no picture",
            "4.jpg": DATA["red"],
            "4.txt": b"\xff\xfe",
            "5.jpg": DATA["red"],
            "5.txt": b" \n",
        },
    )
    one, two, turns, *bad = results(tmp_path / "w.tar", prompt_format)
    assert one.conversations == [
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "ein rotes Bild ü"},
    ]
    assert pictures_of(two) == ["red", "blue"] and two.conversations[1]["value"] == "two"
    assert two.conversations[0]["value"] == "<image>\n<image>"
    assert turns.conversations[1]["value"] == "an answer"
    assert bad == ["broken_row", "not_utf8", "empty_answer"]
