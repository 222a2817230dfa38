"""Which folders can be adopted as the result of a stage."""

from pathlib import Path

import pytest

from stages.adopted import adopted_files, files_digest
from stages.outputs import NEEDED
from vico.errors import UserError


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_a_model_folder_becomes_the_policy(tmp_path):
    folder = write(tmp_path, "config.json", "model.safetensors", ".cache/x")
    assert set(adopted_files("consistency", folder)) == {"policy/config.json", "policy/model.safetensors"}


def test_an_output_folder_keeps_its_names(tmp_path):
    folder = write(tmp_path, "policy/config.json", "policy/model.safetensors")
    assert set(adopted_files("consistency", folder)) == {"policy/config.json", "policy/model.safetensors"}


@pytest.mark.parametrize("stage", NEEDED)
def test_a_folder_without_what_later_stages_read_is_refused(tmp_path, stage):
    folder = write(tmp_path, "something")
    with pytest.raises(
        UserError, match=f"inputs.adopt.{stage}=.* has no {NEEDED[stage][0]}; give the output"
    ):
        adopted_files(stage, folder)


def test_the_digest_depends_on_names_and_contents(tmp_path):
    first, second = write(tmp_path / "first", "a", "b"), write(tmp_path / "second", "a", "b")
    digest = files_digest(adopted_files("x", first), Path.read_text)
    assert digest == files_digest(adopted_files("x", second), Path.read_text)
    (second / "b").rename(second / "c")
    assert digest != files_digest(adopted_files("x", second), Path.read_text)


@pytest.mark.parametrize("name", ["notes.txt", "policy/tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path, name):
    """A folder from others could link to files that only this user may read."""
    folder = write(tmp_path / "result", "policy/config.json", "policy/model.safetensors")
    secret = write(tmp_path / "home", "id_rsa") / "id_rsa"
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=rf"{name} is a link to {secret}, outside the folder {folder}; copy"):
        adopted_files("consistency", folder)


@pytest.mark.parametrize("target", ["elsewhere", "gone"])
def test_a_linked_folder_and_a_dangling_link_are_not_left_out_silently(tmp_path, target):
    folder = write(tmp_path / "result", "policy/config.json", "policy/model.safetensors")
    write(tmp_path / "elsewhere", "a")
    (folder / "more").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match="more is a link to no file, and nothing below it would be adopted"):
        adopted_files("consistency", folder)


def test_links_within_the_folder_and_of_a_hugging_face_cache_are_followed(tmp_path):
    folder = write(tmp_path / "result", "policy/config.json", "weights/model.safetensors")
    (folder / "policy" / "model.safetensors").symlink_to("../weights/model.safetensors")
    assert "policy/model.safetensors" in adopted_files("consistency", folder)
    cache = write(tmp_path / "models--x", "blobs/1", "blobs/2", "snapshots/0123/README")
    snapshot = cache / "snapshots" / "0123"
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/2")
    assert "policy/model.safetensors" in adopted_files("consistency", snapshot)
