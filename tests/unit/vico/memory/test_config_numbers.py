"""A config.json whose numbers describe no model is refused by fields as written, all faults at once."""

import json
from copy import deepcopy

import pytest

from vico.errors import UserError
from vico.model_files import model_config

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {**SIZES, "image_size": 448, "patch_size": 14}
DENSE = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PUBLISHED = {
    "vision_config": VISION,
    "llm_config": {"architectures": ["Qwen3MoeForCausalLM"], **DENSE, **EXPERTS},
}
HUGGING_FACE = {
    "model_type": "internvl",
    "vision_config": VISION,
    "text_config": {"model_type": "qwen3", **DENSE},
}


def refusal(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        model_config(folder)
    return str(error.value)


def changed(config, field, value):
    config = deepcopy(config)
    block = config
    *parts, name = field.split(".")
    for part in parts:
        block = block[part]
    if value is ...:
        del block[name]
    else:
        block[name] = value
    return config


WRONG = "is not a whole number of 1 or more"


@pytest.mark.parametrize("value", [0, -1, 1.5, "12", None, True, [3], {}])
@pytest.mark.parametrize(
    "config, field",
    [
        (PUBLISHED, "vision_config.hidden_size"),
        (PUBLISHED, "llm_config.num_hidden_layers"),
        (PUBLISHED, "llm_config.num_experts_per_tok"),
        (HUGGING_FACE, "text_config.vocab_size"),
        (HUGGING_FACE, "vision_config.num_attention_heads"),
    ],
)
def test_a_number_of_another_form_is_named_as_it_is_written(tmp_path, config, field, value):
    line = f"config.json: {field}={value!r} {WRONG}; copy the model folder again"
    assert refusal(tmp_path, changed(config, field, value)).endswith(line)


@pytest.mark.parametrize(
    "config, field, value, message",
    [
        (PUBLISHED, "llm_config.num_hidden_layers", 10**30, "is more than 10,000"),
        (PUBLISHED, "llm_config.vocab_size", 10**12, "is more than 10,000,000"),
        (PUBLISHED, "llm_config.num_experts", ..., "llm_config.num_experts is missing"),
        (PUBLISHED, "llm_config.moe_intermediate_size", ..., "llm_config.moe_intermediate_size is missing"),
        (PUBLISHED, "llm_config.num_experts_per_tok", 9, "num_experts_per_tok=9 is more than 8 experts"),
        (PUBLISHED, "llm_config.mlp_only_layers", ["a"], "is not a list of whole numbers"),
        (PUBLISHED, "llm_config.decoder_sparse_step", 0, f"decoder_sparse_step=0 {WRONG}"),
        (PUBLISHED, "llm_config.num_key_value_heads", ..., "llm_config.num_key_value_heads is missing"),
        (PUBLISHED, "llm_config.num_key_value_heads", 3, "4 heads do not share 3 key heads evenly"),
        (PUBLISHED, "llm_config.tie_word_embeddings", "false", "='false' is not true or false"),
        (PUBLISHED, "llm_config", [1], "llm_config is not an object"),
        (PUBLISHED, "vision_config.num_attention_heads", 5, "hidden_size=64 is not a multiple of"),
        (PUBLISHED, "vision_config.patch_size", 0, f"vision_config.patch_size=0 {WRONG}"),
        (PUBLISHED, "force_image_size", "448", f"json: force_image_size='448' {WRONG}"),
        (PUBLISHED, "force_image_size", 84, "image_size=84 and patch_size=14 give 6 patches per side"),
        (PUBLISHED, "force_image_size", 7, "give 0 patches per side"),
        (PUBLISHED, "downsample_ratio", 0, "downsample_ratio=0 is not a number from 0.001 to 1"),
        (PUBLISHED, "downsample_ratio", float("nan"), "downsample_ratio=nan is not a number"),
        (PUBLISHED, "flash_absolute_threshold", "x", "flash_absolute_threshold='x' is not a number"),
        (HUGGING_FACE, "vico", {"absolute_threshold": "x"}, "vico.absolute_threshold='x' is not a number"),
        (HUGGING_FACE, "vico", [], "vico is not an object"),
        (HUGGING_FACE, "text_config", ..., "text_config is not an object"),
        (HUGGING_FACE, "text_config.head_dim", "16", f"text_config.head_dim='16' {WRONG}"),
        (HUGGING_FACE, "vision_config.image_size", [448, 224], "is not square"),
        (HUGGING_FACE, "vision_config.image_size", [], "is not square"),
        (HUGGING_FACE, "vision_config.image_size", ["448", "448"], f"image_size='448' {WRONG}"),
    ],
)
def test_numbers_that_describe_no_model_are_refused(tmp_path, config, field, value, message):
    assert message in refusal(tmp_path, changed(config, field, value))


def test_all_faults_of_a_config_are_reported_together(tmp_path):
    config = changed(changed(PUBLISHED, "vision_config.hidden_size", "a\nb"), "llm_config.vocab_size", ...)
    path = tmp_path / "config.json"
    assert refusal(tmp_path, config).split("\n") == [
        f"{path}: vision_config.hidden_size='a\\nb' {WRONG}; copy the model folder again",
        f"{path}: llm_config.vocab_size is missing; copy the model folder again",
    ]


def test_what_follows_from_other_numbers_may_be_left_out(tmp_path):
    for field, value in (
        ("llm_config.head_dim", None),
        ("llm_config.num_key_value_heads", None),
        ("vision_config.patch_size", ...),
        ("vision_config.image_size", 448),
        ("llm_config.mlp_only_layers", None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed(PUBLISHED, field, value)))
        assert model_config(tmp_path)["text_config"]["model_type"] == "qwen3_moe"
