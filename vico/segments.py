"""Attention over sequences packed end to end: no token sees another sequence. Registered with transformers
once.

CUDA in bfloat16 or float16: one varlen kernel (flash-attn where installed, torch's own otherwise). Elsewhere,
and in float32, which no varlen kernel takes: exact SDPA, sequence by sequence.
"""

# B batch (1 when packed), H query heads, K key heads, L tokens, d head width

from itertools import accumulate

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

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


def _varlen(query_BHLd, key_BKLd, value_BKLd, segment_lengths, dropout, scaling):
    """The same through a CUDA varlen kernel; [1, L, H, d]."""
    query, key, value = (part[0].transpose(0, 1) for part in (query_BHLd, key_BKLd, value_BKLd))
    bounds = torch.tensor([0, *accumulate(segment_lengths)], dtype=torch.int32, device=query.device)
    longest = max(segment_lengths)
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn

        if dropout:
            raise ValueError(
                "attention_dropout > 0 on CUDA needs flash-attn; install the extra vico[gpu]"
            ) from None
        if key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        attended = varlen_attn(
            query, key, value, bounds, bounds, longest, longest, window_size=(-1, 0), scale=scaling
        )
    else:
        attended = flash_attn_varlen_func(
            query,
            key,
            value,
            bounds,
            bounds,
            longest,
            longest,
            dropout_p=dropout,
            softmax_scale=scaling,
            causal=True,
        )
    return attended.unsqueeze(0)


def _mask(*args, attention_mask=None, **kwargs):
    """No mask for a packed row (segments keep apart by themselves) or a lone prompt; a padded batch gets
    SDPA's."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, segment_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
