"""Attention over sequences packed end to end: no token sees another sequence. Registered with transformers
once.

CUDA in bfloat16 or float16: one varlen kernel (flash-attn where installed, torch's own otherwise). Elsewhere,
and in float32, which no varlen kernel takes: exact SDPA, sequence by sequence.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from inspect import signature
from itertools import accumulate

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vico.errors import UserError

IMPLEMENTATION = "vico_segments"


def segment_attention(
    module, query_BHLd, key_BKLd, value_BKLd, attention_mask, *, segment_lengths=None, **kwargs
):
    """Causal attention within each of `segment_lengths` (their sum is L); without them, transformers' own
    SDPA."""
    if segment_lengths is None:
        return sdpa_attention_forward(module, query_BHLd, key_BKLd, value_BKLd, attention_mask, **kwargs)
    for feature in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(feature) is not None:
            raise ValueError(f"this language model's {feature} is not supported in packed training")
    dropout, scaling = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    if query_BHLd.is_cuda and query_BHLd.dtype in (torch.bfloat16, torch.float16):
        attended = _varlen(query_BHLd, key_BKLd, value_BKLd, segment_lengths, dropout, scaling)
        return attended, None
    groups = query_BHLd.shape[1] // key_BKLd.shape[1]
    if groups > 1:
        key_BKLd, value_BKLd = (part.repeat_interleave(groups, dim=1) for part in (key_BKLd, value_BKLd))
    parts = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=True)
        for q, k, v in zip(
            *(part.split(segment_lengths, dim=2) for part in (query_BHLd, key_BKLd, value_BKLd)), strict=True
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


@lru_cache(maxsize=8)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Kept, for every layer asks for the same and a copy to the device makes the host wait for it."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _varlen(query_BHLd, key_BKLd, value_BKLd, segment_lengths, dropout, scaling):
    """The same through a CUDA varlen kernel; [1, L, H, d]."""
    query, key, value = (part[0].transpose(0, 1) for part in (query_BHLd, key_BKLd, value_BKLd))
    bounds = _bounds(tuple(segment_lengths), query.device)
    longest = max(segment_lengths)
    flash = flash_attn_varlen()
    if flash is None:
        attended = _torch_varlen(query, key, value, bounds, longest, dropout, scaling)
    else:
        ends = bounds, bounds, longest, longest
        attended = flash(query, key, value, *ends, dropout_p=dropout, softmax_scale=scaling, causal=True)
    return attended.unsqueeze(0)


@lru_cache(maxsize=1)
def flash_attn_varlen() -> Callable[..., torch.Tensor] | None:
    """flash-attn's kernel, None where it is not installed; UserError where it is and does not load."""
    found = find_spec("flash_attn")
    if found is None or found.origin is None:  # flash-attn 4 alone: a namespace, without this function
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise UserError(
            f"flash_attn is installed and cannot be imported ({error}); install one that is built for torch "
            f"{torch.__version__}, or uninstall it for torch's own varlen kernel"
        ) from error
    return flash_attn_varlen_func


def _torch_varlen(query, key, value, bounds, longest, dropout, scaling):
    """torch's own varlen kernel; its heads are of a multiple of 8 numbers, and it drops nothing."""
    if dropout:
        raise ValueError("attention_dropout > 0 on CUDA needs flash-attn; install the extra vico[gpu]")
    width = query.shape[-1]
    if width % 8:
        scaling = width**-0.5 if scaling is None else scaling
        query, key, value = (F.pad(part, (0, -width % 8)) for part in (query, key, value))
    ends = bounds, bounds, longest, longest
    attended = _torch_kernel()(query, key, value, *ends, window_size=(-1, 0), scale=scaling)
    return attended[..., :width]


@lru_cache(maxsize=1)
def _torch_kernel() -> Callable[..., torch.Tensor]:
    """It shares keys among query heads by itself; since torch 2.13 it has to be asked to."""
    from torch.nn.attention.varlen import varlen_attn

    asked = "enable_gqa" in signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if asked else varlen_attn


def _mask(*args, attention_mask=None, **kwargs):
    """No mask for a packed row (segments keep apart by themselves) or a lone prompt; a padded batch gets
    SDPA's."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, segment_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
