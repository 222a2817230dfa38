"""Names of tensors in the layouts of published checkpoints, and their translation to our names and back.

Our layout is Hugging Face's, with `compressed_connector.*` and `router.*` beside it. `published` is the
layout of InternVLChatModel (custom and Flash); `older_hf` lacks the leading `model.`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol, Self, TypeVar

Layout = Literal["hf", "older_hf", "published"]


class Splittable(Protocol):
    """A tensor that can be split: a torch tensor, or one that is still in a file."""

    def chunk(self, number: int, /) -> tuple[Self, ...]: ...


T = TypeVar("T", bound=Splittable)
_TOWER, _PUBLISHED_TOWER = "model.vision_tower.", "vision_model."
# (ours, published) below the tower; `#` is the number of a layer
_VISION = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding"),
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    ("encoder.layer.#.layernorm_before.", "encoder.layers.#.norm1."),
    ("encoder.layer.#.layernorm_after.", "encoder.layers.#.norm2."),
    ("encoder.layer.#.lambda_1", "encoder.layers.#.ls1"),
    ("encoder.layer.#.lambda_2", "encoder.layers.#.ls2"),
    ("encoder.layer.#.attention.projection_layer.", "encoder.layers.#.attn.proj."),
    ("encoder.layer.#.attention.q_norm.", "encoder.layers.#.attn.q_norm."),
    ("encoder.layer.#.attention.k_norm.", "encoder.layers.#.attn.k_norm."),
    ("encoder.layer.#.attention.qkv.", "encoder.layers.#.attn.qkv."),  # not our name: split in three below
    ("encoder.layer.#.mlp.", "encoder.layers.#.mlp."),
)
_REST = (
    ("model.multi_modal_projector.layer_norm.", "mlp1.0."),
    ("model.multi_modal_projector.linear_1.", "mlp1.1."),
    ("model.multi_modal_projector.linear_2.", "mlp1.3."),
    ("compressed_connector.", "mlp2."),
    ("router.pooling_before_gating.", "pooling_before_gating."),
    ("router.gating.", "gating."),
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
)
_OLDER_HF = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
)
_PAIRS = {
    "published": tuple((_TOWER + ours, _PUBLISHED_TOWER + theirs) for ours, theirs in _VISION) + _REST,
    "older_hf": _OLDER_HF,
}
_QKV = ("q", "k", "v")
_FUSED = re.compile(r"(.*\.attention\.)qkv\.(weight|bias)$")
_SPLIT = re.compile(r"(model\.vision_tower\..*\.attention\.)([qkv])_proj\.(weight|bias)$")


def layout_of(names: Iterable[str]) -> Layout:
    """Return the layout of a checkpoint with these tensor names."""
    names = list(names)
    if any(name.startswith((_PUBLISHED_TOWER, "mlp1.")) for name in names):
        return "published"
    if any(name.startswith("vision_tower.") for name in names):
        return "older_hf"
    return "hf"


def renamed(name: str, pairs: Iterable[tuple[str, str]], *, to_ours: bool) -> str:
    """Return a name with its beginning replaced by the first of the (ours, theirs) pairs that fits."""
    for ours, theirs in pairs:
        source, target = (theirs, ours) if to_ours else (ours, theirs)
        pattern = re.escape(source).replace(r"\#", r"(\d+)")
        start = re.match(pattern, name)
        if start:
            layer = start.group(1) if start.groups() else ""
            return target.replace("#", layer) + name[start.end() :]
    return name


def tensors_in_our_layout(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors by our names; a published vision tower's fused qkv is split into three views."""
    layout = layout_of(tensors)
    if layout == "hf":
        return dict(tensors)
    in_ours: dict[str, T] = {}
    for name, tensor in tensors.items():
        ours = renamed(name, _PAIRS[layout], to_ours=True)
        fused = _FUSED.match(ours)
        if fused:
            for part, piece in zip(_QKV, tensor.chunk(3), strict=True):
                in_ours[f"{fused[1]}{part}_proj.{fused[2]}"] = piece
        else:
            in_ours[ours] = tensor
    return in_ours


def parts_by_published_name(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map each tensor name of the published layout, in order, to the names of ours that it joins."""
    parts_by_name: dict[str, tuple[str, ...]] = {}
    for name in names:
        split = _SPLIT.match(name)
        if not split:
            parts_by_name[renamed(name, _PAIRS["published"], to_ours=False)] = (name,)
        elif split[2] == "q":
            parts = tuple(f"{split[1]}{part}_proj.{split[3]}" for part in _QKV)
            fused = renamed(f"{split[1]}qkv.{split[3]}", _PAIRS["published"], to_ours=False)
            parts_by_name[fused] = parts
    return parts_by_name
