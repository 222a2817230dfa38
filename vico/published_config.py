"""config.json of the published layout (InternVLChatModel) as the config of Hugging Face's InternVL, and back.

Pure functions over plain dictionaries; no code of a checkpoint is ever run.
"""

from typing import Any

from vico.errors import UserError

# architecture in `llm_config` -> model_type of transformers
LANGUAGE_MODELS = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
_VISION_FIELDS = (  # (Hugging Face, published, default of the published code)
    ("hidden_size", "hidden_size", 1024),
    ("intermediate_size", "intermediate_size", 4096),
    ("num_hidden_layers", "num_hidden_layers", 24),
    ("num_attention_heads", "num_attention_heads", 16),
    ("num_channels", "num_channels", 3),
    ("hidden_act", "hidden_act", "gelu"),
    ("norm_type", "norm_type", "rms_norm"),
    ("layer_norm_eps", "layer_norm_eps", 1e-6),
    ("attention_bias", "qkv_bias", False),
    ("use_qk_norm", "qk_normalization", True),
    ("attention_dropout", "attention_dropout", 0.0),
    ("projection_dropout", "dropout", 0.0),
    ("initializer_range", "initializer_range", 0.02),
    ("layer_scale_init_value", "initializer_factor", 0.1),
)


_TILING_FIELDS = ("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail")


def is_published(config: dict[str, Any]) -> bool:
    """Whether this config.json is of the published layout, custom or Flash."""
    return "llm_config" in config and "vision_config" in config


def hf_config(config: dict[str, Any], image_token_id: int | None, path: str) -> dict[str, Any]:
    """The Hugging Face config of a published one; UserError for what this project cannot open.

    `image_token_id` comes from the tokenizer, since the published config does not say it.
    """
    vision, text = config["vision_config"], dict(config["llm_config"])
    architecture = (text.get("architectures") or ["none"])[0]
    if architecture not in LANGUAGE_MODELS:
        raise UserError(
            f"{path}: llm_config.architectures={architecture!r} is none of {', '.join(LANGUAGE_MODELS)}; "
            "this language model is not supported"
        )
    for field, wanted in (("select_layer", -1), ("ps_version", "v2")):
        if config.get(field, wanted) != wanted:
            raise UserError(f"{path}: {field}={config[field]!r} is not supported, only {wanted!r} is")
    text["model_type"] = LANGUAGE_MODELS[architecture]
    tied = bool(text.get("tie_word_embeddings", False))
    size = config.get("force_image_size") or vision["image_size"]
    patch = vision.get("patch_size", 14)
    ratio = config.get("downsample_ratio", 0.5)
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": {
            "model_type": "internvl_vision",
            **{ours: vision.get(theirs, default) for ours, theirs, default in _VISION_FIELDS},
            "image_size": [size, size],
            "patch_size": [patch, patch],
        },
        "text_config": {**text, "tie_word_embeddings": tied},
        "downsample_ratio": ratio,
        "image_seq_length": round((size // patch) ** 2 * ratio**2),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        **{key: config[key] for key in _TILING_FIELDS if key in config},
        **({} if image_token_id is None else {"image_token_id": image_token_id}),
    }
