"""Keys and values of prompts that are decoded together, and the attention that reads them.

The tokens of all prompts lie end to end in one packed row. Each prompt has a cache of its own, so it attends
to the same keys as it does alone, and rows need no padding.

Shapes: L tokens of the packed row, T new tokens of one prompt, P tokens of it that are cached already, H
query heads, K key and value heads, d width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass
class RowCache:
    """Keys and values of one prompt in every layer, with room for `capacity` tokens.

    `num_cached` tokens are cached; `num_new` further ones are in the current step. Both are set by the
    decoder.
    """

    capacity: int
    num_cached: int = 0
    num_new: int = 0
    _layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def extended(
        self, layer: int, key_KTd: torch.Tensor, value_KTd: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new keys and values of a layer, and return all of it, [K, P + T, d] each."""
        heads, _, width = key_KTd.shape
        if layer not in self._layers:
            shape = heads, self.capacity, width
            self._layers[layer] = key_KTd.new_empty(shape), value_KTd.new_empty(shape)
        keys, values = self._layers[layer]
        end = self.num_cached + self.num_new
        keys[:, self.num_cached : end] = key_KTd
        values[:, self.num_cached : end] = value_KTd
        return keys[:, :end], values[:, :end]


def cached_attention(
    layer: int,
    query_HLd: torch.Tensor,
    key_KLd: torch.Tensor,
    value_KLd: torch.Tensor,
    caches: Sequence[RowCache],
    scaling: float | None,
) -> torch.Tensor:
    """Return the causal attention [1, L, H, d] of each prompt to its own cached and new tokens.

    The new tokens of the prompts lie end to end, `num_new` of each; their keys and values enter the caches.
    """
    lengths = [cache.num_new for cache in caches]
    queries, new_keys, new_values = (part.split(lengths, dim=1) for part in (query_HLd, key_KLd, value_KLd))
    attended = []
    for query, new_key, new_value, cache in zip(queries, new_keys, new_values, caches, strict=True):
        keys, values = cache.extended(layer, new_key, new_value)
        attended.append(_attended(query, keys, values, scaling))
    return torch.cat(attended, dim=1).transpose(0, 1).unsqueeze(0).contiguous()


def _attended(
    query_HTd: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Return the attention [H, T, d] of one prompt's last T tokens to all its P + T tokens."""
    heads, num_new, width = query_HTd.shape
    key_heads, num_all, _ = keys.shape
    groups = heads // key_heads
    if num_new == 1:  # the query heads that share a key head are queries of it: no key is copied
        query = query_HTd.reshape(1, key_heads, groups, width)
        attended = F.scaled_dot_product_attention(query, keys[None], values[None], scale=scaling)
        return attended.reshape(heads, 1, width)
    if groups > 1:
        keys, values = (part.repeat_interleave(groups, dim=0) for part in (keys, values))
    mask = None
    if num_all > num_new:  # SDPA's own causal mask would start at the first cached token
        mask = torch.ones(num_new, num_all, dtype=torch.bool, device=keys.device).tril(num_all - num_new)
    attended = F.scaled_dot_product_attention(
        query_HTd[None], keys[None], values[None], mask, scale=scaling, is_causal=mask is None
    )
    return attended[0]
