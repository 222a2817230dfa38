"""Names and shapes of the published InternVL3.5 sizes, on the meta device: no weight is allocated."""

from math import prod

import pytest

from vico.checkpoints.expected_tensors import HEAD, OWN_PARTS, check_shapes, expected_shapes
from vico.checkpoints.layouts import parts_by_published_name, tensors_in_our_layout
from vico.errors import UserError
from vico.published_config import hf_config, published_config

VISION = {  # InternViT-300M-448px-V2_5
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "norm_type": "layer_norm",
    "qkv_bias": True,
    "qk_normalization": False,
}
QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960}
# Language models Qwen3-0.6B, Qwen3-8B, Qwen3-30B-A3B. First the parameters in 10^9, without Flash's
# additions; 1.1 and 0.9 are the same model with an untied and a tied head.
SIZES = {
    "1B": (1.1, "Qwen3ForCausalLM", (1024, 3072, 28, 16), {}),
    "1B tied": (0.9, "Qwen3ForCausalLM", (1024, 3072, 28, 16), {"tie_word_embeddings": True}),
    "8B": (8.5, "Qwen3ForCausalLM", (4096, 12288, 36, 32), {}),
    "30B-A3B": (
        30.8,
        "Qwen3MoeForCausalLM",
        (2048, 6144, 48, 32),
        {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
    ),
}


@pytest.fixture(scope="module", params=SIZES)
def size(request):
    """Return (parameters in 10^9, published config) of a size."""
    billions, architecture, (width, mlp_width, layers, heads), more = SIZES[request.param]
    text = {
        "architectures": [architecture],
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rope_theta": 1000000,
        **QWEN3,
        **more,
    }
    return billions, {
        "vision_config": VISION,
        "llm_config": text,
        "force_image_size": 448,
        "flash_mode": True,
    }


def published_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return names and shapes as the published code and Qwen3's define them, written by hand."""
    vision, text = config["vision_config"], config["llm_config"]
    v, h = vision["hidden_size"], text["hidden_size"]
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, v),
        "vision_model.embeddings.position_embedding": (1, 1025, v),
        "vision_model.embeddings.patch_embedding.weight": (v, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (v,),
        "language_model.model.embed_tokens.weight": (text["vocab_size"], h),
        "language_model.model.norm.weight": (h,),
    }
    if not text.get("tie_word_embeddings"):
        shapes["language_model.lm_head.weight"] = (text["vocab_size"], h)
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"vision_model.encoder.layers.{layer}."
        shapes |= {f"{prefix}ls1": (v,), f"{prefix}ls2": (v,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"{prefix}{name}.weight": (v,), f"{prefix}{name}.bias": (v,)}
        shapes |= linear(f"{prefix}attn.qkv", v, 3 * v) | linear(f"{prefix}attn.proj", v, v)
        shapes |= linear(f"{prefix}mlp.fc1", v, 4 * v) | linear(f"{prefix}mlp.fc2", 4 * v, v)
    for layer in range(text["num_hidden_layers"]):
        shapes |= language_layer(f"language_model.model.layers.{layer}.", text)
    return shapes | flash_shapes(v, h)


def language_layer(prefix: str, text: dict) -> dict[str, tuple[int, ...]]:
    h, head = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    shapes = {
        f"{prefix}input_layernorm.weight": (h,),
        f"{prefix}post_attention_layernorm.weight": (h,),
        f"{prefix}self_attn.q_proj.weight": (queries, h),
        f"{prefix}self_attn.k_proj.weight": (keys, h),
        f"{prefix}self_attn.v_proj.weight": (keys, h),
        f"{prefix}self_attn.o_proj.weight": (h, queries),
        f"{prefix}self_attn.q_norm.weight": (head,),
        f"{prefix}self_attn.k_norm.weight": (head,),
    }
    experts = text.get("num_experts", 0)
    mlps = [f"mlp.experts.{number}." for number in range(experts)] or ["mlp."]
    width = text["moe_intermediate_size"] if experts else text["intermediate_size"]
    if experts:
        shapes[f"{prefix}mlp.gate.weight"] = (experts, h)
    for mlp in mlps:
        shapes |= {f"{prefix}{mlp}{name}_proj.weight": (width, h) for name in ("gate", "up")}
        shapes[f"{prefix}{mlp}down_proj.weight"] = (h, width)
    return shapes


def flash_shapes(v: int, h: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of both connectors and the router (published Flash layout)."""
    shapes = norm("mlp1.0", 4 * v) | linear("mlp1.1", 4 * v, h) | linear("mlp1.3", h, h)
    shapes |= norm("mlp2.0", 16 * v) | linear("mlp2.1", 16 * v, 2 * h)
    shapes |= linear("mlp2.4", 2 * h, 2 * h) | linear("mlp2.7", 2 * h, h)
    shapes["pooling_before_gating.query_token"] = (1, v)
    for number in range(1, 5):
        attention = f"pooling_before_gating.attn{number}"
        shapes |= {f"{attention}.in_proj_weight": (3 * v, v), f"{attention}.in_proj_bias": (3 * v,)}
        shapes |= linear(f"{attention}.out_proj", v, v) | norm(f"pooling_before_gating.norm{number}", v)
        block = f"gating.block{number}"
        shapes |= linear(f"{block}.0", v, 4 * v) | linear(f"{block}.3", 4 * v, v) | norm(f"{block}.5", v)
    return shapes | norm("gating.gate.0", v) | linear("gating.gate.1", v, 2)


def linear(name: str, width_in: int, width_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


class Shape(tuple):
    """A shape that splits like a tensor."""

    def chunk(self, number: int) -> tuple["Shape", ...]:
        return (Shape((self[0] // number, *self[1:])),) * number


def test_published_checkpoints_are_accepted(size):
    _, config = size
    published = {name: Shape(shape) for name, shape in published_shapes(config).items()}
    ours = {name: tuple(shape) for name, shape in tensors_in_our_layout(published).items()}
    check_shapes(ours, hf_config(config, 151671, "config.json"), "folder")
    short = dict(list(ours.items())[:-6])
    with pytest.raises(UserError, match=r"6 missing tensors in the weights: ([^,]*, ){4}[^,]*\. The"):
        check_shapes(short, hf_config(config, 151671, "config.json"), "folder")


def test_written_tensors_equal_the_published_ones(size):
    billions, config = size
    hf = hf_config(config, 151671, "config.json")
    shapes = expected_shapes(hf, OWN_PARTS)
    if hf["tie_word_embeddings"]:
        del shapes[HEAD]
    written = {}
    for name, parts in parts_by_published_name(shapes).items():
        rows = sum(shapes[part][0] for part in parts)
        written[name] = (rows, *shapes[parts[0]][1:])
    assert written == published_shapes(config)
    of_base = [prod(shape) for name, shape in shapes.items() if not name.startswith(OWN_PARTS)]
    assert sum(of_base) / 1e9 == pytest.approx(billions, abs=0.06)


def test_the_published_config_survives_a_round_trip(size):
    """Through the config of transformers, in which rope and experts have other names."""
    from transformers import InternVLConfig

    _, config = size
    first = hf_config(config, 151671, "config.json")
    through = InternVLConfig(**first).to_dict()
    back = published_config(through, {}, "bfloat16")
    for block in ("vision_config", "llm_config"):
        assert {name: back[block].get(name) for name in config[block]} == config[block]
    again = hf_config(back, 151671, "config.json")
    assert InternVLConfig(**again).to_dict()["text_config"] == through["text_config"]
    assert again["vision_config"] == first["vision_config"]
