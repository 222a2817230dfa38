"""Records configs, meta files and their fingerprints."""

import json
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from data_prep.records.config import RecordsConfig
from data_prep.records.identity import records_fingerprint
from data_prep.records.sets import RecordFile, check_slugs, record_sets
from tests.record_files import row, write_lines, write_meta
from vico.errors import UserError


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"format": "internvl"}, "path is missing"),
        ({"format": "demo", "path": "meta.json"}, "path=meta.json has no effect"),
        ({"format": "internvl", "path": "meta.json", "num_samples": 7}, "num_samples=7 has no effect"),
        ({"format": "webdatasets", "path": "x"}, "format"),
        ({"format": "internvl", "path": "x", "root": "y"}, "root=y has no effect"),
        ({"format": "demo", "num_sample": 7}, "num_sample"),
    ],
)
def test_a_field_without_effect_is_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        RecordsConfig(**fields)


def test_a_config_survives_dump_and_load(tmp_path):
    for config in (RecordsConfig(format="demo", seed=3), RecordsConfig(format="internvl", path=tmp_path)):
        assert RecordsConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not a valid meta file"),
        ("[]", "not a meta file"),
        ("{}", "not a meta file"),
        ('{"a": {}, "a": {}}', "'a' appears twice"),
        ('{"a": 5}', "set 'a' is not an object"),
        ('{"a": {"annotation": "a.jsonl", "rot": ""}}', "unknown field 'rot'"),
        ('{"a": {"root": ""}}', "annotation=None"),
        ('{"a": {"annotation": "b.jsonl"}}', "annotation=b.jsonl: neither .* exists"),
        ('{"a": {"annotation": "images"}}', "which is not a file"),
        ('{"a": {"annotation": "a.json"}}', r"JSON lines named \*.jsonl"),
        ('{"a": {"annotation": "a.jsonl", "root": "nowhere"}}', "root=nowhere: neither"),
        ('{"a": {"annotation": "a.jsonl", "root": "a.jsonl"}}', "which is not a folder"),
        ('{"a": {"annotation": "a.jsonl", "data_augment": true}}', "data_augment=True"),
        ('{"a": {"annotation": "a.jsonl", "repeat_time": -1}}', "repeat_time=-1"),
        ('{"a": {"annotation": "a.jsonl", "repeat_time": "two"}}', "repeat_time='two'"),
        ('{"a": {"annotation": "a.jsonl", "max_dynamic_patch": 0}}', "max_dynamic_patch=0"),
        (r'{"a\ud800": {"annotation": "a.jsonl"}}', "half of a surrogate pair in its name"),
        (r'{"a": {"annotation": "a.jsonl", "license": "\udc00"}}', "surrogate pair in its license"),
    ],
)
def test_an_error_in_a_meta_file_is_one_line_that_names_the_file(tmp_path, text, words):
    write_lines(tmp_path / "a.jsonl", [row()])
    write_lines(tmp_path / "a.json", [row()])
    (tmp_path / "images").mkdir()
    meta = tmp_path / "meta.json"
    meta.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        record_sets(RecordsConfig(format="internvl", path=meta))
    assert str(meta) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_unreadable_meta_file_is_named(tmp_path):
    for path, words in ((tmp_path / "none.json", "does not exist"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=words) as caught:
            records_fingerprint(RecordsConfig(format="internvl", path=path))
        assert str(path) in str(caught.value)


def test_sets_have_the_values_of_the_meta_file(tmp_path):
    meta = write_meta(tmp_path, first={"repeat_time": 2.5, "length": 99}, second={"max_dynamic_patch": 6})
    for name in ("first", "second"):
        write_lines(tmp_path / f"{name}.jsonl", [row()])
    first, second = record_sets(RecordsConfig(format="internvl", path=meta), heldout=True)
    assert (first.name, first.repeat, first.max_tiles) == ("heldout-first", 2.5, None)
    assert (second.repeat, second.max_tiles, second.heldout) == (1.0, 6, True)
    assert second.rows == RecordFile("internvl", tmp_path / "second.jsonl", tmp_path / "images")


def test_relative_paths_are_also_found_from_the_working_directory(tmp_path, monkeypatch):
    write_lines(tmp_path / "data" / "a.jsonl", [row()])
    (tmp_path / "elsewhere").mkdir()
    meta = tmp_path / "elsewhere" / "meta.json"
    meta.write_text(json.dumps({"a": {"root": "data", "annotation": "data/a.jsonl"}}))
    monkeypatch.chdir(tmp_path)
    (record_set,) = record_sets(RecordsConfig(format="internvl", path=meta))
    assert record_set.rows == RecordFile("internvl", tmp_path / "data" / "a.jsonl", tmp_path / "data")


def test_set_names_that_give_the_same_keys_are_refused(tmp_path):
    sets = {"a.b": {"annotation": "x.jsonl"}, "a/b": {"annotation": "x.jsonl"}}
    write_lines(tmp_path / "x.jsonl", [row()])
    with pytest.raises(UserError, match=r"'a\.b' and 'a/b'"):
        record_sets(RecordsConfig(format="internvl", path=write_meta(tmp_path, **sets)))
    demo = record_sets(RecordsConfig(format="demo"))
    with pytest.raises(UserError, match="same keys"):
        check_slugs(demo + demo)
    check_slugs(demo + record_sets(RecordsConfig(format="demo"), heldout=True))


def test_the_fingerprint_depends_on_content_and_not_on_paths(tmp_path):
    def fingerprint(folder: Path, **fields: object) -> str:
        write_meta(folder, a=fields)
        return records_fingerprint(RecordsConfig(format="internvl", path=folder / "meta.json"))

    write_lines(tmp_path / "here" / "a.jsonl", [row()])
    (tmp_path / "pictures").mkdir()
    first = fingerprint(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    (tmp_path / "there" / "a.jsonl").rename(tmp_path / "there" / "renamed.jsonl")
    moved = {"annotation": "renamed.jsonl", "root": str(tmp_path / "pictures"), "length": 5}
    assert fingerprint(tmp_path / "there", **moved) == first
    assert fingerprint(tmp_path / "here", repeat_time=1, data_augment=False) == first
    assert fingerprint(tmp_path / "here", repeat_time=2) != first
    assert fingerprint(tmp_path / "here", max_dynamic_patch=6) != first
    write_lines(tmp_path / "here" / "a.jsonl", [row(), row(answer="more")])
    assert fingerprint(tmp_path / "here") != first


def test_the_fingerprint_of_the_demo_depends_on_its_parameters():
    first = records_fingerprint(RecordsConfig(format="demo", num_samples=10))
    assert first == records_fingerprint(RecordsConfig(format="demo", num_samples=10, seed=0))
    assert first != records_fingerprint(RecordsConfig(format="demo", num_samples=10, seed=1))
    assert first != records_fingerprint(RecordsConfig(format="demo", num_samples=11))
