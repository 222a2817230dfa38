"""Parity cases of our own: random models in the published Flash layout, and what published equations give.

`write_case` writes a folder as `test_published_parity.py` reads it. The reference shares no code with `vico`:
the vision tower, connectors and router stand here once more, in float64, over the published tensor names; the
language model is transformers' own causal model with eager attention.
"""

# N tiles, L tokens, P vision tokens and class token, v vision width, h language width, H heads

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY, IMAGE, START, END = 160, 150, 151, 152
_MODEL_TYPES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe"}
Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


def write_case(
    folder: Path,
    *,
    seed: int = 0,
    tiles: tuple[int, ...] = (2, 1),
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    architecture: str = "Qwen3ForCausalLM",
    tied: bool = False,
    relative: float = 0.0,
) -> Path:
    """Writes a case with tiles of pictures as given; `vision` and `text` change fields of the two configs."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    config = _config(vision or {}, text or {}, architecture, tied, relative)
    language = _language_model(config["llm_config"])
    weights = _other_weights(config) | {
        f"language_model.{name}": tensor
        for name, tensor in _unfused(language.state_dict()).items()
        if not (tied and name == "lm_head.weight")
    }
    pixels = torch.randn(sum(tiles), 3, *[config["force_image_size"]] * 2).half()
    expected = {"pixel_values": pixels, **_vision_side(weights, config, pixels.double())}
    absolute = (
        expected["prob"][:, 0].median().item() - 1e-3
    )  # decisions of both kinds, far from the threshold
    config["flash_absolute_threshold"] = absolute
    expected["compress"] = _published_rule(expected["prob"][:, 0], relative, absolute)
    expected |= _language_side(language, config, expected, tiles)
    facts = {
        "image_token_id": IMAGE,
        "img_start_id": START,
        "img_end_id": END,
        "tiles_per_image": list(tiles),
    }
    facts |= {"flash_relative_threshold": relative, "flash_absolute_threshold": absolute}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "case.json").write_text(json.dumps(facts))
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in weights.items()}, folder / "model.safetensors"
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors"
    )
    return folder


def _config(vision: dict, text: dict, architecture: str, tied: bool, relative: float) -> dict[str, Any]:
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower |= {"image_size": 112, "patch_size": 14, "norm_type": "layer_norm", "layer_norm_eps": 1e-6}
    tower |= {"qkv_bias": True, "qk_normalization": False, **vision}
    language = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    language |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    language |= {"rope_theta": 10000.0, "tie_word_embeddings": tied, "architectures": [architecture]}
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "flash_mode": True,
        "flash_relative_threshold": relative,
        "force_image_size": tower["image_size"],
        "select_layer": -1,
        "ps_version": "v2",
        "tie_word_embeddings": tied,
        "vision_config": tower,
        "llm_config": {**language, "model_type": _MODEL_TYPES[architecture], **text},
    }


def _language_model(config: dict[str, Any]) -> torch.nn.Module:
    fields = {key: value for key, value in config.items() if key != "architectures"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.float().eval()


def _unfused(tensors: Tensors) -> Tensors:
    """Each expert under its own name, as published: transformers 5 holds a layer's experts as one tensor."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        head, _, last = name.rpartition(".")
        if not head.endswith(".experts"):
            found[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            parts = {"down_proj": expert} if last == "down_proj" else None
            half = expert.shape[0] // 2
            parts = parts or {"gate_proj": expert[:half], "up_proj": expert[half:]}
            found |= {f"{head}.{number}.{part}.weight": piece for part, piece in parts.items()}
    return found


def _other_weights(config: dict[str, Any]) -> Tensors:
    """Random vision tower, connectors and router, under the published names."""
    tower, h = config["vision_config"], config["llm_config"]["hidden_size"]
    v = tower["hidden_size"]
    shapes = _tower_shapes(tower)
    shapes |= (
        _norm_shapes("mlp1.0", 4 * v) | _linear_shapes("mlp1.1", 4 * v, h) | _linear_shapes("mlp1.3", h, h)
    )
    shapes |= _norm_shapes("mlp2.0", 16 * v) | _linear_shapes("mlp2.1", 16 * v, 2 * h)
    shapes |= _linear_shapes("mlp2.4", 2 * h, 2 * h) | _linear_shapes("mlp2.7", 2 * h, h)
    shapes |= {"pooling_before_gating.query_token": (1, v)}
    for number in range(1, 5):
        attention, block = f"pooling_before_gating.attn{number}", f"gating.block{number}"
        shapes |= {f"{attention}.in_proj_weight": (3 * v, v), f"{attention}.in_proj_bias": (3 * v,)}
        shapes |= _linear_shapes(f"{attention}.out_proj", v, v)
        shapes |= _norm_shapes(f"pooling_before_gating.norm{number}", v) | _norm_shapes(f"{block}.5", v)
        shapes |= _linear_shapes(f"{block}.0", v, 4 * v) | _linear_shapes(f"{block}.3", 4 * v, v)
    shapes |= _norm_shapes("gating.gate.0", v) | _linear_shapes("gating.gate.1", v, 2)
    # around 1 where it scales, else small: every tensor then shows in the outputs
    scales = ("norm", "mlp1.0.w", "mlp2.0.w", ".5.weight", "gate.0.w", "ls1", "ls2")
    return {
        name: torch.randn(shape) * 0.1 + float(any(s in name for s in scales) and not name.endswith("bias"))
        for name, shape in shapes.items()
    }


def _tower_shapes(tower: dict[str, Any]) -> Shapes:
    v, wide, patch = tower["hidden_size"], tower["intermediate_size"], tower["patch_size"]
    shapes: Shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, v),
        "vision_model.embeddings.position_embedding": (1, (tower["image_size"] // patch) ** 2 + 1, v),
        "vision_model.embeddings.patch_embedding.weight": (v, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (v,),
    }
    for number in range(tower["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{number}"
        shapes |= _linear_shapes(f"{layer}.attn.qkv", v, 3 * v, tower["qkv_bias"])
        shapes |= _linear_shapes(f"{layer}.attn.proj", v, v)
        shapes |= _linear_shapes(f"{layer}.mlp.fc1", v, wide) | _linear_shapes(f"{layer}.mlp.fc2", wide, v)
        for name in ("norm1", "norm2"):
            shapes |= _norm_shapes(f"{layer}.{name}", v, tower["norm_type"] == "layer_norm")
        for name in ("q_norm", "k_norm") if tower["qk_normalization"] else ():
            shapes |= _norm_shapes(f"{layer}.attn.{name}", v, bias=False)
        shapes |= {f"{layer}.ls1": (v,), f"{layer}.ls2": (v,)}
    return shapes


def _linear_shapes(name: str, inside: int, outside: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outside, inside), **({f"{name}.bias": (outside,)} if bias else {})}


def _norm_shapes(name: str, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (width,), **({f"{name}.bias": (width,)} if bias else {})}


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
    """Published pixel shuffle v2: token (row, column) gathers factor x factor neighbours, row by row."""
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
    found = {
        "vit_mean": features.mean(1),
        "v256": _connected(w, "mlp1", _shuffled(features, 2), ("1", "3")),
        "v64": _connected(w, "mlp2", _shuffled(features, 4), ("1", "4", "7")),
        "prob": _router_logits(w, features).softmax(-1),
    }
    return {name: tensor.float() for name, tensor in found.items()}


def _published_rule(p0: torch.Tensor, relative: float, absolute: float) -> torch.Tensor:
    return (p0 > torch.quantile(p0, relative)) & (p0 >= absolute)


@torch.no_grad()
def _language_side(
    language: torch.nn.Module, config: dict, expected: Tensors, tiles: tuple[int, ...]
) -> Tensors:
    full, compressed, compress = expected["v256"], expected["v64"], expected["compress"]
    ids: list[int] = torch.randint(0, 140, (40,)).tolist()
    for count in tiles:
        ids += [START, *[IMAGE] * (count * full.shape[1]), END, *torch.randint(0, 140, (30,)).tolist()]
    kept, seen = [], 0
    for token in ids:
        if token == IMAGE:
            tile, place = divmod(seen, full.shape[1])
            seen += 1
            if compress[tile] and place >= compressed.shape[1]:
                continue
        kept.append(token)
    routed = [compressed[n] if flag else full[n] for n, flag in enumerate(compress.tolist())]

    def logits(tokens: list[int], visual: torch.Tensor, new: list[int]) -> torch.Tensor:
        embeds = language.get_input_embeddings()(torch.tensor([tokens + new]))
        where = torch.tensor([token == IMAGE for token in tokens] + [False] * len(new))
        embeds[0, where] = visual
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
