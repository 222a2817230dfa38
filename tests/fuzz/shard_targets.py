"""A shard folder (index, tars) and a model folder whose files somebody changed."""

import io
import json
import shutil
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from data_prep.shards.index import load_index
from data_prep.shards.reader import SampleReader
from tests.fuzz.hostile import bytes_of, json_of
from tests.fuzz.targets import Target
from tests.record_tars import write_shard_folder
from vico.checkpoints.expected_tensors import checked_tensors
from vico.errors import UserError
from vico.model_files import check_model_folder, check_weights_folder, model_config, tokenizer_files
from vico.prompt import PromptFormat, load_prompt_format
from vico.published_config import published_config
from vico.settings import load_settings
from vico.turn_tokenizer import SpelledToken

_ROWS = 4


def targets(folder: Path) -> list[Target]:
    """Return the targets of shards and models; `folder`/model has the tiny model."""
    shards, model = folder / "shards", folder / "model"
    prompt_format = load_prompt_format(model)
    write_shard_folder(shards, 12, 8, prompt_format)
    index = pq.read_table(shards / "index.parquet")
    cases = st.one_of(
        st.tuples(st.just("index.parquet"), bytes_of([(shards / "index.parquet").read_bytes()])),
        st.tuples(st.just("index.parquet"), _changed_index(index)),
        st.tuples(st.just("00000.tar"), bytes_of([(shards / "00000.tar").read_bytes()])),
    )
    texts = {name: json.loads((model / name).read_text()) for name in ("config.json", "tokenizer.json")}
    published = published_config(
        texts["config.json"],
        {"min_dynamic_patch": 1, "max_dynamic_patch": 12, "use_thumbnail": True},
        "float32",
    )
    weights = bytes_of(
        [(model / "model.safetensors").read_bytes()[:4096], (model / "model.safetensors").read_bytes()]
    )
    index_json = {
        "weight_map": {"a": "model.safetensors", "b": "../outside/secret.png"},
        "metadata": {"total_size": 1},
    }
    model_cases = st.one_of(
        st.tuples(st.just("config.json"), json_of([texts["config.json"], published])),
        st.tuples(st.just("tokenizer.json"), json_of([texts["tokenizer.json"]])),
        st.tuples(
            st.just("tokenizer_config.json"),
            json_of([{"model_max_length": 10**30, "eos_token": "<|im_end|>"}]),
        ),
        st.tuples(
            st.just("preprocessor_config.json"),
            json_of(
                [{"max_patches": 12, "min_patches": 1, "image_mean": [0.485, 0.456, 0.406], "resample": 3}]
            ),
        ),
        st.tuples(st.just("model.safetensors"), weights),
        st.tuples(st.just("model.safetensors.index.json"), json_of([index_json])),
    )
    return [
        Target("index", cases, partial(_shards, shards, prompt_format)),
        # a tokenizer whose end token is a space refuses every text, as it should
        Target("model", model_cases, partial(_model, model), answers=(UserError, SpelledToken)),
    ]


def _shards(good: Path, prompt_format: PromptFormat, folder: Path, case: tuple[str, bytes]) -> None:
    name, data = case
    for file in ("index.parquet", "00000.tar", "00001.tar"):
        shutil.copyfile(good / file, folder / file)
    (folder / name).write_bytes(data)
    for split in ("train", "test"):
        columns = load_index(folder).columns(split)
        columns.shard_runs()
    reader = SampleReader(folder, prompt_format)
    for row in range(min(_ROWS, len(reader.index))):
        reader.sample(row)


def _model(good: Path, folder: Path, case: tuple[str, bytes]) -> None:
    name, data = case
    for path in good.iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / name).write_bytes(data)
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    check_model_folder(folder)
    check_weights_folder(folder)
    model_config(folder)
    load_settings(folder)
    tokenizer_files(folder)
    checked_tensors(folder)
    if "safetensors" not in name:
        load_prompt_format(folder).encode(
            [{"from": "human", "value": "é a"}, {"from": "gpt", "value": "b"}], ()
        )


@st.composite
def _changed_index(draw: st.DrawFn, index: pa.Table) -> bytes:
    """Draw the index with other numbers, other columns or nulls."""
    rows = index.to_pylist()
    number = st.sampled_from([-1, 0, 1, 2**15, 2**31 - 1, -(2**31), 10**6])
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(rows))
        name = draw(st.sampled_from(sorted(place)))
        if isinstance(place[name], list):
            place[name] = draw(st.lists(number, max_size=3)) if name != "image_sha256" else []
        elif isinstance(place[name], int):
            place[name] = draw(number)
        elif isinstance(place[name], str):
            place[name] = draw(st.text(max_size=5))
    try:
        table = pa.Table.from_pylist(rows, schema=index.schema)
    except (pa.ArrowException, OverflowError, UnicodeError):
        table = index
    if draw(st.integers(0, 4)) == 0:
        table = table.drop_columns(draw(st.sampled_from(table.column_names)))
    data = io.BytesIO()
    pq.write_table(table, data)
    return data.getvalue()
