"""What is loaded is hashed: model folders whose index or links name files outside are refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from pipeline.identity.file_digests import DigestCache
from pipeline.identity.input_digests import model_fingerprint, tokenizer_fingerprint
from tests.tiny_model import make_tiny_model
from vico.checkpoints.load import load_model
from vico.checkpoints.tensor_files import stored_tensors
from vico.errors import UserError
from vico.model_files import check_model_folder, weight_files


@pytest.fixture
def model(tmp_path) -> Path:
    return make_tiny_model(tmp_path / "model")


def with_index(model: Path, name: object) -> None:
    """Move the weights to `name` and let an index name them."""
    weights = model / "model.safetensors"
    tensors = list(load_file(weights))
    if isinstance(name, str):
        target = model / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(weights, target)
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, name)})
    )


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/x.safetensors",
        ".hidden.safetensors",
        "weights.png",
        3,
        None,
        ["a"],
        "x\\y",
    ],
)
def test_an_index_names_plain_files_of_the_folder(model, name):
    with_index(model, name)
    for read in (check_model_folder, weight_files, stored_tensors):
        with pytest.raises(UserError, match=r"index.json: weight_map names .* without a path"):
            read(model)


def test_an_absolute_name_is_refused(model, tmp_path):
    with_index(model, str(tmp_path / "outside.safetensors"))
    with pytest.raises(UserError, match="weight_map names"):
        load_model(model)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": "x"}])
def test_an_index_without_names_is_refused(model, index):
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="weight_map names"):
        weight_files(model)


def test_weights_with_any_plain_name_enter_the_fingerprint(model, tmp_path):
    with_index(model, "README.safetensors")
    before = model_fingerprint(model, DigestCache(tmp_path / "a"))
    weights = load_file(model / "README.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, model / "README.safetensors")
    assert model_fingerprint(model, DigestCache(tmp_path / "b")) != before


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "notes.txt"]
)
def test_links_out_of_the_folder_are_refused(model, tmp_path, name):
    outside = tmp_path / f"outside-{name}"
    if (model / name).exists():
        shutil.move(model / name, outside)
    else:
        outside.write_text("private")
    (model / name).symlink_to(outside)
    with pytest.raises(UserError, match=rf"{name} is a link to .*outside the folder .*; copy the file"):
        check_model_folder(model)
    if name.startswith("tokenizer"):
        with pytest.raises(UserError, match="is a link to"):
            tokenizer_fingerprint(model, DigestCache(tmp_path))


def test_other_tokenizer_files_are_not_named(model, tmp_path):
    shutil.copy(model / "tokenizer.json", tmp_path / "tokenizer.4.0.json")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["fast_tokenizer_files"] = ["../tokenizer.4.0.json"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="fast_tokenizer_files names other files"):
        tokenizer_fingerprint(model, DigestCache(tmp_path))


def test_a_snapshot_of_the_hub_works_and_is_hashed_by_content(model, tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, cache / f"blobs/{number}")
        (snapshot / path.name).symlink_to(Path(f"../../blobs/{number}"))
    assert check_model_folder(snapshot) == snapshot and load_model(snapshot) is not None
    digests = DigestCache(tmp_path)
    assert model_fingerprint(snapshot, digests) == model_fingerprint(model, digests)
    assert tokenizer_fingerprint(snapshot, digests) == tokenizer_fingerprint(model, digests)
    blob = Path(os.path.realpath(snapshot / "model.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(blob).items()}, blob)
    assert model_fingerprint(snapshot, DigestCache(tmp_path)) != model_fingerprint(model, digests)


def test_a_folder_that_is_a_link_works(model, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(model)
    (model / "again.txt").symlink_to("config.json")
    assert check_model_folder(link) == link
