"""Texts that would fill the memory, take minutes or end in a traceback are refused in one line."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from cluster.metric_lines import MetricLine
from cluster.settings.yaml_files import yaml_mapping
from data_prep.records.blocks import block_rows, record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.internvl import read_meta
from data_prep.records.raw_rows import parsed_row
from data_prep.records.rejection import Rejected
from data_prep.records.row_forms import normal_form
from data_prep.records.sets import record_sets
from pipeline.config.dotted_keys import apply_override
from pipeline.config.graph import pipeline_graph
from pipeline.config.pipeline_file import load_config
from pipeline.results.runs import RunFile
from tests.tiny_model import make_tiny_model
from vico.bounded_text import MAX_DEPTH, bounded_json, refuse_depth, refuse_yaml_bomb
from vico.errors import UserError
from vico.model_files import check_model_folder, model_config, tokenizer_files, weight_files
from vico.prompt import load_prompt_format
from vico.settings import load_settings

DEPTHS = (MAX_DEPTH + 1, 900, 3_000, 200_000)
"""Just too deep; what C reads and Python walks cannot; what Python's own reader refuses; more."""
JSON_BOMBS = {
    **{f"lists-{depth}": "[" * depth + "]" * depth for depth in DEPTHS},
    **{f"objects-{depth}": '{"a":' * depth + "1" + "}" * depth for depth in DEPTHS},
    "open lists": "[" * 100_000,
    "digits": "1" * 1_000_000,
    "few digits": "9" * 50,
    "float": "1e999",
}
YAML_BOMBS = {
    "aliases": "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(12)),
    "merges": "a0: &a0 {k: 1}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)),
    "aliased keys": "a: &a [x, y]\nb: {? *a : 1}\n",
    "itself": "a: &a [*a]\n",
    "itself in a merge": "a: &a {<<: *a}\n",
    "lists": "a: " + "[" * 3_000 + "]" * 3_000,
    "blocks": "".join(" " * n + "a:\n" for n in range(400)),
    "digits": "a: " + "1" * 200_000,
    "hex digits": "a: 0x" + "f" * 200_000,
    "sixties": "a: 1" + ":59" * 60_000,
    "long": "a: [" + "x, " * 400_000 + "]",
    "values": "a: [" + "x," * 60_000 + "]",
}
HANG_S = 120


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """End a test that a bomb keeps busy."""

    def hangs(number: int, frame: object) -> NoReturn:
        raise TimeoutError(f"still busy after {HANG_S} s")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANG_S)
    yield
    signal.alarm(0)


def refused(action: Callable[[], object], *names: str) -> None:
    """Assert a UserError of one short line that names these."""
    with pytest.raises(UserError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text and len(text) < 600 + sum(map(len, names)), text[:2000]
    assert all(name in text for name in names), text


@pytest.mark.parametrize("bomb", YAML_BOMBS)
def test_yaml_bombs_in_pipeline_site_and_overrides(tmp_path, bomb):
    path = tmp_path / "file.yaml"
    path.write_text(YAML_BOMBS[bomb])
    refused(lambda: yaml_mapping(path, "config"), str(path))
    refused(lambda: yaml_mapping(path, "site"), str(path))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 3_000 + "]" * 3_000, id="lists"),
        pytest.param(
            "{a: &a [x,x,x,x,x,x,x,x,x], "
            + ", ".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}' if n else '*a'] * 9)}]" for n in range(9))
            + "}",
            id="aliases",
        ),
        pytest.param("1" * 1_000_000, id="digits"),
    ],
)
def test_yaml_bombs_in_overrides(text):
    refused(lambda: apply_override({}, f"shard.max_tiles={text}"), "shard.max_tiles")


def test_an_override_with_thousands_of_keys():
    refused(lambda: apply_override({}, ".".join("a" * 3_000) + "=1"), "the key has 3000 parts")


