"""Attention over sequences packed end to end, in which no token sees another sequence.

Importing this file registers it with transformers. On CUDA in bfloat16 or float16 it is one varlen kernel
(flash-attn if installed, else torch's own). Elsewhere, and in float32, which no varlen kernel supports, it is
exact SDPA, one sequence after another. A segment may be the end of a sequence whose beginning is elsewhere
(`vico/model/shared_keys.py`).

Shapes: B = 1 row, L tokens of the row (its segments end to end), H query heads, K key and value heads, d
width of a head, S tokens that all segments see together (L without shared keys).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vico.errors import UserError
from vico.model.row_cache import RowCache, cached_attention
from vico.model.shared_keys import SharedKeys

IMPLEMENTATION = "vico_segments"
_QUERY_BLOCK = 128
"""Queries of a segment that SDPA gets at once, if the segment continues another one."""


# nine parameters: transformers calls every attention function with this signature
def segment_attention(
    module: nn.Module,
    query_BHLd: torch.Tensor,
    key_BKLd: torch.Tensor,
    value_BKLd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segment_lengths: Sequence[int] | None = None,
    row_caches: Sequence[RowCache] | None = None,
    shared_keys: SharedKeys | None = None,
    **kwargs: Any,  # transformers passes dropout, scaling and features of the model by keyword
) -> tuple[torch.Tensor, None]:
    """Return causal attention within each segment, [1, L, H, d], and None for the attention weights.

    `segment_lengths` sum to L. With `row_caches`, one per segment, its tokens continue a cached prompt; with
    `shared_keys`, a segment also attends to all tokens that they say are before it. Without any of them, this
    is the SDPA of transformers. Raises ValueError for features of a language model that packed rows do not
    support.
    """
    if segment_lengths is None and row_caches is None:
        return sdpa_attention_forward(module, query_BHLd, key_BKLd, value_BKLd, attention_mask, **kwargs)
    for feature in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(feature) is not None:
            raise ValueError(f"this language model's {feature} is not supported in packed rows")
    if row_caches is not None:
        rows = query_BHLd[0], key_BKLd[0], value_BKLd[0]
        return cached_attention(_layer(module), *rows, row_caches, kwargs.get("scaling")), None
    assert segment_lengths is not None
    dropout, scaling = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    lengths, seen_lengths = tuple(segment_lengths), tuple(segment_lengths)
    if shared_keys is not None:
        key_BKLd, value_BKLd = shared_keys.extended(_layer(module), key_BKLd, value_BKLd)
        key_BKLd, value_BKLd = (part.index_select(2, shared_keys.seen) for part in (key_BKLd, value_BKLd))
        seen_lengths = shared_keys.seen_lengths
    row = _Row(query_BHLd, key_BKLd, value_BKLd, lengths, seen_lengths)
    if query_BHLd.is_cuda and query_BHLd.dtype in (torch.bfloat16, torch.float16):
        return _varlen(row, dropout, scaling), None
    return _sdpa(row, dropout, scaling), None


class _Row(NamedTuple):
    """Queries of segments end to end, and keys and values of all that each segment sees, end to end."""

    query_BHLd: torch.Tensor
    key_BKSd: torch.Tensor
    value_BKSd: torch.Tensor
    lengths: tuple[int, ...]
    seen_lengths: tuple[int, ...]


def _sdpa(row: _Row, dropout: float, scaling: float | None) -> torch.Tensor:
    """Return the attention [1, L, H, d] by SDPA, segment by segment."""
    key, value = row.key_BKSd, row.value_BKSd
    groups = row.query_BHLd.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    queries = row.query_BHLd.split(list(row.lengths), dim=2)
    seen = (part.split(list(row.seen_lengths), dim=2) for part in (key, value))
    attended = []
    for q, k, v in zip(queries, *seen, strict=True):
        if q.shape[2] == k.shape[2]:
            attended.append(
                F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True)
            )
            continue
        before = k.shape[2] - q.shape[2]
        # SDPA aligns a causal mask with the first key, and computes what a mask of its own hides. So queries
        # go in blocks, each with the keys up to its last query.
        for start in range(0, q.shape[2], _QUERY_BLOCK):
            block = q[:, :, start : start + _QUERY_BLOCK]
            end = before + start + block.shape[2]
            mask = _end_mask(block.shape[2], end, q.device)
            attended.append(
                F.scaled_dot_product_attention(
                    block, k[:, :, :end], v[:, :, :end], attn_mask=mask, dropout_p=dropout, scale=scaling
                )
            )
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


@lru_cache(maxsize=64)
def _end_mask(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """Return bool [num_queries, num_keys]: the last query sees all keys, each one before it one less."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def _layer(module: nn.Module) -> int:
    layer = module.layer_idx  # every attention module of transformers has its number
    assert isinstance(layer, int)
    return layer


