"""Numbers of parameters of a model by its config.json, read without torch and without its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vico.memory.config_numbers import num_experts, tile_side


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of each part, and the widths that activations depend on.

    `language` is without embedding and head; `embedding` counts a tied head once, an untied one twice.
    `connector` and `compressed_connector` are those of the full and the compressed rate.
    """

    vision: int
    connector: int
    compressed_connector: int
    language: int
    embedding: int
    vision_width: int
    vision_mlp: int
    vision_layers: int
    vision_heads: int
    tokens_per_tile: int
    """In the vision tower, with the class token."""
    width: int
    mlp: int
    layers: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    full_tokens: int
    """Tokens per tile at the full rate."""
    experts: int = 0
    """Experts of a layer; 0: no mixture of experts. `mlp` is then the width of those that a token uses."""
    experts_per_token: int = 0

    @property
    def base(self) -> int:
        """The parameters of the start model, which the reference keeps."""
        return self.vision + self.connector + self.language + self.embedding

    @property
    def policy(self) -> int:
        return self.base + self.compressed_connector


def model_sizes(config: Mapping[str, Any]) -> ModelSizes:
    """Return the sizes of a config in Hugging Face form (`vico.model_files.model_config`)."""
    vision, text = config["vision_config"], config["text_config"]
    v, h = vision["hidden_size"], text["hidden_size"]
    size, patch = (tile_side(vision[name]) for name in ("image_size", "patch_size"))
    patches = (size // patch) ** 2
    shuffle = round(1 / config.get("downsample_ratio", 0.5))
    heads = text["num_attention_heads"]
    # transformers' default for Qwen3; the others divide the width
    head = text.get("head_dim") or (128 if text.get("model_type") == "qwen3" else h // heads)
    keys = (text.get("num_key_value_heads") or heads) * head
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    experts = num_experts(text, str(text.get("model_type")))
    mlp = text["intermediate_size"]
    return ModelSizes(
        vision=_vision_parameters(vision, patches, patch),
        connector=_linear(shuffle**2 * v, h) + _linear(h, h) + 2 * shuffle**2 * v,
        compressed_connector=2 * shuffle**4 * v
        + _linear(shuffle**4 * v, 2 * h)
        + _linear(2 * h, 2 * h)
        + _linear(2 * h, h),
        language=_language_parameters(text, heads * head, keys, head, experts),
        embedding=text["vocab_size"] * h * (1 if tied else 2),
        vision_width=v,
        vision_mlp=vision["intermediate_size"],
        vision_layers=vision["num_hidden_layers"],
        vision_heads=vision["num_attention_heads"],
        tokens_per_tile=patches + 1,
        width=h,
        mlp=text["moe_intermediate_size"] * text["num_experts_per_tok"] if experts else mlp,
        layers=text["num_hidden_layers"],
        queries=heads * head,
        keys=keys,
        heads=heads,
        vocabulary=text["vocab_size"],
        full_tokens=patches // shuffle**2,
        experts=experts,
        experts_per_token=text["num_experts_per_tok"] if experts else 0,
    )


def _vision_parameters(vision: Mapping[str, Any], patches: int, patch: int) -> int:
    v, mlp, layers = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    norm = 2 * v if vision.get("norm_type", "layer_norm") == "layer_norm" else v
    qkv = 3 * (v * v + (v if vision.get("attention_bias") else 0))
    qk_norm = 2 * v if vision.get("use_qk_norm") else 0
    layer = qkv + _linear(v, v) + qk_norm + _linear(v, mlp) + _linear(mlp, v) + 2 * norm + 2 * v
    embedding = vision.get("num_channels", 3) * patch * patch * v + v + v + (patches + 1) * v
    return embedding + layers * layer


def _language_parameters(text: Mapping[str, Any], queries: int, keys: int, head: int, experts: int) -> int:
    h, layers = text["hidden_size"], text["num_hidden_layers"]
    kind, mlp = text.get("model_type"), text["intermediate_size"]
    attention = h * queries + 2 * h * keys + queries * h
    dense = 3 * h * mlp
    if kind == "llama":
        attention += queries + 2 * keys + h if text.get("attention_bias") else 0
        dense += 2 * mlp + h if text.get("mlp_bias") else 0
    else:
        attention += queries + 2 * keys if kind == "qwen2" else 2 * head  # biases of q, k, v; or q/k norms
    sparse = 3 * h * text["moe_intermediate_size"] * experts + h * experts if experts else dense
    num_dense = _dense_layers(text) if experts else layers
    return layers * (attention + 2 * h) + num_dense * dense + (layers - num_dense) * sparse + h


def _dense_layers(text: Mapping[str, Any]) -> int:
    """Return how many layers of a mixture of experts have one MLP for all tokens, by Qwen3-MoE's rule."""
    dense, step = text.get("mlp_only_layers") or (), text.get("decoder_sparse_step") or 1
    return sum(layer in dense or (layer + 1) % step != 0 for layer in range(text["num_hidden_layers"]))


def _linear(width_in: int, width_out: int) -> int:
    return width_in * width_out + width_out
