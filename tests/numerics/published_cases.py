"""Parity cases of our own: random models in the published Flash layout, and the results of the published
equations.

`write_case` writes a folder as `test_published_parity.py` reads it. The reference shares no code with `vico`:
the vision tower, connectors and router are implemented here once more, in float64, with the published tensor
names. The language model is transformers' own causal model with eager attention, or for InternLM2 that of
`internlm2_model.py`.
"""

# N tiles, L tokens, P vision tokens and class token, v vision width, h language width, H heads

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.numerics.internlm2_model import InternLM2
from tests.numerics.published_weights import Tensors, random_weights

VOCABULARY, IMAGE, START, END = 160, 150, 151, 152
_MODEL_TYPES = {
    "InternLM2ForCausalLM": "internlm2",
    "InternLM3ForCausalLM": "internlm3",
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


@dataclass(frozen=True)
class Case:
    """A random model and the tiles of each picture; `vision` and `text` change fields of the configs."""

    seed: int = 0
    tiles: tuple[int, ...] = (2, 1)
    vision: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = "Qwen3ForCausalLM"
    tied: bool = False
    relative: float = 0.0


def write_case(folder: Path, case: Case) -> Path:
    """Write the files of a case; return their folder."""
    folder.mkdir(parents=True)
    torch.manual_seed(case.seed)
    config = _config(case)
    language = _language_model(config["llm_config"])
    weights = random_weights(config) | {
        f"language_model.{name}": tensor.float()
        for name, tensor in _unfused(language.state_dict()).items()
        if not (case.tied and name == "lm_head.weight")
    }
    pixels = torch.randn(sum(case.tiles), 3, *[config["force_image_size"]] * 2).half()
    expected = {"pixel_values": pixels, **_vision_side(weights, config, pixels.double())}
    # a threshold that is not near any probability and gives decisions of both kinds
    absolute = expected["prob"][:, 0].median().item() - 1e-3
    config["flash_absolute_threshold"] = absolute
    expected["compress"] = _published_rule(expected["prob"][:, 0], case.relative, absolute)
    expected |= _language_side(language, config, expected, case.tiles)
    inputs = {
        "image_token_id": IMAGE,
        "img_start_id": START,
        "img_end_id": END,
        "tiles_per_image": list(case.tiles),
    }
    inputs |= {"flash_relative_threshold": case.relative, "flash_absolute_threshold": absolute}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "case.json").write_text(json.dumps(inputs))
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / "model.safetensors"
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors"
    )
    return folder


def _config(case: Case) -> dict[str, Any]:
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower |= {"image_size": 112, "patch_size": 14, "norm_type": "layer_norm", "layer_norm_eps": 1e-6}
    tower |= {"qkv_bias": True, "qk_normalization": False, **case.vision}
    language = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    language |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    language |= {
        "rope_theta": 10000.0,
        "tie_word_embeddings": case.tied,
        "architectures": [case.architecture],
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "flash_mode": True,
        "flash_relative_threshold": case.relative,
        "force_image_size": tower["image_size"],
        "select_layer": -1,
        "ps_version": "v2",
        "tie_word_embeddings": case.tied,
        "vision_config": tower,
        "llm_config": {**language, "model_type": _MODEL_TYPES[case.architecture], **case.text},
    }