def test_yaml_that_people_write_is_read(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(
        "base: &base {a: 1, b: [1, 2.5, 1e-5]}\nother: {<<: *base, c: 12345678901234567890}\n"
        f"digest: '{'1' * 64}'\nhash: {'ab12' * 16}\nlist: [{', '.join(['name'] * 2_000)}]\n"
    )
    assert yaml_mapping(path, "config")["other"] == {"a": 1, "b": [1, 2.5, 1e-5], "c": 12345678901234567890}
    assert len(yaml_mapping(path, "site")["list"]) == 2_000
    refuse_yaml_bomb("a: &a 1\nb: &b [*a, *a]\nc: [*b, *b]\n")


@pytest.mark.parametrize("bomb", JSON_BOMBS)
def test_bombs_in_a_meta_file(tmp_path, bomb):
    path = tmp_path / "meta.json"
    path.write_text(f'{{"set": {{"root": {JSON_BOMBS[bomb]}}}}}')
    refused(lambda: read_meta(path), str(path))


def test_a_meta_file_with_a_repeated_name_among_many(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text("{" + ",".join(f'"n{n}": 1' for n in [*range(200_000), 199_999]) + "}")
    refused(lambda: read_meta(path), "the name 'n199999' appears twice")


@pytest.mark.parametrize("bomb", sorted(JSON_BOMBS.keys() - {"float"}))  # in a row 1e999 is a missing value
def test_bombs_in_a_row(bomb):
    with pytest.raises(Rejected, match=r"nested more than|digits|too large|Expecting"):
        parsed_row(f'{{"id": {JSON_BOMBS[bomb]}}}'.encode())
    deep: list[object] = []
    for _ in range(2_000):
        deep = [deep]
    with pytest.raises(Rejected, match="nested more than"):
        parsed_row({"id": deep})


def test_deep_but_readable_values_are_read():
    depth = MAX_DEPTH
    assert bounded_json("[" * depth + "]" * depth, 1_000)
    assert parsed_row(b'{"boxes": ' + json.dumps([[1, 2], [3.5, 4]] * 500).encode() + b"}")["boxes"][1] == [
        3.5,
        4,
    ]
    refuse_depth([[]] * 100_000)


@pytest.mark.parametrize("bomb", JSON_BOMBS)
def test_bombs_in_a_metric_line_and_a_run_file(tmp_path, bomb):
    with pytest.raises(ValueError):
        MetricLine.parse(f'{{"step": 1, "time": 1, "metrics": {{"a": {JSON_BOMBS[bomb]}}}}}'.encode())
    path = tmp_path / "run.json"
    path.write_text(f'{{"schema": 1, "run": {JSON_BOMBS[bomb]}}}')
    refused(lambda: RunFile.read(path, "remove it"), str(path), "remove it")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("bombs") / "model")


MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors.index.json",
)


@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.parametrize("bomb", [*JSON_BOMBS, "large"])
def test_bombs_in_a_model_folder(model, tmp_path, name, bomb):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if name == "processor_config.json":  # is read if the other is not there
        (folder / "preprocessor_config.json").unlink(missing_ok=True)
    if bomb == "large":
        with (folder / name).open("wb") as file:
            file.write(b'{"a": 1}')
            file.truncate(2**29)
    else:
        (folder / name).write_text(f'{{"bomb": {JSON_BOMBS[bomb]}}}')

    def read_all() -> None:
        check_model_folder(folder)
        model_config(folder)
        weight_files(folder)
        tokenizer_files(folder)
        load_settings(folder)
        load_prompt_format(folder)

    refused(read_all, str(folder / name))


@pytest.mark.parametrize("text", ['{{"conversations": {}}}\n{{}}\n', '[{{"conversations": {}}}, {{}}]'])
def test_long_numbers_in_files_of_rows_are_left_to_the_rows(tmp_path, text):
    """Python converts no number of over 4,300 digits; where a row ends does not depend on its value."""
    (tmp_path / "a.json").write_text(text.format("9" * 100_000))
    config = RecordsConfig(format="llava", path=tmp_path / "a.json")
    (block,) = record_blocks(record_sets(config), 5)
    reasons = []
    for raw in block_rows(block):
        with pytest.raises(Rejected) as caught:
            normal_form(raw)
        reasons.append(caught.value.reason)
    assert reasons == ["not_json", "broken_row"]


def test_a_pipeline_file_of_thousands_of_unknown_keys_names_the_first(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("".join(f"key{n}: 1\n" for n in range(12_000)))
    with pytest.raises(UserError) as error:
        load_config(path, pipeline_graph())
    lines = str(error.value).splitlines()
    assert len(lines) < 100 and lines[-1].startswith("and ") and "more faults" in lines[-1]
