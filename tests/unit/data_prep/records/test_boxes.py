"""Objects of a row in the place of `<ref-object>` and `<bbox>`."""

import json

import pytest

from data_prep.records.raw_rows import RawRow
from data_prep.records.rejection import Rejected
from data_prep.shards.checks import Sample, checked_sample
from tests.record_files import picture
from tests.record_samples import RULES


def sample_of(question: str, answer: str, objects: object, prompt_format, sizes=((200, 100),)) -> Sample:
    names = [f"{n}.png" for n in range(len(sizes))]
    pictures = {name: picture(n, size) for n, (name, size) in enumerate(zip(names, sizes, strict=True))}
    turns = [
        {"role": "user", "content": "<image>" * len(sizes) + question},
        {"role": "assistant", "content": answer},
    ]
    row = {"messages": turns, "images": names, "objects": objects}
    return checked_sample(
        RawRow(0, json.dumps(row).encode(), False, pictures.__getitem__), RULES, prompt_format
    )


@pytest.mark.parametrize("as_text", [False, True])
def test_names_and_boxes_are_written_as_internvl_writes_them(prompt_format, as_text):
    objects = {"ref": ["cup", "red pen"], "bbox": [[20, 10, 200, 100], [0, 0.25, 0.1, 99.96]]}
    given = json.dumps(objects) if as_text else objects
    sample = sample_of("Where are <ref-object> and <ref-object>?", "<bbox> and <bbox>.", given, prompt_format)
    question, answer = (turn["value"] for turn in sample.conversations)
    assert question == "<image>Where are <ref>cup</ref> and <ref>red pen</ref>?"
    assert answer == "<box>[[100, 100, 1000, 1000]]</box> and <box>[[0, 2, 0, 1000]]</box>."


@pytest.mark.parametrize(
    "kind, box",
    [("real", [20, 10, 50, 50]), ("norm1", [0.1, 0.1, 0.25, 0.5]), ("norm1000", [100, 100, 250, 500])],
)
def test_boxes_are_scaled_by_their_own_picture(prompt_format, kind, box):
    objects = {"bbox": [box], "bbox_type": kind, "image_id": [1]}
    sample = sample_of("Where?", "<bbox>", objects, prompt_format, sizes=((60, 40), (200, 100)))
    assert sample.conversations[1]["value"] == "<box>[[100, 100, 250, 500]]</box>"


@pytest.mark.parametrize(
    "answer, objects, words",
    [
        ("<bbox>", {"bbox": [[1, 2, 3, 4], [1, 2, 3, 4]]}, "1 places <bbox> for 2"),
        ("<bbox><bbox>", {"bbox": [[1, 2, 3, 4]]}, "2 places <bbox> for 1"),
        ("<bbox>", {"ref": ["cup"]}, "0 places <ref-object> for 1"),
        ("<bbox>", None, "1 places <bbox> for 0"),
        ("<ref-object>", {}, "1 places <ref-object> for 0"),
        ("<bbox>", {"bbox": [[1, 2]]}, "only boxes are read"),
        ("<bbox>", {"bbox": [[1, 2, 3, 101]]}, "not inside 200 x 100"),
        ("<bbox>", {"bbox": [[3, 2, 1, 4]]}, "not inside"),
        ("<bbox>", {"bbox": [["1", 2, 3, 4]]}, "only boxes are read"),
        ("<bbox>", {"bbox": [[1, 2, 3, 4]], "bbox_type": "polygon"}, "bbox_type=polygon"),
        ("<bbox>", {"bbox": [[1, 2, 3, 4]], "image_id": [1]}, "in picture 1 of 1"),
        ("<bbox>", [{"caption": "cup", "bbox": [1, 2, 3, 4]}], "other fields"),
        ("<bbox>", {"bbox": [[1, 2, 3, 4]], "mask": ["x"]}, "other fields"),
    ],
)
def test_places_and_objects_that_do_not_fit_reject_the_row(prompt_format, answer, objects, words):
    with pytest.raises(Rejected, match=words):
        sample_of("Where?", answer, objects, prompt_format)


def test_without_a_place_objects_are_only_information(prompt_format):
    sample = sample_of("Where?", "there", {"bbox": [[1, 2, 3, 4]], "area": [4]}, prompt_format)
    assert sample.conversations[1]["value"] == "there"
