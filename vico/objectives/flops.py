"""Model FLOPs of a training step: the work that its mathematics needs; a multiply-add counts as two.

Counted: the matrix products of vision tower, both connectors, language model and heads, forward and
backward, and the forward pass of the reference. Not counted: recomputation in the backward pass (activation
checkpointing, flash attention), norms, activations and softmaxes, tiles of zeros, the optimizer. Attention
within a sequence of l tokens is causal and counts l^2 / 2 pairs, as its kernels compute them; in the vision
tower it counts all pairs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vico.packing import PackedRow

if TYPE_CHECKING:
    from transformers import InternVLConfig


@dataclass(frozen=True)
class RowWork:
    """The work of a packed row: tiles through each connector, lengths of its sequences, answer tokens."""

    full_tiles: int
    compressed_tiles: int
    lengths: tuple[int, ...]
    answers: int


def row_work(row: PackedRow) -> RowWork:
    """Return the work of a packed row; a row without tiles and answers (an empty pack) has none."""
    answers = len(row.answer_ids)
    lengths = row.lengths if answers or len(row.full_slots) or len(row.compressed_slots) else ()
    return RowWork(len(row.full_tiles), len(row.compressed_tiles), tuple(lengths), answers)


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass; `entering` of them are products whose input needs no gradient (pixels)."""

    forward: float
    entering: float = 0.0

    @property
    def training(self) -> float:
        """Forward and backward: a product's backward costs two forwards, or one without input gradient."""
        return 3 * self.forward - self.entering


def _product(rows: float, width_in: int, width_out: int) -> float:
    return 2.0 * rows * width_in * width_out


def _configs(config: "InternVLConfig") -> tuple[Any, Any]:
    """Return the configs of vision tower and language model; their fields depend on the model's type."""
    return config.vision_config, config.text_config


def vision_flops(config: "InternVLConfig", num_tiles: int) -> Flops:
    """Return the FLOPs of the vision tower over tiles."""
    vision, _ = _configs(config)
    width, patch = vision.hidden_size, vision.patch_size[0]
    patches = num_tiles * (vision.image_size[0] // patch) ** 2
    tokens = patches + num_tiles  # one class token per tile
    per_tile = tokens / num_tiles if num_tiles else 0
    layer = 4 * _product(tokens, width, width) + 2 * _product(tokens, width, vision.intermediate_size)
    layer += 2 * _product(tokens * per_tile, width, 1)
    embedding = _product(patches, vision.num_channels * patch * patch, width)
    return Flops(embedding + vision.num_hidden_layers * layer, embedding)


def connector_flops(config: "InternVLConfig", work: RowWork) -> Flops:
    """Return the FLOPs of both connectors over the tiles of a row.

    Their first norm is trained, so a frozen vision tower saves none of their backward pass.
    """
    vision, text = _configs(config)
    width, out = vision.hidden_size, text.hidden_size
    side = vision.image_size[0] // vision.patch_size[0]
    shuffle = round(1 / config.downsample_ratio)
    full = work.full_tiles * (side // shuffle) ** 2
    compressed = work.compressed_tiles * (side // shuffle**2) ** 2
    forward = _product(full, shuffle**2 * width, out) + _product(full, out, out)
    forward += _product(compressed, shuffle**4 * width, 2 * out)
    forward += _product(compressed, 2 * out, 2 * out) + _product(compressed, 2 * out, out)
    return Flops(forward)


def language_flops(config: "InternVLConfig", work: RowWork, *, causal: bool = True) -> Flops:
    """Return the FLOPs of the language model over the sequences of a row, without its head."""
    _, text = _configs(config)
    width, tokens = text.hidden_size, sum(work.lengths)
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    pairs = sum(length * length for length in work.lengths) / (2 if causal else 1)
    attention = 2 * _product(tokens, width, queries) + 2 * _product(tokens, width, keys)
    attention += 2 * _product(pairs, queries, 1)
    dense = 3 * _product(tokens, width, text.intermediate_size)
    experts = getattr(text, "num_experts", 0)
    if not experts:
        return Flops(text.num_hidden_layers * (attention + dense))
    sparse = 3 * _product(tokens * text.num_experts_per_tok, width, text.moe_intermediate_size)
    sparse += _product(tokens, width, experts)
    num_dense = len(text.mlp_only_layers or ())
    num_sparse = text.num_hidden_layers - num_dense
    return Flops(text.num_hidden_layers * attention + num_dense * dense + num_sparse * sparse)


def head_flops(config: "InternVLConfig", work: RowWork) -> Flops:
    """Return the FLOPs of the head over a row's answer tokens."""
    _, text = _configs(config)
    return Flops(_product(work.answers, text.hidden_size, text.vocab_size))


def consistency_flops(
    config: "InternVLConfig",
    num_tiles: int,
    policy: RowWork,
    reference: RowWork,
    *,
    train_vision: bool = True,
    with_reference: bool = True,
    causal: bool = True,
) -> float:
    """Return the FLOPs of a consistency step on one pack: policy forward and backward, reference forward.

    `num_tiles` tiles go through the vision tower, a frozen one once for both models. `with_reference` false:
    the reference does not run.
    """
    vision = vision_flops(config, num_tiles)
    trained = [
        connector_flops(config, policy),
        language_flops(config, policy, causal=causal),
        head_flops(config, policy),
    ]
    forward = [
        vision,
        connector_flops(config, reference),
        language_flops(config, reference, causal=causal),
        head_flops(config, reference),
    ]
    policy_vision = vision.training if train_vision else 0.0
    if not with_reference:
        policy_vision = policy_vision or vision.forward
        return policy_vision + sum(part.training for part in trained)
    return policy_vision + sum(part.training for part in trained) + sum(part.forward for part in forward)


def sft_flops(config: "InternVLConfig", num_tiles: int, row: RowWork, *, causal: bool = True) -> float:
    """Return the FLOPs of a plain SFT step on one row: the whole model forward and backward, no reference."""
    parts = [
        vision_flops(config, num_tiles),
        connector_flops(config, row),
        language_flops(config, row, causal=causal),
        head_flops(config, row),
    ]
    return sum(part.training for part in parts)
