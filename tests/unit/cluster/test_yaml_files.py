"""YAML files: numbers, repeated keys, and errors that name file and line."""

import pytest
import yaml

from cluster.settings.yaml_files import yaml_mapping, yaml_text, yaml_value
from vico.errors import UserError


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-5", 1e-5),
        ("1E+3", 1000.0),
        ("-2.5e-3", -0.0025),
        ("1.5", 1.5),
        (".5", 0.5),
        ("12", 12),
        ("-3", -3),
        ("010", 10),
        ("1:30", "1:30"),
        ("true", True),
        ("null", None),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("[1e-5, a]", [1e-5, "a"]),
    ],
)
def test_numbers_are_read_as_people_write_them(text, value):
    result = yaml_value(text, "here")
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' appears twice"),
        ("a: [1, 2", "line 1"),
        ("a: 1\n 2: b: c", "line 2"),
        ("1: a", "line 1: the key 1 is not text"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("- a\n- b", "holds a list; a config file is a block of keys"),
    ],
)
def test_a_fault_is_named_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        yaml_mapping(path, "config")
    assert message in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_merge_key_still_works():
    assert yaml_value("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "here")["b"] == {"x": 3, "y": 2}


TEXTS = ("1e5", "123e4", "08", "010", "1:30", "1_000", "0x1f", ".5", "+7", "yes", "null", "~", "2026-01-01")


@pytest.mark.parametrize("text", [*TEXTS, "", "a: b", "#c", "- x", "a\nb", " a", "é", "e5", "1.2.3", "'\""])
@pytest.mark.parametrize("flow", [False, True])
def test_what_is_written_is_read_as_the_same_value(text, flow):
    """By this reader and by YAML 1.1, as which other programs read the files."""
    value = {"texts": [text], text: {"number": 1e-5, "count": 8, "large": 1e16, "on": True, "none": None}}
    written = yaml_text(value, flow=flow)
    assert yaml_value(written, "here") == yaml.safe_load(written) == value


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.yaml does not exist"):
        yaml_mapping(tmp_path / "missing.yaml", "config")
    with pytest.raises(UserError, match="is a folder"):
        yaml_mapping(tmp_path, "config")


def test_an_empty_file_has_no_keys(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert yaml_mapping(tmp_path / "empty.yaml", "config") == {}


def test_blocks_that_share_an_anchor_are_changed_apart(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &r {x: {y: 1}, z: [1]}\nb: *r\nc: {<<: *r, z: 2}\n")
    content = yaml_mapping(tmp_path / "a.yaml", "config")
    content["b"]["x"]["y"] = content["c"]["x"]["y"] = 3
    content["b"]["z"].append(2)
    assert content["a"] == {"x": {"y": 1}, "z": [1]}
