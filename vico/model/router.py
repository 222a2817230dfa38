"""The router (ViR): vision tokens of one tile -> probabilities of compressing (column 0) and keeping (column
1) it.

Structure and key names are those of the published Flash checkpoints, dead weights included.
"""

import torch
from torch import nn

NUM_HEADS = 16


class AttentionPooling(nn.Module):
    """A learned query reads a tile's vision tokens: attn1, norm1, then attn2, norm2 three times (as
    published).

    attn3, attn4, norm3 and norm4 are never used by the published forward but stand in its checkpoints;
    here they are frozen so that no optimizer, no gradient and no ZeRO hook ever waits for them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query_token = nn.Parameter(torch.empty(1, width))
        nn.init.normal_(self.query_token, std=0.02)
        for number in range(1, 5):
            self.add_module(f"attn{number}", nn.MultiheadAttention(width, NUM_HEADS, batch_first=True))
            self.add_module(f"norm{number}", nn.LayerNorm(width))
        for dead in (self.attn3, self.attn4, self.norm3, self.norm4):
            dead.requires_grad_(False)

    def forward(self, features_NPv: torch.Tensor) -> torch.Tensor:
        """[N, P, v] -> [N, v]."""
        pooled = self.query_token.unsqueeze(0).expand(len(features_NPv), -1, -1)
        for attention, norm in ((self.attn1, self.norm1), *[(self.attn2, self.norm2)] * 3):
            pooled = norm(attention(pooled, features_NPv, features_NPv, need_weights=False)[0])
        return pooled.squeeze(1)


class GatingBlock(nn.Sequential):
    """Linear(v, 4v), GELU, Dropout, Linear(4v, v), Dropout, LayerNorm(v); the caller adds the residual."""

    def __init__(self, width: int, dropout: float):
        super().__init__(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
            nn.LayerNorm(width),
        )


class Gating(nn.Module):
    """Four residual blocks and the gate: [N, v] -> logits [N, 2]."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        for number in range(1, 5):
            self.add_module(f"block{number}", GatingBlock(width, dropout))
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, pooled_Nv: torch.Tensor) -> torch.Tensor:
        for block in (self.block1, self.block2, self.block3, self.block4):
            pooled_Nv = pooled_Nv + block(pooled_Nv)
        return self.gate(pooled_Nv)


class Router(nn.Module):
    """Pooling and gating; `forward` gives logits [N, 2], softmax of which are P(compress), P(keep)."""

    def __init__(self, vision_width: int, dropout: float = 0.1):
        super().__init__()
        if vision_width % NUM_HEADS:
            raise ValueError(f"vision width {vision_width} is no multiple of the router's {NUM_HEADS} heads")
        self.pooling_before_gating = AttentionPooling(vision_width)
        self.gating = Gating(vision_width, dropout)

    def forward(self, features_NPv: torch.Tensor) -> torch.Tensor:
        return self.gating(self.pooling_before_gating(features_NPv))

    def compress_probability(self, features_NPv: torch.Tensor) -> torch.Tensor:
        """P(compress) of each tile, float32 [N]."""
        return self(features_NPv).float().softmax(-1)[:, 0]
