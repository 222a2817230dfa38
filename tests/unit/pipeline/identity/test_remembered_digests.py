"""Large inputs are read once for all storages, with progress; a changed file is read again."""

import json

import pytest

from pipeline.identity import file_digests, remembered_digests
from pipeline.identity.file_digests import DigestCache, file_sha256
from pipeline.identity.remembered_digests import InputDigests


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered_digests, "LARGE_BYTES", 1000)
    monkeypatch.setattr(remembered_digests, "_CHUNK", 700)
    monkeypatch.setattr(remembered_digests, "_NOTIFY_EVERY_S", 0.0)
    monkeypatch.setattr(file_digests, "_RACY_NS", 0)
    return tmp_path / "cache" / "vico"


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"1" * 2000)
    return path


def test_a_large_file_is_read_once_for_every_storage(tmp_path, weights):
    lines = []
    first = InputDigests(tmp_path / "store-1", lines.append)
    assert first.sha256(weights) == file_sha256(weights)
    assert lines[0].startswith("reading weights, 0.0 GB") and len(lines) == 4
    first.remember()  # as `vico plan` does, which writes nothing to the storage
    assert not (tmp_path / "store-1").exists()
    second = InputDigests(tmp_path / "store-2", lines.append)
    assert second.sha256(weights) == file_sha256(weights) and len(lines) == 4
    (tmp_path / "store-2").mkdir()
    second.save()
    assert str(weights) in json.loads((tmp_path / "store-2" / "digests.json").read_text())["files"]
    weights.write_bytes(b"2" * 2000)
    assert InputDigests(tmp_path / "store-3").sha256(weights) == file_sha256(weights)


def test_small_files_and_those_of_other_commands_stay_out_of_each_others_way(tmp_path, weights, user_folder):
    small, other = tmp_path / "small", tmp_path / "other"
    small.write_bytes(b"3")
    other.write_bytes(b"4" * 3000)
    one, two = InputDigests(tmp_path), InputDigests(tmp_path)
    one.sha256(small)
    one.sha256(weights)
    two.sha256(other)
    one.remember()
    two.remember()
    remembered = json.loads((user_folder / "digests.json").read_text())["files"]
    assert set(remembered) == {str(weights), str(other)}
    weights.unlink()
    three = InputDigests(tmp_path)
    three._keep(str(other), [3000, 0, 0, 0], "x" * 64)
    three.remember()
    assert set(json.loads((user_folder / "digests.json").read_text())["files"]) == {str(other)}


def test_a_home_that_cannot_be_written_costs_only_the_memory(tmp_path, weights, user_folder):
    user_folder.parent.write_text("a file")
    digests = InputDigests(tmp_path)
    assert digests.sha256(weights) == DigestCache(tmp_path).sha256(weights)
    digests.remember()
