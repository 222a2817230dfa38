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
