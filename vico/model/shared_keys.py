"""Keys and values that several sequences share: computed once, kept per layer, and read by later rows.

A row's segments are then the ends of sequences. Each attends to the tokens before it, which are in an earlier
row or elsewhere in the same row, and causally to itself (`vico/model/segments.py`).

Shapes: B = 1 row, L tokens of the row, M tokens kept from earlier rows, K key and value heads, d width of a
head, S tokens that the segments see together.
"""

from dataclasses import dataclass, field

import torch

KeyValues = tuple[torch.Tensor, torch.Tensor]


@dataclass
class SharedKeys:
    """What the segments of one row see, and which tokens of the row stay for later rows.

    Tokens are numbered over the M kept ones, then the L of the row. `seen` int64 [S] are the tokens that
    each segment attends to, segment after segment, in the order of their positions, its own last;
    `seen_lengths` says how many each segment sees. `kept` int64 are the tokens that later rows need.
    `earlier` holds keys and values [B, K, M, d] by layer; `later` gets those of `kept` in the forward pass.
    """

    seen: torch.Tensor
    seen_lengths: tuple[int, ...]
    kept: torch.Tensor
    earlier: dict[int, KeyValues]
    later: dict[int, KeyValues] = field(default_factory=dict)

    def extended(self, layer: int, key_BKLd: torch.Tensor, value_BKLd: torch.Tensor) -> KeyValues:
        """Return keys and values [B, K, M + L, d] of a layer, and keep those that later rows need."""
        if layer in self.earlier:
            before = self.earlier[layer]
            key_BKLd = torch.cat([before[0], key_BKLd], dim=2)
            value_BKLd = torch.cat([before[1], value_BKLd], dim=2)
        if len(self.kept):
            kept = (part.index_select(2, self.kept) for part in (key_BKLd, value_BKLd))
            self.later[layer] = (next(kept), next(kept))
        return key_BKLd, value_BKLd
