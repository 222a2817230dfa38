import json
import os
import shutil
import time

import pytest

from pipeline.identity import file_digests as digests
from pipeline.identity.file_digests import DigestCache
from pipeline.identity.input_digests import model_files, model_fingerprint, tokenizer_fingerprint
from tests.tiny_model import make_tiny_model
from vico.errors import UserError

OLD = time.time() - 100


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def model(shared_model, tmp_path):
    shutil.copytree(shared_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path):
    return DigestCache(tmp_path)


def test_the_models_fingerprint_depends_on_content_and_names_not_on_its_folder(model, cache, tmp_path):
    before = model_fingerprint(model, cache)
    moved = tmp_path / "moved"
    model.rename(moved)
    assert model_fingerprint(moved, cache) == before
    for name in ("README.md", "modeling_internvl.py", ".gitattributes", "LICENSE", "tiles.png"):
        (moved / name).write_text("not read by any loader")
    (moved / "onnx").mkdir()
    (moved / "onnx" / "model.bin").write_text("x")
    assert model_fingerprint(moved, cache) == before
    (moved / "generation_config.json").write_text("{}")
    assert model_fingerprint(moved, cache) != before


def test_changed_weights_change_the_fingerprint_of_the_model_but_not_of_the_tokenizer(model, cache):
    before = model_fingerprint(model, cache), tokenizer_fingerprint(model, cache)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert model_fingerprint(model, cache) != before[0]
    assert tokenizer_fingerprint(model, cache) == before[1]


def test_tile_size_and_limits_change_the_tokenizers_fingerprint(model, cache):
    seen = {tokenizer_fingerprint(model, cache)}
    path = model / "preprocessor_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, "max_patches": 5}))
    seen.add(tokenizer_fingerprint(model, cache))
    config = json.loads((model / "config.json").read_text())
    config["vision_config"]["image_size"] = [112, 112]
    (model / "config.json").write_text(json.dumps(config))
    seen.add(tokenizer_fingerprint(model, cache))
    assert len(seen) == 3


def test_links_of_a_hub_cache_are_followed(model, cache, tmp_path):
    blobs, linked = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    linked.mkdir(parents=True)
    for path in model_files(model):
        (blobs / f"blob-{path.name}").write_bytes(path.read_bytes())
        (linked / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert model_fingerprint(linked, cache) == model_fingerprint(model, cache)


def test_a_model_without_weights_is_refused(model, cache):
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        model_fingerprint(model, cache)


def write(path, text, mtime=OLD):
    path.write_text(text)
    os.utime(path, (mtime, mtime))


def test_a_cached_file_is_not_read_again_until_the_file_system_reports_a_change(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_RACY_NS", 0)  # unlike the mtime, the ctime cannot be set to an old time
    path = tmp_path / "weights"
    write(path, "one")
    cache = DigestCache(tmp_path)
    first = cache.sha256(path)
    cache.save()

    again = DigestCache(tmp_path)
    monkeypatch.setattr(digests, "file_sha256", lambda path: "read again")
    assert again.sha256(path) == first
    write(path, "two")  # same size, same mtime
    assert again.sha256(path) == "read again"


def test_a_file_that_just_changed_is_not_cached(tmp_path):
    path = tmp_path / "weights"
    path.write_text("one")
    cache = DigestCache(tmp_path)
    cache.sha256(path)
    cache.save()
    assert not (tmp_path / "digests.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"schema": 9, "files": {}}', "null"])
def test_a_damaged_cache_file_is_ignored(tmp_path, content):
    (tmp_path / "digests.json").write_text(content)
    (tmp_path / "weights").write_text("one")
    assert len(DigestCache(tmp_path).sha256(tmp_path / "weights")) == 64


def test_files_that_no_longer_exist_leave_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_RACY_NS", 0)
    for name in ("a", "b"):
        write(tmp_path / name, name)
    cache = DigestCache(tmp_path)
    cache.sha256(tmp_path / "a")
    (tmp_path / "a").unlink()
    cache.sha256(tmp_path / "b")
    cache.save()
    assert list(json.loads((tmp_path / "digests.json").read_text())["files"]) == [str(tmp_path / "b")]
