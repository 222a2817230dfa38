"""Numbers of parameters by config.json are those of the model itself, for every kind that is supported."""

from math import prod

import pytest

from tests.unit.vico.test_published_sizes import SIZES, size  # noqa: F401
from vico.checkpoints.expected_tensors import HEAD, OWN_PARTS, expected_shapes
from vico.memory.model_sizes import model_sizes
from vico.model_files import model_config
from vico.published_config import hf_config

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def counted(config, prefixes, *, own=False):
    shapes = expected_shapes(config, OWN_PARTS)
    if config["tie_word_embeddings"]:
        shapes.pop(HEAD, None)
    return sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))


def assert_equal_parts(config):
    sizes = model_sizes(config)
    language = counted(config, ("model.language_model.layers", "model.language_model.norm"))
    embedding = counted(config, ("model.language_model.embed_tokens", "lm_head"))
    assert sizes.vision == counted(config, ("model.vision_tower",))
    assert sizes.connector == counted(config, ("model.multi_modal_projector",))
    assert sizes.compressed_connector == counted(config, ("compressed_connector",))
    assert (sizes.language, sizes.embedding) == (language, embedding)


def test_published_sizes(size):  # noqa: F811
    assert_equal_parts(hf_config(size[1], 151671, "config.json"))


@pytest.mark.parametrize(
    "architecture, more",
    [
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {}),
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("InternLM2ForCausalLM", {"bias": True, "rms_norm_eps": 1e-5}),
        ("Qwen3MoeForCausalLM", {**EXPERTS, "num_hidden_layers": 5, "decoder_sparse_step": 2}),
        ("Qwen3MoeForCausalLM", {**EXPERTS, "num_hidden_layers": 5, "mlp_only_layers": [0, 3, 9]}),
        ("Qwen3ForCausalLM", EXPERTS),
        ("LlamaForCausalLM", {"num_key_value_heads": None}),
    ],
)
@pytest.mark.parametrize("norm, bias, qk_norm", [("rms_norm", False, True), ("layer_norm", True, False)])
def test_other_towers_and_language_models(architecture, more, norm, bias, qk_norm):
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 448,
        "patch_size": 14,
        "norm_type": norm,
        "qkv_bias": bias,
        "qk_normalization": qk_norm,
    }
    text = {
        "architectures": [architecture],
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 500,
        **more,
    }
    published = {"vision_config": vision, "llm_config": text, "force_image_size": 448, "flash_mode": True}
    assert_equal_parts(hf_config(published, 400, "config.json"))


def test_the_demo_model():
    from pathlib import Path

    assert_equal_parts(model_config(Path(__file__).parents[4] / "models" / "small-internvl"))
