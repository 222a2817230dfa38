"""Speed of the consistency training, computed before anything runs from the sizes of a model.

The FLOPs are those of `vico/objectives/flops.py`, which needs the samples of a pack; here a sample has
`SAMPLE_TOKENS` tokens at the full rate, and the head, which runs at answer tokens only, is left out.
"""

from dataclasses import dataclass

from vico.memory.model_sizes import ModelSizes

SAMPLE_TOKENS = 2048
_EFFICIENCY = {False: 0.225, True: 0.27}
"""Share of a device's peak that the step reached under DeepSpeed, with plain and with compiled layers:
measured with InternVL3.5-1B on one H200 (docs/measurements/cuda.md)."""


@dataclass(frozen=True)
class PackWork:
    """A full pack: tiles, and tokens of the policy and of the reference."""

    tiles: int
    policy_tokens: int
    reference_tokens: int
    train_vision: bool
    checkpointing: str

    @property
    def tokens(self) -> int:
        return self.policy_tokens + self.reference_tokens


def pack_seconds(sizes: ModelSizes, work: PackWork, peak_tflops: float, *, compiled: bool) -> float:
    """Return the seconds of a pack on one device: forward and backward of the policy, forward of the
    reference, and what checkpointing computes again."""
    repeated = 0.0 if work.checkpointing == "none" else recomputed_flops(sizes, work)
    return (pack_flops(sizes, work) + repeated) / (_EFFICIENCY[compiled] * peak_tflops * 1e12)


def ratio_seconds(sizes: ModelSizes, peak_tflops: float, num_masks: int | None) -> float:
    """Return the seconds of one sample in the stage ratio on one device: a sample of `SAMPLE_TOKENS` tokens,
    an eighth of them text, the others tiles.

    The reference runs once. The policy runs once per tile and once more, each time from the tile that differs
    on: half of the sample on average. `num_masks`: that many whole passes instead.
    """
    num_tiles = SAMPLE_TOKENS * 7 // 8 // sizes.full_tokens
    passes = (num_tiles + 1) / 2 if num_masks is None else num_masks
    flops = 2 * num_tiles * tile_flops(sizes)
    flops += (1 + passes) * language_flops(sizes, SAMPLE_TOKENS, SAMPLE_TOKENS)
    return flops / (_EFFICIENCY[False] * peak_tflops * 1e12)


def pack_flops(sizes: ModelSizes, work: PackWork) -> float:
    """Return the FLOPs of a pack, without what is computed again."""
    vision = work.tiles * tile_flops(sizes)
    policy = language_flops(sizes, work.policy_tokens, _short(work))
    reference = language_flops(sizes, work.reference_tokens, SAMPLE_TOKENS)
    return (4 if work.train_vision else 1) * vision + 3 * policy + reference


def recomputed_flops(sizes: ModelSizes, work: PackWork) -> float:
    """Return the FLOPs of the layers whose forward pass runs again in the backward pass."""
    vision = work.tiles * tile_flops(sizes) if work.train_vision else 0.0
    return vision + language_flops(sizes, work.policy_tokens, _short(work))


def tile_flops(sizes: ModelSizes) -> float:
    """Return the FLOPs of one tile in the vision tower, forward."""
    width, tokens = sizes.vision_width, sizes.tokens_per_tile
    layer = 8 * width**2 + 4 * width * sizes.vision_mlp + 4 * tokens * width
    return float(tokens * sizes.vision_layers * layer)


def language_flops(sizes: ModelSizes, tokens: int, sample_tokens: float) -> float:
    """Return the FLOPs of the language model's layers over tokens in samples of one length, forward."""
    products = 4 * sizes.width * (sizes.queries + sizes.keys) + 6 * sizes.width * sizes.mlp
    return tokens * sizes.layers * (products + 2 * sizes.queries * sample_tokens)


def _short(work: PackWork) -> float:
    """Return the tokens of the policy's sample."""
    return SAMPLE_TOKENS * work.policy_tokens / work.reference_tokens