class _Segments(NamedTuple):
    """Segments as varlen kernels take them: int32 bounds (starts, then the end) and the longest length."""

    bounds: torch.Tensor
    longest: int


@lru_cache(maxsize=8)
def _segments(lengths: tuple[int, ...], device: torch.device) -> _Segments:
    # Cached: every layer asks for the same, and each copy to the device makes the host wait.
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return _Segments(bounds, max(lengths))


def _varlen(row: _Row, dropout: float, scaling: float | None) -> torch.Tensor:
    """Return the same attention from a CUDA varlen kernel, [1, L, H, d].

    With fewer queries than keys, the kernels align the causal mask with the last key.
    """
    query, key, value = (part[0].transpose(0, 1) for part in row[:3])
    segments = _segments(row.lengths, query.device), _segments(row.seen_lengths, query.device)
    flash = flash_attn_varlen()
    if flash is None:
        attended = _torch_varlen(query, key, value, segments, dropout, scaling)
    else:
        attended = flash(
            query, key, value, *_ends(segments), dropout_p=dropout, softmax_scale=scaling, causal=True
        )
    return attended.unsqueeze(0)


def _ends(segments: tuple[_Segments, _Segments]) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Return bounds and longest segment of queries and keys, in the order of varlen kernels."""
    queries, keys = segments
    return queries.bounds, keys.bounds, queries.longest, keys.longest


@lru_cache(maxsize=1)
def flash_attn_varlen() -> Callable[..., torch.Tensor] | None:
    """Return flash-attn's varlen kernel, or None if it is not installed.

    Raises UserError if flash-attn is installed but cannot be imported.
    """
    package = find_spec("flash_attn")
    if package is None or package.origin is None:  # flash-attn 4 alone: a namespace without this function
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise UserError(
            f"flash_attn is installed and cannot be imported ({error}); install one that is built for torch "
            f"{torch.__version__}, or uninstall it for torch's own varlen kernel"
        ) from error
    return flash_attn_varlen_func


def _torch_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: tuple[_Segments, _Segments],
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Return the attention [L, H, d] of torch's own varlen kernel.

    The kernel needs head widths that are multiples of 8, so heads are padded with zeros. It has no dropout.
    """
    if dropout:
        raise ValueError("attention_dropout > 0 on CUDA needs flash-attn; install the extra vico[gpu]")
    width = query.shape[-1]
    if width % 8:
        scaling = width**-0.5 if scaling is None else scaling
        query, key, value = (F.pad(part, (0, -width % 8)) for part in (query, key, value))
    attended = _torch_kernel()(query, key, value, *_ends(segments), window_size=(-1, 0), scale=scaling)
    return attended[..., :width]


@lru_cache(maxsize=1)
def _torch_kernel() -> Callable[..., Any]:
    """Return torch's varlen kernel with shared key heads; torch 2.13 and later enable them by an argument."""
    from torch.nn.attention.varlen import varlen_attn

    needs_argument = "enable_gqa" in signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if needs_argument else varlen_attn


def _mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Return SDPA's mask for a padded batch; None for a packed row or a single prompt, which need none."""
    if attention_mask is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, segment_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
