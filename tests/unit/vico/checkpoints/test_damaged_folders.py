"""Folders whose weights and config do not match are refused before a weight is used, naming the fault."""

from pathlib import Path

import pytest
import torch

from tests.model_folders import changed_copy, routed_model, written_folder
from tests.tiny_model import make_tiny_model
from vico.checkpoints import load_model
from vico.checkpoints.tensor_files import stored_tensors, write_tensor_files
from vico.checkpoints.write import write_published_folder
from vico.errors import UserError
from vico.model_files import model_config
from vico.published_config import published_config


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    return routed_model(make_tiny_model(folder / "base"), folder / "m")


def test_flash_needs_a_threshold_and_both_parts(tied, tmp_path):
    for change, message in (
        (lambda config, tensors: config["vico"].pop("absolute_threshold"), "no vico.absolute_threshold"),
        (drop_router, "the Flash layout needs connector and router"),
    ):
        source = changed_copy(tied, tmp_path / message[:4], change)
        with pytest.raises(UserError, match=message):
            written_folder(write_published_folder, source, tmp_path / f"out {message[:4]}")


def drop_router(config, tensors):
    config.get("vico", {})["router"] = False  # in a Flash config, flash_mode promises it instead
    for name in [name for name in tensors if "gating" in name]:
        del tensors[name]


@pytest.fixture(scope="module")
def flash(tied, tmp_path_factory) -> Path:
    return written_folder(write_published_folder, tied, tmp_path_factory.mktemp("flash") / "m")


def drop_many(config, tensors):
    for name in [name for name in tensors if name.startswith("vision_model.encoder.layers.1.")]:
        del tensors[name]


def reshape(config, tensors):
    tensors["mlp1.3.weight"] = tensors["mlp1.3.weight"][:, :-1].contiguous()
    tensors["language_model.model.norm.weight"] = torch.zeros(7)


def add_many(config, tensors):
    tensors |= {f"vision_model.extra{number}": torch.zeros(1) for number in range(7)}


@pytest.mark.parametrize(
    "change, message",
    [
        (drop_router, "config.json promises a router, but the weights hold none of its tensors"),
        (
            lambda config, tensors: config.pop("flash_mode"),
            "config.json has no flash_mode; set flash_mode to",
        ),
        (drop_many, r"1[0-9] missing tensors in the weights: ([^,]*, ){4}[^,]*\. The"),
        (
            add_many,
            r"7 surplus tensors in the weights: (vision_model\.extra\d, ){4}[^,]*extra4\. The",
        ),
        (
            reshape,
            r"2 wrongly shaped .*: model.language_model.norm.weight \[7\] instead of \[48\], "
            r"model.multi_modal_projector.linear_2.weight \[48, 47\] instead of \[48, 48\]",
        ),
        (
            lambda config, tensors: config["llm_config"].update(architectures=["Phi3ForCausalLM"]),
            "llm_config.architectures='Phi3ForCausalLM' is not supported; give a model with one of Llama",
        ),
        (
            lambda config, tensors: config.update(template="internlm2-chat"),
            "template='internlm2-chat' is not supported, as prompts are written in 'internvl2_5'; set it",
        ),
    ],
    ids=["router", "flash_mode", "missing", "surplus", "shapes", "language model", "template"],
)
def test_a_flash_folder_that_does_not_match_is_refused(flash, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_model(changed_copy(flash, tmp_path / "m", change))


def test_an_unknown_language_model_in_hf_layout_is_refused(tied, tmp_path):
    folder = changed_copy(
        tied, tmp_path / "m", lambda config, _: config["text_config"].update(model_type="phi3")
    )
    with pytest.raises(
        UserError,
        match=r"text_config\.model_type='phi3' is not supported; .* one of llama, qwen2, qwen3, qwen3_moe",
    ):
        load_model(folder)


@pytest.mark.parametrize(
    "part, field",
    [
        ("vision_config", "num_hidden_layers"),
        ("text_config", "num_hidden_layers"),
        ("text_config", "num_experts"),
        ("text_config", "num_local_experts"),
    ],
)
def test_parts_that_take_hours_to_count_are_refused_at_once(tied, tmp_path, part, field):
    for number, message in ((10**30, "is more than 10,000"), (9_000, "the weights hold only")):

        def change(config, tensors, number=number):
            config[part][field] = number

        folder = changed_copy(tied, tmp_path / str(number), change)
        with pytest.raises(UserError, match=message):
            load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": []},
        {"text_config": "a"},
        {"downsample_ratio": float("inf")},
        {"vision_config": {"patch_size": 0}},
    ],
)
@pytest.mark.parametrize("layout", ["tied", "flash"])
def test_a_config_of_other_forms_is_one_line(request, layout, tmp_path, change):
    def changed(config, tensors):
        for field, value in change.items():
            name = "llm_config" if layout == "flash" and field == "text_config" else field
            config[name] = {**config[name], **value} if isinstance(value, dict) else value

    folder = changed_copy(request.getfixturevalue(layout), tmp_path / "changed", changed)
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(folder)


def test_flash_mode_false_opens(flash, tmp_path):
    folder = changed_copy(flash, tmp_path / "m", lambda config, _: config.update(flash_mode=False))
    model = load_model(folder)
    assert model.router is not None


def test_a_truncated_shard_is_named(tied, tmp_path):
    shards = written_folder(write_published_folder, tied, tmp_path / "m", shard_bytes=200_000)
    path = sorted(shards.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{path.name} is not a whole safetensors file"):
        load_model(shards)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is named in .* but missing"):
        load_model(shards)


def uneven_qkv(config, tensors):
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    tensors[name] = tensors[name][:-1].contiguous()


def test_a_fused_qkv_that_does_not_split_is_refused(flash, tmp_path):
    with pytest.raises(UserError, match="does not split into 3 equal parts"):
        load_model(changed_copy(flash, tmp_path / "m", uneven_qkv))


def test_a_dtype_that_servers_do_not_support_is_refused(tied, tmp_path):
    def widen(config, tensors):
        tensors |= {name: tensor.double() for name, tensor in tensors.items()}

    source = changed_copy(tied, tmp_path / "m", widen)
    with pytest.raises(UserError, match="weights of dtype F64 are not supported, only F32, F16, BF16 are"):
        written_folder(write_published_folder, source, tmp_path / "out")


def test_a_file_that_shrinks_while_it_is_copied_is_named(tied, tmp_path):
    source = changed_copy(tied, tmp_path / "m", lambda config, tensors: None)
    tensors = {name: (tensor,) for name, tensor in stored_tensors(source).items()}
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{path} became shorter while it was read"):
        write_tensor_files(tmp_path, tensors)


def test_a_vision_tower_that_the_published_code_does_not_support_is_refused(tied):
    config = model_config(tied)
    config["vision_config"]["use_mean_pooling"] = False
    with pytest.raises(UserError, match="use_mean_pooling=False has no place in the published layout"):
        published_config(config, {}, "float32")
