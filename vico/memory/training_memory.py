"""Memory of the consistency training by part, computed before anything runs, from a model's config.json.

Pure arithmetic: no torch, no weights. Saved activations are the bytes that autograd keeps for the backward
pass, counted with saved-tensor hooks (`tests/numerics/test_training_memory.py` counts them again). Bytes per
rank; b is the size of a weight (4 in float32, 2 in bfloat16).
"""

from dataclasses import dataclass, fields
from typing import Literal

from vico.memory.model_sizes import ModelSizes

_OPTIMIZER_BYTES = 12
"""A float32 master copy and two float32 moments per trained parameter, whatever the dtype of the weights."""


@dataclass(frozen=True)
class GradientExchange:
    """How DeepSpeed adds up the gradients of all ranks; the defaults are its own.

    `bucket_elements` gradients are collected and sent together, in `sum_bytes` each. With `overlaps`, several
    ranks have a second bucket, which fills while the first is sent. ZeRO-3 gathers at most `live_elements`
    parameters at the same time.
    """

    sum_bytes: int = 4
    bucket_elements: int = 5 * 10**8
    overlaps: bool = True
    live_elements: int = 10**9


@dataclass(frozen=True)
class TrainingShape:
    """What decides the memory of a training besides the model.

    `tokens` and `tiles` are those of one pack for the policy. `num_ranks` spread the optimizer (ZeRO 1),
    gradients (2) and weights (3). `offload` is none, optimizer or parameters; `reference` replicated, sharded
    or cpu. `checkpointing` as in `vico/model/recomputed.py`. A rank adds up the gradients of
    `packs_per_rank` packs for an update.
    """

    tokens: int
    tiles: int
    num_ranks: int
    weight_bytes: int
    zero_stage: int
    offload: str
    reference: str
    checkpointing: Literal["none", "selective", "full"]
    train_vision: bool
    kl_chunk_rows: int
    packs_per_rank: int = 2
    exchange: GradientExchange = GradientExchange()
    fused: bool = True
    """Whether one kernel updates the weights, as on CUDA."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of one rank, by part, and bytes in host memory that the rank needs besides."""

    weights: int
    reference: int
    gradients: int
    optimizer: int
    vision_activations: int
    language_activations: int
    loss: int
    buffers: int
    host: int

    @property
    def device(self) -> int:
        """The sum of the parts on the device, without the allocator's fragmentation and the CUDA context."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return name -> bytes of the parts on the device."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "host"}


def rank_memory(sizes: ModelSizes, shape: TrainingShape) -> RankMemory:
    """Return the memory of a rank at the peak of a step: the start of the backward pass of a full pack, the
    last one of an update. With few activations it is later, when gradients are sent or weights updated."""
    b, ranks, zero = shape.weight_bytes, shape.num_ranks, shape.zero_stage
    trained = sizes.policy - (0 if shape.train_vision else sizes.vision)
    shared_tower = 0 if shape.train_vision else sizes.vision
    weights = b * sizes.policy // (ranks if zero == 3 else 1)
    optimizer = _OPTIMIZER_BYTES * trained // ranks
    reference = b * (sizes.base - shared_tower)
    vision, language = saved_vision_bytes(sizes, shape), saved_language_bytes(sizes, shape)
    loss = loss_bytes(sizes, shape)
    later = _later_bytes(sizes, trained, shape) - vision - language - loss  # of which nothing is left then
    on_host = _read_whole(sizes, shape)
    if shape.offload != "none":
        on_host += optimizer + _offloaded_gradient_bytes(trained, shape)
        optimizer = 0
    if shape.offload == "parameters":
        on_host += weights
        weights = 0
    return RankMemory(
        weights=weights,
        reference={"replicated": reference, "sharded": reference // ranks, "cpu": 0}[shape.reference],
        gradients=gradient_bytes(trained, shape),
        optimizer=optimizer,
        vision_activations=vision,
        language_activations=language,
        loss=loss,
        buffers=max(buffer_bytes(sizes, trained, shape), later),
        host=on_host + (reference // ranks if shape.reference == "cpu" else 0),
    )


def gradient_bytes(trained: int, shape: TrainingShape) -> int:
    """Return the float32 gradients on the device.

    ZeRO-1 adds up whole gradients over the packs of an update. In float32, ZeRO-2 keeps the sum of the packs
    so far beside the gradients of the next. With offloading, ZeRO-1 and ZeRO-2 still add up on the device,
    and only ZeRO-3 in host memory.
    """
    whole, part = 4 * trained, 4 * trained // shape.num_ranks
    if shape.zero_stage == 1:
        return whole
    if shape.zero_stage == 2:
        return part * (2 if shape.packs_per_rank > 1 and shape.weight_bytes == 4 else 1)
    return part if shape.offload == "none" else 0


def _later_bytes(sizes: ModelSizes, trained: int, shape: TrainingShape) -> int:
    """Return what a rank needs when the backward pass is over: to send the gradients under ZeRO-1, and for
    the update.

    ZeRO-1 sends copies of whole gradients, and gets its part of the sums. AdamW without a fused kernel has
    two copies of a moment; under ZeRO-3 there is a copy of the gradients, too, for 10^9 parameters at a time.
    """
    part, exchange = trained // shape.num_ranks, shape.exchange
    copies = 0 if shape.fused or shape.offload != "none" else 8
    if shape.zero_stage == 1:
        sent = (4 + (exchange.sum_bytes if exchange.sum_bytes != 4 else 0)) * _sent(sizes, trained, shape)
        return max(4 * part + sent + _norm_bytes(sizes, trained, shape), copies * part)
    if shape.zero_stage == 3 and shape.offload == "none":
        return (copies + 4) * min(part, 10**9) + exchange.sum_bytes * exchange.bucket_elements
    return copies * part


def _sent(sizes: ModelSizes, trained: int, shape: TrainingShape) -> int:
    """Return the gradients that are sent together; one that is larger than a bucket is sent alone."""
    return min(max(shape.exchange.bucket_elements, sizes.vocabulary * sizes.width), trained)


def _norm_bytes(sizes: ModelSizes, trained: int, shape: TrainingShape) -> int:
    """Return a copy of the largest gradient in float64, for its norm, before it is offloaded."""
    if shape.offload == "none":
        return 0
    return 8 * min(sizes.vocabulary * sizes.width, trained // shape.num_ranks)


def _offloaded_gradient_bytes(trained: int, shape: TrainingShape) -> int:
    """Return what the optimizer in host memory needs besides its states: the gradients of the update, and
    with ZeRO-3 their sum, with the others the new weights before they are sent to the device."""
    copies = 4 if shape.zero_stage == 3 else shape.weight_bytes
    return (4 + copies) * trained // shape.num_ranks


def buffer_bytes(sizes: ModelSizes, trained: int, shape: TrainingShape) -> int:
    """Return the buffers of DeepSpeed's exchange at the start of the backward pass, when activations are
    still kept, and whole parameters that ZeRO-3 and a reference in parts have gathered.

    ZeRO-2 and ZeRO-3 send a bucket of gradients when it is full. It has the dtype of the weights, or under
    ZeRO-3 of the sums, and is copied, and converted, to be sent. ZeRO-1 sends all of them later.
    """
    b, exchange, several = shape.weight_bytes, shape.exchange, shape.num_ranks > 1
    gathered = b * sizes.vocabulary * sizes.width if several and shape.reference != "replicated" else 0
    bucket, sent = exchange.bucket_elements, _sent(sizes, trained, shape)
    if shape.zero_stage == 1:
        return gathered
    if shape.zero_stage == 3:
        live = b * min(exchange.live_elements, sizes.policy) if several else 0
        return exchange.sum_bytes * (bucket + sent) + live + gathered
    buckets = 2 if exchange.overlaps and several else 1
    converted = exchange.sum_bytes if exchange.sum_bytes != b else 0
    return b * buckets * bucket + (b + converted) * sent + gathered + _norm_bytes(sizes, trained, shape)


def _read_whole(sizes: ModelSizes, shape: TrainingShape) -> int:
    """Return the host memory of a model that a rank reads before it moves it to the device.

    What ZeRO-3 spreads is never whole at the start; rank 0 gathers the policy at the end, to write it, which
    counts as a share of every rank.
    """
    policy = shape.weight_bytes * sizes.policy // (shape.num_ranks if shape.zero_stage == 3 else 1)
    return policy + (shape.weight_bytes * sizes.base if shape.reference == "replicated" else 0)


def saved_vision_bytes(sizes: ModelSizes, shape: TrainingShape) -> int:
    """Return what the vision tower keeps for the backward pass of a pack's tiles; 0 if it is frozen."""
    if not shape.train_vision:
        return 0
    layer = 10 * sizes.vision_width + 2 * sizes.vision_mlp
    tokens, b = shape.tiles * sizes.tokens_per_tile, shape.weight_bytes
    if shape.checkpointing == "none":
        return tokens * sizes.vision_layers * b * layer
    kept = b * sizes.vision_width  # the layer's input
    if shape.checkpointing == "selective":
        kept += _attention_bytes(sizes.vision_width, sizes.vision_heads, b)
    return tokens * (sizes.vision_layers * kept + b * layer)


