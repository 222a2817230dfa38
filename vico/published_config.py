"""Convert config.json between the published layout (InternVLChatModel) and Hugging Face's InternVL.

Pure functions over plain dictionaries. No code of a checkpoint is ever run.
"""

from collections.abc import Mapping
from typing import Any

from vico.errors import UserError
from vico.memory.config_numbers import PUBLISHED, check_numbers, check_parts

# architecture in `llm_config` -> model_type of transformers
LANGUAGE_MODELS = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
INTERNLM2 = "InternLM2ForCausalLM"
# Llama with other names in the config, and for InternLM2 other tensors (`vico/checkpoints/internlm2.py`).
LLAMA_LIKE = (INTERNLM2, "InternLM3ForCausalLM")
SUPPORTED = (*LANGUAGE_MODELS, *LLAMA_LIKE)
# fields for the code of InternLM's checkpoints, which never runs here
_INTERNLM_ONLY = ("attn_implementation", "auto_map", "rope_pos_id_version", "rope_pos_id_stride")
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
# defaults of transformers that differ from those of the published code
_HF_DEFAULTS = {"norm_type": "layer_norm", "use_qk_norm": False}
_HF_ONLY = (  # (field of the vision config, the only value that the published code supports)
    ("use_mask_token", False),
    ("use_mean_pooling", True),
    ("use_absolute_position_embeddings", True),
)
HF_QK_NORM_EPSILON = 1e-6
TEMPLATE_NAME = "internvl2_5"
"""The prompt template that `vico/prompt.py` writes, by its name in InternVL's code."""
_TILING_FIELDS = ("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail")


def is_published(config: Mapping[str, Any]) -> bool:
    """Return whether this config.json has the published layout, custom or Flash."""
    return "llm_config" in config and "vision_config" in config


