"""Model FLOPs of a training step: what the mathematics of the step needs, a multiply-add counting two.

Counted are the matrix products of vision tower, both connectors, language model and heads, forward and
backward, and the forward of the reference. Not counted: what is computed again in the backward (activation
checkpointing, flash attention), norms, activations and softmaxes, zero tiles, the optimizer. Attention within
a sequence of l tokens is causal and counts l^2 / 2 pairs, as its kernels compute them; in the vision tower it
counts all pairs.
"""

from dataclasses import dataclass
from typing import Any

from vico.packing import PackedRow


@dataclass(frozen=True)
class RowWork:
    """What a packed row asks for: tiles through each connector, lengths of its sequences, answer tokens."""

    full_tiles: int
    compressed_tiles: int
    lengths: tuple[int, ...]
    answers: int


def row_work(row: PackedRow) -> RowWork:
    """The work of a packed row; a row that answers nothing (an empty pack) asks for none."""
    answers = len(row.answer_ids)
    lengths = row.lengths if answers or len(row.full_slots) or len(row.compressed_slots) else ()
    return RowWork(len(row.full_tiles), len(row.compressed_tiles), tuple(lengths), answers)


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward, `entering` of it in products whose input needs no gradient (pixels)."""

    forward: float
    entering: float = 0.0

    @property
    def training(self) -> float:
        """Forward and backward: a product costs twice its forward, once where its input needs no gradient."""
        return 3 * self.forward - self.entering


def _product(rows: float, width_in: int, width_out: int) -> float:
    return 2.0 * rows * width_in * width_out


def vision_flops(config: Any, num_tiles: int) -> Flops:
    """The vision tower over tiles; `config` is the model's InternVLConfig."""
    vision = config.vision_config
    width, patch = vision.hidden_size, vision.patch_size[0]
    patches = num_tiles * (vision.image_size[0] // patch) ** 2
    tokens = patches + num_tiles  # the class token
    per_tile = tokens / num_tiles if num_tiles else 0
    layer = 4 * _product(tokens, width, width) + 2 * _product(tokens, width, vision.intermediate_size)
    layer += 2 * _product(tokens * per_tile, width, 1)
    embedding = _product(patches, vision.num_channels * patch * patch, width)
    return Flops(embedding + vision.num_hidden_layers * layer, embedding)


def connector_flops(config: Any, work: RowWork) -> Flops:
    """Both connectors over the tiles of a row. Their first norm trains, so that a frozen vision tower saves
    none of their backward."""
    width, out = config.vision_config.hidden_size, config.text_config.hidden_size
    side = config.vision_config.image_size[0] // config.vision_config.patch_size[0]
    shuffle = round(1 / config.downsample_ratio)
    full = work.full_tiles * (side // shuffle) ** 2
    compressed = work.compressed_tiles * (side // shuffle**2) ** 2
    forward = _product(full, shuffle**2 * width, out) + _product(full, out, out)
    forward += _product(compressed, shuffle**4 * width, 2 * out)
    forward += _product(compressed, 2 * out, 2 * out) + _product(compressed, 2 * out, out)
    return Flops(forward)


def language_flops(config: Any, work: RowWork, *, causal: bool = True) -> Flops:
    """The language model over the sequences of a row, without its head."""
    text = config.text_config
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


def head_flops(config: Any, work: RowWork) -> Flops:
    """The head over a row's answer tokens."""
    return Flops(_product(work.answers, config.text_config.hidden_size, config.text_config.vocab_size))


def consistency_flops(
    config: Any,
    num_tiles: int,
    policy: RowWork,
    reference: RowWork,
    *,
    train_vision: bool = True,
    causal: bool = True,
) -> float:
    """A consistency step on one pack: the policy forward and backward and the reference forward; a frozen
    vision tower runs forward once for both."""
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
    return policy_vision + sum(one.training for one in trained) + sum(one.forward for one in forward)


def sft_flops(config: Any, num_tiles: int, row: RowWork, *, causal: bool = True) -> float:
    """A plain SFT step on one row: the whole model forward and backward, no reference."""
    parts = [
        vision_flops(config, num_tiles),
        connector_flops(config, row),
        language_flops(config, row, causal=causal),
        head_flops(config, row),
    ]
    return sum(part.training for part in parts)
