"""Random weights of the vision side of a model in the published Flash layout."""

# v vision width, h language width

from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


def random_weights(config: dict[str, Any]) -> Tensors:
    """Return a random vision tower, connectors and router, with the published names."""
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
    # around 1 for scales, otherwise small, so that every tensor affects the outputs
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
