"""The numbers in a config.json that sizes depend on: whole, within limits, and such that they fit each other.

`vico.model_files.model_config` compares them before anything is computed or built from them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeGuard

from vico.errors import UserError, one_line

_MOST_PARTS = 10_000
"""Layers of a tower or language model, and experts of a layer. Published models have at most some hundred."""
_MOST_WIDTH = 10**7
"""Of any other number; the largest of a published model is a vocabulary of 153,678."""
_PARTS = ("num_hidden_layers", "num_experts", "num_local_experts", "num_experts_per_tok")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
)
"""Of a mixture of experts; another model may have 0."""
_NULLABLE = ("num_key_value_heads", "head_dim")
"""Null stands for what follows from the other numbers."""
_REMEDY = "copy the model folder again"


@dataclass(frozen=True)
class Layout:
    """What a config.json calls its language model, and whether it may lack numbers of the vision tower."""

    language: str
    has_vision_defaults: bool


PUBLISHED = Layout("llm_config", has_vision_defaults=True)
HUGGING_FACE = Layout("text_config", has_vision_defaults=False)


def check_numbers(config: Mapping[str, Any], layout: Layout, kind: str, path: str) -> None:
    """Raise UserError, one line per fault, unless the numbers of a written config.json describe a model.

    `kind` is the model_type of its language model in Hugging Face form.
    """
    for faults in (_number_faults, _misfits):
        lines = [f"{path}: {one_line(fault)}; {_REMEDY}" for fault in faults(config, layout, kind)]
        if lines:
            raise UserError("\n".join(lines))


def check_parts(config: Mapping[str, Any], layout: Layout, path: str) -> None:
    """Raise UserError unless the configs of vision tower and language model are objects."""
    for part in ("vision_config", layout.language):
        if not isinstance(config.get(part), dict):
            raise UserError(f"{path}: {part} is not an object; {_REMEDY}")


def tile_side(value: int | list[int]) -> int:
    """Return the side of a tile or patch; a list holds two equal ones."""
    return value[0] if isinstance(value, list | tuple) else value


def num_experts(text: Mapping[str, Any], kind: str) -> int:
    """Return the number of experts of a layer; 0 for a language model without experts."""
    return (text.get("num_experts") or text.get("num_local_experts") or 0) if kind == "qwen3_moe" else 0


def _number_faults(config: Mapping[str, Any], layout: Layout, kind: str) -> Iterator[str]:
    yield from _faults_of_vision(config, layout)
    yield from _faults_of_language(config[layout.language], layout.language, kind)
    own = config if layout is PUBLISHED else config.get("vico", {})
    if not isinstance(own, dict):
        yield "vico is not an object"
        return
    for name in ("absolute_threshold", "relative_threshold"):
        field, shown = (f"flash_{name}",) * 2 if layout is PUBLISHED else (name, f"vico.{name}")
        threshold = own.get(field)
        if threshold is not None and not _is_number(threshold):
            yield f"{shown}={threshold!r} is not a number"


def _faults_of_vision(config: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    vision, may_lack = config["vision_config"], layout.has_vision_defaults
    for name in _SIZES:
        yield from _number_fault(vision, "vision_config", name, may_lack)
    if layout is PUBLISHED and config.get("force_image_size") is not None:
        yield from _number_fault(config, "", "force_image_size")
    else:
        yield from _side_fault(vision, "image_size", False)
    yield from _side_fault(vision, "patch_size", may_lack)
    ratio = config.get("downsample_ratio", 0.5)
    if not _is_number(ratio) or not 1e-3 <= ratio <= 1:
        yield f"downsample_ratio={ratio!r} is not a number from 0.001 to 1"


def _faults_of_language(text: Mapping[str, Any], part: str, kind: str) -> Iterator[str]:
    for name in (*_SIZES, "vocab_size"):
        yield from _number_fault(text, part, name)
    yield from _number_fault(text, part, "max_position_embeddings", may_lack=True)
    for name in (*_EXPERTS, *_NULLABLE):
        if text.get(name) is not None and not (name in _EXPERTS and kind != "qwen3_moe" and text[name] == 0):
            yield from _number_fault(text, part, name)
    if kind.startswith("qwen") and "num_key_value_heads" not in text:
        yield f"{part}.num_key_value_heads is missing"  # transformers would take 32 or 4
    if kind == "qwen3_moe":
        if text.get("num_local_experts") is None:
            yield from _number_fault(text, part, "num_experts")
        yield from _number_fault(text, part, "num_experts_per_tok")
        yield from _number_fault(text, part, "moe_intermediate_size")
    dense = text.get("mlp_only_layers")
    if dense is not None and not (isinstance(dense, list) and all(map(is_whole, dense))):
        yield f"{part}.mlp_only_layers={dense!r} is not a list of whole numbers"
    if not isinstance(text.get("tie_word_embeddings"), bool | None):
        yield f"{part}.tie_word_embeddings={text['tie_word_embeddings']!r} is not true or false"


def _misfits(config: Mapping[str, Any], layout: Layout, kind: str) -> Iterator[str]:
    """Yield what is wrong with numbers beside each other that are right by themselves."""
    vision, text, part = config["vision_config"], config[layout.language], layout.language
    if "hidden_size" in vision and vision["hidden_size"] % vision.get("num_attention_heads", 1):
        yield _uneven("vision_config", vision["hidden_size"], vision["num_attention_heads"])
    heads = text["num_attention_heads"]
    if not text.get("head_dim") and text["hidden_size"] % heads:
        yield _uneven(part, text["hidden_size"], heads)
    key_heads = text.get("num_key_value_heads") or heads
    if heads % key_heads:
        yield f"{part}: {heads} heads do not share {key_heads} key heads evenly (num_key_value_heads)"
    experts = num_experts(text, kind)
    if experts and text["num_experts_per_tok"] > experts:
        yield f"{part}.num_experts_per_tok={text['num_experts_per_tok']} is more than {experts} experts"
    yield from _tile_misfit(config, layout)


def _tile_misfit(config: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    vision = config["vision_config"]
    forced = config.get("force_image_size") if layout is PUBLISHED else None
    size, patch = tile_side(forced or vision["image_size"]), tile_side(vision.get("patch_size", 14))
    ratio = config.get("downsample_ratio", 0.5)
    side, shuffle = size // patch, round(1 / ratio)
    if side < 1 or side % shuffle**2:
        yield (
            f"image_size={size} and patch_size={patch} give {side} patches per side, not a multiple of "
            f"{shuffle**2}, which the compressed rate needs at downsample_ratio={ratio}"
        )


def _uneven(part: str, width: int, heads: int) -> str:
    return f"{part}.hidden_size={width} is not a multiple of num_attention_heads={heads}"


def _number_fault(block: Mapping[str, Any], part: str, name: str, may_lack: bool = False) -> Iterator[str]:
    field = f"{part}.{name}" if part else name
    most = _MOST_PARTS if name in _PARTS else _MOST_WIDTH
    if name not in block:
        if not may_lack:
            yield f"{field} is missing"
    elif not is_whole(block[name]) or block[name] < 1:
        yield f"{field}={block[name]!r} is not a whole number of 1 or more"
    elif block[name] > most:
        yield f"{field}={block[name]} is more than {most:,}"


def _side_fault(vision: Mapping[str, Any], name: str, may_lack: bool) -> Iterator[str]:
    sides = vision.get(name)
    if not isinstance(sides, list):
        yield from _number_fault(vision, "vision_config", name, may_lack)
    elif len(sides) != 2 or sides[0] != sides[1]:
        yield f"vision_config.{name}={sides} is not square; only square tiles and patches are supported"
    else:
        yield from _number_fault({name: sides[0]}, "vision_config", name)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value of JSON is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return is_whole(value) or (isinstance(value, float) and isfinite(value))
