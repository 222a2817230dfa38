"""Repaired rows of tars and parquet files: a row has the pictures of its original, or those that it names."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.rejection import Rejected
from data_prep.records.repairs import RowAddress, repair_block_rows, repair_blocks, repaired_rows
from data_prep.records.sets import record_sets
from data_prep.shards.checks import Sample, checked_sample
from tests.record_files import picture, row, write_lines
from tests.record_samples import ANSWER, RULES, write_tar
from vico.prompt import PromptFormat

FIRST, SECOND, NEW = (picture(n, format="JPEG") for n in (50, 51, 52))
BAD = [{"from": "human", "value": "<image>q"}, {"from": "human", "value": "q2"}]


def results(
    config: RecordsConfig,
    folder: Path,
    prompt_format: PromptFormat,
    repairs: dict[int, dict[str, Any] | None],
) -> list[Sample | str]:
    """Return the result of each repaired row of the only set; None is a line without `row`."""
    sets = record_sets(config)
    lines = [
        {"source": sets[0].name, "line": line, **({} if new_row is None else {"row": new_row})}
        for line, new_row in repairs.items()
    ]
    quarantined = {RowAddress(sets[0].name, line) for line in repairs}
    rows = repaired_rows(write_lines(folder / "rows.jsonl", lines), quarantined)
    checked: list[Sample | str] = []
    for block in repair_blocks(rows, sets, record_blocks(sets, 2), 2, 7):
        for raw in repair_block_rows(block):
            try:
                checked.append(checked_sample(raw, RULES, prompt_format))
            except Rejected as rejected:
                checked.append(rejected.reason)
    return checked


def pictures_of(sample: Sample | str) -> list[bytes]:
    assert isinstance(sample, Sample), sample
    return [p.data for p in sample.pictures]


def tar(folder: Path, suffix: str = "tar") -> RecordsConfig:
    """Write five samples with two pictures each and turns that are wrong; the fourth has no .json."""
    members: dict[str, bytes] = {}
    for n in range(5):
        members |= {f"x/{n}.b.jpg": FIRST, f"x/{n}.a.jpg": SECOND}
        if n != 3:
            members[f"x/{n}.json"] = json.dumps({"id": n, "conversations": BAD}).encode()
    write_tar(folder / "a.tar", members)
    return RecordsConfig(format="webdataset", path=folder / "a.tar")


def parquet(folder: Path) -> RecordsConfig:
    """Write five rows with two pictures each and turns that are wrong; a text of the fourth is not UTF-8."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    note = pa.array([b"n", b"n", b"n", b"\xff", b"n"], pa.binary())
    pictures = [{"bytes": FIRST, "path": "b.jpg"}, {"bytes": SECOND, "path": "a.jpg"}]
    columns = {
        "id": [str(n) for n in range(5)],
        "conversations": [json.dumps(BAD)] * 5,
        "image": pa.array([pictures] * 5, pa.list_(image)),
        "note": pa.Array.from_buffers(pa.string(), 5, note.buffers()),
    }
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return RecordsConfig(format="parquet", path=folder / "a.parquet")


def two_marks(answer: str = ANSWER, **fields: Any) -> dict[str, Any]:
    return {"conversations": row(["x", "y"], answer)["conversations"], **fields}


@pytest.mark.parametrize("write_records", [tar, parquet], ids=["tar", "parquet"])
def test_a_repaired_row_has_the_pictures_of_its_original(tmp_path, prompt_format, write_records):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    repairs = {
        0: two_marks(),
        1: {"texts": [{"user": "what?", "assistant": "this"}]},
        3: two_marks("of a row that could not be read"),
        4: None,
    }
    good = results(write_records(tmp_path), tmp_path, prompt_format, repairs)
    assert [pictures_of(sample) for sample in good[:3]] == [[FIRST, SECOND]] * 3
    assert good[3] == "no_answer", "the original line was checked again"
    assert good[1].conversations[0]["value"] == "<image>\n<image>\nwhat?"
    without = {2: {"messages": messages, "image": []}}
    (text,) = results(write_records(tmp_path), tmp_path, prompt_format, without)
    assert text.pictures == [] and text.conversations[1]["value"] == "a"


@pytest.mark.parametrize("field", ["image", "images"])
@pytest.mark.parametrize("write_records", [tar, parquet], ids=["tar", "parquet"])
def test_a_repaired_row_may_name_its_pictures_or_files(tmp_path, prompt_format, write_records, field):
    (tmp_path / "new.jpg").write_bytes(NEW)
    repairs = {
        0: two_marks(**{field: ["a.jpg", "b.jpg"]}),
        1: two_marks(**{field: ["new.jpg", "b.jpg"]}),
        2: {"conversations": row("x")["conversations"], field: ["a.jpg"]},
        3: two_marks(**{field: ["a.jpg", "absent.jpg"]}),
        4: two_marks(**{field: ["a.jpg", "../a.jpg"]}) | {"id": "outside"},
    }
    good = results(write_records(tmp_path), tmp_path, prompt_format, repairs)
    assert [pictures_of(sample) for sample in good[:3]] == [[SECOND, FIRST], [NEW, FIRST], [SECOND]]
    assert good[3] == "missing_image" and good[4] in ("path_outside_root", "missing_image")


def test_rows_of_a_compressed_tar_are_repaired(tmp_path, prompt_format):
    import gzip

    config = tar(tmp_path)
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    config = config.model_copy(update={"path": str(tmp_path / "b.tar.gz")})
    good = results(config, tmp_path, prompt_format, {4: two_marks("b"), 0: two_marks("a")})
    assert [sample.conversations[1]["value"] for sample in good] == ["a", "b"]
    assert [pictures_of(sample) for sample in good] == [[FIRST, SECOND]] * 2


def test_a_repaired_row_that_appears_twice_in_the_file_is_a_duplicate(tmp_path, prompt_format):
    good = results(tar(tmp_path), tmp_path, prompt_format, {0: two_marks(), 2: two_marks()})
    assert pictures_of(good[0]) and good[1] == "duplicate"
    # the originals of 0 and 1 are equal but for the id, and what the repaired row says counts
    good = results(parquet(tmp_path), tmp_path, prompt_format, {0: two_marks("a"), 1: two_marks("b")})
    assert all(isinstance(sample, Sample) for sample in good)