def saved_language_bytes(sizes: ModelSizes, shape: TrainingShape) -> int:
    """Return what the language model keeps for the backward pass of a pack's tokens.

    Per token and layer, in bytes, with width W, width of the MLP I, of queries Q and keys K, H heads; norms
    compute in float32 and keep their inputs so.
    """
    factors = (16, 8, 16, 6) if shape.weight_bytes == 2 else (24, 16, 28, 8)
    widths = (sizes.width, sizes.mlp, sizes.queries, sizes.keys)
    layer = sum(factor * width for factor, width in zip(factors, widths, strict=True)) + 10 * sizes.heads + 8
    if sizes.experts:  # a copy of the token before and after each of its experts, and how it chose them
        layer += (2 * shape.weight_bytes * sizes.width + 34) * sizes.experts_per_token + 4 * sizes.experts
    if shape.checkpointing == "none":
        return shape.tokens * sizes.layers * layer
    kept = shape.weight_bytes * sizes.width
    if shape.checkpointing == "selective":
        kept += _attention_bytes(sizes.queries, sizes.heads, shape.weight_bytes)
    return shape.tokens * (sizes.layers * kept + layer)


def _attention_bytes(width: int, heads: int, weight_bytes: int) -> int:
    """Return what attention returns per token: its output, and a float32 sum of exponentials per head."""
    return weight_bytes * width + 4 * heads


def loss_bytes(sizes: ModelSizes, shape: TrainingShape) -> int:
    """Return two chunks of logits in float32, their gradient, and the head's gradient in float32."""
    logits = shape.kl_chunk_rows * sizes.vocabulary * (2 * 4 + shape.weight_bytes)
    return logits + 4 * sizes.vocabulary * sizes.width


def checkpoint_bytes(sizes: ModelSizes, weight_bytes: int, *, train_vision: bool) -> int:
    """Return the bytes of one training checkpoint, the states of all ranks together.

    The policy's weights, and a master copy with two moments in float32 of what is trained.
    """
    trained = sizes.policy - (0 if train_vision else sizes.vision)
    return weight_bytes * sizes.policy + _OPTIMIZER_BYTES * trained
