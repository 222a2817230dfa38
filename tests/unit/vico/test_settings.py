"""Model folders: what is read from them, and messages that name what is missing."""

import json
import shutil

import pytest

from tests.tiny_model import make_tiny_model
from vico.errors import UserError
from vico.prompt import load_prompt_format
from vico.settings import load_settings


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m", tile_size=112)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "m")


def change(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_token_counts_follow_tile_and_patch_size(folder):
    settings = load_settings(folder)
    assert (settings.tile_size, settings.tokens_full, settings.tokens_compressed) == (112, 16, 4)
    assert settings.vision_tokens == 64


def test_a_row_can_lower_the_tile_limit_of_the_model_but_not_raise_it(folder):
    change(folder, "preprocessor_config.json", max_patches=6)
    settings = load_settings(folder)
    assert settings.tiling().max_tiles == 6
    assert settings.tiling(4).max_tiles == 4
    assert settings.tiling(40).max_tiles == 6


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load_prompt_format(folder)


def test_a_missing_field_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["image_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="image_token_id"):
        load_settings(folder)


def test_a_missing_shard_of_the_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors"):
        load_settings(folder)


def test_a_tile_size_that_the_compressed_rate_cannot_divide_is_refused(folder):
    change(
        folder,
        "config.json",
        vision_config={
            **json.loads((folder / "config.json").read_text())["vision_config"],
            "image_size": [84, 84],
        },
    )
    with pytest.raises(UserError, match="image_size=84 and patch_size=14"):
        load_settings(folder)


def test_an_image_token_id_other_than_the_tokenizers_is_refused(folder):
    change(folder, "config.json", image_token_id=7)
    with pytest.raises(UserError, match="image_token_id=7"):
        load_prompt_format(folder)


def test_another_normalisation_is_refused(folder):
    change(folder, "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    with pytest.raises(UserError, match=r"image_mean=\[0.5, 0.5, 0.5\] is not supported"):
        load_settings(folder)


@pytest.mark.parametrize(
    "limits", [{"max_patches": 0}, {"max_patches": "6"}, {"min_patches": 7, "max_patches": 6}]
)
def test_limits_that_allow_no_tile_are_refused(folder, limits):
    change(folder, "preprocessor_config.json", **limits)
    with pytest.raises(UserError, match=r"max_patches=\S+ are not numbers of tiles, at least 1 and in this"):
        load_settings(folder)


def test_an_image_token_id_of_another_form_is_refused(folder):
    change(folder, "config.json", image_token_id="7")
    with pytest.raises(UserError, match="image_token_id='7' is not a whole number"):
        load_settings(folder)
