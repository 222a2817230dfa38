"""The most memory that a server takes beside its model, by its limits."""

from typing import Any

from pipeline.serving.answer import ServedModel
from vico.inference.decoding import CHUNK_TOKENS
from vico.inference.picture_encoding import BATCH_TILES

NUM_READERS = 2
"""Threads that parse and tokenise."""
_BODY_COPIES = 3
"""Of a body while it is parsed: as JSON texts, as the part after a URL's comma, as picture bytes."""
_BYTES_PER_VALUE = 150
"""Of a JSON value, and of a token while a text is tokenised, at worst one per byte of text."""
_BYTES_PER_PIXEL = 20
"""Of a picture while it is decoded: Pillow's 4 bytes twice, and the coefficients of a progressive JPEG."""
_CONNECTIONS = 512 * 192 * 1024
"""Buffers of all connections."""
_ALLOCATOR = 256 * 2**20
"""What allocators and thread stacks keep."""


def memory_bound(served: ServedModel) -> int:
    """Return the bytes that answering takes at most, beside the weights: the parts are in docs/serving.md.

    Bodies, readers and pictures are in host memory; cached tokens, encoded pictures and activations are
    in the memory of the model's device.
    """
    limits, settings = served.limits, served.model.settings
    text: Any = served.model.base.config.text_config
    vision: Any = served.model.base.config.vision_config
    size = served.model.lm_head.weight.element_size()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = size * (2 * text.num_hidden_layers * text.num_key_value_heads * head + text.hidden_size)
    readers = NUM_READERS * (
        _BODY_COPIES * limits.body_bytes + _BYTES_PER_VALUE * (100_000 + 2 * limits.text_bytes)
    )
    tile_pixels = 3 * settings.tile_size**2
    pictures = _BYTES_PER_PIXEL * limits.picture_pixels + 3 * (settings.max_tiles + 1) * tile_pixels * 5
    pass_tokens = BATCH_TILES * (settings.vision_tokens + 1)
    # At most: attention's input and output, and the widened state of the feed-forward block, of one layer.
    vision_pass = size * pass_tokens * (8 * vision.hidden_size + 3 * vision.intermediate_size)
    vision_pass += 4 * BATCH_TILES * tile_pixels * 3
    step_tokens = CHUNK_TOKENS + limits.batch
    step = size * step_tokens * (12 * text.hidden_size + 3 * text.intermediate_size)
    step += 4 * limits.batch * served.model.settings.vocab_size * 6
    parts = (
        limits.held_bytes,
        readers,
        pictures,
        limits.picture_cache_bytes,
        limits.decoded_tokens * per_token,
        vision_pass,
        step,
        _CONNECTIONS,
        _ALLOCATOR,
    )
    return sum(parts)