def hf_config(config: Mapping[str, Any], image_token_id: int | None, path: str) -> dict[str, Any]:
    """Return the Hugging Face form of a published config; raise UserError if the model is not supported.

    `image_token_id` comes from the tokenizer, as the published config does not contain it.
    """
    check_parts(config, PUBLISHED, path)
    architecture = _supported_architecture(config, path)
    check_numbers(config, PUBLISHED, LANGUAGE_MODELS.get(architecture, "llama"), path)
    vision, text = config["vision_config"], dict(config["llm_config"])
    if architecture in LLAMA_LIKE:
        text = _llama_config(text, architecture, path)
    else:
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
            **_qk_norm_epsilon(vision),
        },
        "text_config": {**text, "tie_word_embeddings": tied},
        "downsample_ratio": ratio,
        "image_seq_length": round((size // patch) ** 2 * ratio**2),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        **({"dtype": config["torch_dtype"]} if config.get("torch_dtype") else {}),
        **({"vico": _flash_parts(config)} if config.get("flash_mode") else {}),
        **{key: config[key] for key in _TILING_FIELDS if key in config},
        **({} if image_token_id is None else {"image_token_id": image_token_id}),
    }


def _supported_architecture(config: Mapping[str, Any], path: str) -> str:
    """Return the architecture of the language model; raise UserError if the config is not supported."""
    architecture = language_architecture(config)
    if architecture not in SUPPORTED:
        raise UserError(
            f"{path}: llm_config.architectures={architecture!r} is not supported; give a model with one of "
            f"{', '.join(SUPPORTED)}"
        )
    for field, supported in (("select_layer", -1), ("ps_version", "v2")):
        if config.get(field, supported) != supported:
            raise UserError(f"{path}: {field}={config[field]!r} is not supported, only {supported!r} is")
    if config.get("template") not in (None, TEMPLATE_NAME):
        raise UserError(
            f"{path}: template={config['template']!r} is not supported, as prompts are written in "
            f"{TEMPLATE_NAME!r}; set it to {TEMPLATE_NAME!r} to train and serve the model with that prompt"
        )
    return architecture


def language_architecture(config: Mapping[str, Any]) -> str:
    """Return the architecture of a published config's language model, or "none"."""
    names = config["llm_config"].get("architectures") or ["none"]
    return str(names[0] if isinstance(names, list) else names)


def _llama_config(text: Mapping[str, Any], architecture: str, path: str) -> dict[str, Any]:
    """Return InternLM's text config as Llama's, which computes the same.

    InternLM2's `bias` is about attention alone. InternLM3 has a field for q, k and v and one for all other
    layers; Llama has one for attention and one for the MLP.
    """
    llama = {name: value for name, value in text.items() if name not in _INTERNLM_ONLY}
    version = text.get("rope_pos_id_version", "default")
    if version != "default":
        raise UserError(
            f"{path}: llm_config.rope_pos_id_version={version!r} is not supported, only 'default' is"
        )
    llama["rms_norm_eps"] = text["rms_norm_eps"]  # defaults differ
    llama["num_key_value_heads"] = text.get("num_key_value_heads") or text["num_attention_heads"]
    if architecture == INTERNLM2:
        biases = {"attention_bias": llama.pop("bias", True), "mlp_bias": False}
        llama.pop("head_dim", None)  # which InternLM2 does not have
    else:
        bias = llama.pop("bias", False)
        biases = {"attention_bias": llama.pop("qkv_bias", False), "mlp_bias": bias}
        if biases["attention_bias"] != bias:
            raise UserError(
                f"{path}: llm_config.qkv_bias={biases['attention_bias']} with bias={bias} is not supported, "
                "only equal values are"
            )
    return {**llama, **biases, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def _qk_norm_epsilon(vision: Mapping[str, Any]) -> dict[str, float]:
    """Return our field `qk_norm_eps` if the epsilon of the published q/k norm is not that of transformers."""
    epsilon = vision.get("layer_norm_eps", HF_QK_NORM_EPSILON)
    differs = vision.get("qk_normalization", True) and epsilon != HF_QK_NORM_EPSILON
    return {"qk_norm_eps": epsilon} if differs else {}


def _flash_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    thresholds = {
        ours: config[f"flash_{ours}"]
        for ours in ("relative_threshold", "absolute_threshold")
        if config.get(f"flash_{ours}") is not None
    }
    return {"compressed_connector": True, "router": True, **thresholds}


def published_config(
    config: Mapping[str, Any],
    tiling: Mapping[str, Any],
    dtype: str,
    base: Mapping[str, Any] | None = None,
    absolute_threshold: float | None = None,
) -> dict[str, Any]:
    """Return the published form of a Hugging Face config.

    `base` is the published config that the model came from, if any. `tiling` holds min_dynamic_patch,
    max_dynamic_patch and use_thumbnail. With a threshold the config is a Flash one, whose relative
    threshold is 0.0: of all values, it makes a server follow our routing rule most closely.
    """
    published = dict(base) if base is not None else {**_published_config(config), **tiling}
    published = {key: value for key, value in published.items() if not key.startswith("flash_")}
    if absolute_threshold is not None:
        published |= {
            "flash_mode": True,
            "flash_relative_threshold": 0.0,
            "flash_absolute_threshold": absolute_threshold,
        }
    return {**published, "torch_dtype": dtype}


def _published_config(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_config"]
    for field, supported in _HF_ONLY:
        if vision.get(field, supported) != supported:
            raise UserError(
                f"vision_config.{field}={vision[field]} has no place in the published layout; use layout hf"
            )
    tied = bool(config.get("tie_word_embeddings"))
    size, patch = vision["image_size"], vision["patch_size"]
    size = size[0] if isinstance(size, list) else size
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": config.get("downsample_ratio", 0.5),
        "dynamic_image_size": True,
        "force_image_size": size,
        "select_layer": -1,
        "ps_version": "v2",
        "template": TEMPLATE_NAME,
        "tie_word_embeddings": tied,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **{
                theirs: vision.get(ours, _HF_DEFAULTS.get(ours, default))
                for ours, theirs, default in _VISION_FIELDS
            },
            "drop_path_rate": 0.0,
            "image_size": size,
            "patch_size": patch[0] if isinstance(patch, list) else patch,
        },
        "llm_config": {**_llm_config(config["text_config"]), "tie_word_embeddings": tied},
    }


def _llm_config(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return a text config in the form of transformers 4, which the published code and its servers read."""
    llm = dict(text)
    [architecture] = [name for name, kind in LANGUAGE_MODELS.items() if kind == llm["model_type"]]
    rope = llm.pop("rope_parameters", None)
    if rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        llm["rope_theta"] = rope["rope_theta"]
        llm["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if "num_local_experts" in llm:
        llm["num_experts"] = llm.pop("num_local_experts")
    return {**llm, "architectures": [architecture]}