def _language_model(config: dict[str, Any]) -> torch.nn.Module:
    if config["model_type"] == "internlm2":
        return InternLM2(config)
    fields = {key: value for key, value in config.items() if key != "architectures"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.float().eval()


def _unfused(tensors: Tensors) -> Tensors:
    """Return each expert under its own name, as published: transformers 5 has one tensor for a layer's
    experts."""
    unfused: Tensors = {}
    for name, tensor in tensors.items():
        head, _, last = name.rpartition(".")
        if not head.endswith(".experts"):
            unfused[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            parts = {"down_proj": expert} if last == "down_proj" else None
            half = expert.shape[0] // 2
            parts = parts or {"gate_proj": expert[:half], "up_proj": expert[half:]}
            unfused |= {f"{head}.{number}.{part}.weight": piece for part, piece in parts.items()}
    return unfused


def _linear(w: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _norm(
    w: Tensors, name: str, x: torch.Tensor, kind: str = "layer_norm", eps: float = 1e-5
) -> torch.Tensor:
    if kind == "rms_norm":
        return w[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def _heads_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v in each head; [N, Lq, w] and [N, Lk, w] -> [N, Lq, w]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


def _vision_tower(w: Tensors, tower: dict[str, Any], pixels: torch.Tensor) -> torch.Tensor:
    """[N, 3, S, S] -> [N, P - 1, v]: InternViT without its class token."""
    kind, eps, top = tower["norm_type"], tower["layer_norm_eps"], "vision_model.embeddings."
    patches = F.conv2d(
        pixels, w[f"{top}patch_embedding.weight"], w[f"{top}patch_embedding.bias"], stride=tower["patch_size"]
    )
    tokens = patches.flatten(2).transpose(1, 2)
    first = w[f"{top}class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, tokens], 1) + w[f"{top}position_embedding"]
    for number in range(tower["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{number}"
        q, k, v = _linear(w, f"{layer}.attn.qkv", _norm(w, f"{layer}.norm1", x, kind, eps)).chunk(3, -1)
        if tower["qk_normalization"]:  # over all heads together
            q = _norm(w, f"{layer}.attn.q_norm", q, "rms_norm", eps)
            k = _norm(w, f"{layer}.attn.k_norm", k, "rms_norm", eps)
        attended = _linear(w, f"{layer}.attn.proj", _heads_attend(q, k, v, tower["num_attention_heads"]))
        x = x + attended * w[f"{layer}.ls1"]
        inner = F.gelu(_linear(w, f"{layer}.mlp.fc1", _norm(w, f"{layer}.norm2", x, kind, eps)))
        x = x + _linear(w, f"{layer}.mlp.fc2", inner) * w[f"{layer}.ls2"]
    return x[:, 1:]


def _shuffled(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Return the published pixel shuffle v2: token (row, column) gathers factor x factor neighbours, row by
    row."""
    side = int(x.shape[1] ** 0.5)
    grid = x.reshape(len(x), side // factor, factor, side // factor, factor, x.shape[-1])
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(len(x), (side // factor) ** 2, -1)


def _connected(w: Tensors, name: str, x: torch.Tensor, numbers: tuple[str, ...]) -> torch.Tensor:
    x = _linear(w, f"{name}.{numbers[0]}", _norm(w, f"{name}.0", x))
    for number in numbers[1:]:
        x = _linear(w, f"{name}.{number}", F.gelu(x))
    return x


def _router_logits(w: Tensors, features: torch.Tensor) -> torch.Tensor:
    pooled = w["pooling_before_gating.query_token"].expand(len(features), 1, -1)
    for number in (1, 2, 2, 2):
        name = f"pooling_before_gating.attn{number}"
        inside, bias = w[f"{name}.in_proj_weight"].chunk(3), w[f"{name}.in_proj_bias"].chunk(3)
        q, k, v = (F.linear(x, inside[n], bias[n]) for n, x in enumerate((pooled, features, features)))
        attended = _linear(w, f"{name}.out_proj", _heads_attend(q, k, v, 16))
        pooled = _norm(w, f"pooling_before_gating.norm{number}", attended)
    x = pooled[:, 0]
    for number in range(1, 5):
        block = f"gating.block{number}"
        x = x + _norm(w, f"{block}.5", _linear(w, f"{block}.3", F.gelu(_linear(w, f"{block}.0", x))))
    return _linear(w, "gating.gate.1", _norm(w, "gating.gate.0", x))


@torch.no_grad()
def _vision_side(weights: Tensors, config: dict[str, Any], pixels: torch.Tensor) -> Tensors:
    w = {name: tensor.double() for name, tensor in weights.items() if not name.startswith("language_model.")}
    features = _vision_tower(w, config["vision_config"], pixels)
    results = {
        "vit_mean": features.mean(1),
        "v256": _connected(w, "mlp1", _shuffled(features, 2), ("1", "3")),
        "v64": _connected(w, "mlp2", _shuffled(features, 4), ("1", "4", "7")),
        "prob": _router_logits(w, features).softmax(-1),
    }
    return {name: tensor.float() for name, tensor in results.items()}


def _published_rule(p0: torch.Tensor, relative: float, absolute: float) -> torch.Tensor:
    return (p0 > torch.quantile(p0, relative)) & (p0 >= absolute)


@torch.no_grad()
def _language_side(
    language: torch.nn.Module, config: dict[str, Any], expected: Tensors, tiles: tuple[int, ...]
) -> Tensors:
    full, compressed, compress = expected["v256"], expected["v64"], expected["compress"]
    ids: list[int] = torch.randint(0, 140, (40,)).tolist()
    for count in tiles:
        ids += [START, *[IMAGE] * (count * full.shape[1]), END, *torch.randint(0, 140, (30,)).tolist()]
    kept, seen = [], 0
    for token in ids:
        if token == IMAGE:
            tile, position = divmod(seen, full.shape[1])
            seen += 1
            if compress[tile] and position >= compressed.shape[1]:
                continue
        kept.append(token)
    routed = [compressed[n] if flag else full[n] for n, flag in enumerate(compress.tolist())]

    def logits(tokens: list[int], visual: torch.Tensor, new: list[int]) -> torch.Tensor:
        embeds = language.get_input_embeddings()(torch.tensor([tokens + new]))
        where = torch.tensor([token == IMAGE for token in tokens] + [False] * len(new))
        embeds[0, where] = visual.to(embeds.dtype)
        return language(inputs_embeds=embeds, use_cache=False).logits[0]

    greedy: list[int] = []
    for _ in range(8):
        greedy.append(int(logits(kept, torch.cat(routed), greedy)[-1].argmax()))
    return {
        "input_ids": torch.tensor([ids]),
        "compressed_ids": torch.tensor(kept),
        "logits_tail": logits(kept, torch.cat(routed), [])[-64:],
        "logits_full_tail": logits(ids, full.flatten(0, 1), [])[-64:],
        "greedy": torch.tensor(greedy),
    }
