"""ViCO's router (ViR): from the vision tokens of one tile to the probability of compressing that tile.

Structure and parameter names are those of the published Flash checkpoints, unused weights included. Column 0
of the output means compress (rate 1/16), column 1 means keep (rate 1/4).

Shapes: N tiles, P vision tokens per tile (before the pixel shuffle), v vision width.
"""

import torch
from torch import nn

NUM_HEADS = 16


class AttentionPooling(nn.Module):
    """Pool the vision tokens of each tile with a learned query: attn1, norm1, then attn2, norm2 three times.

    The published forward never uses attn3, attn4, norm3 and norm4, but its checkpoints contain them. They are
    frozen here, so that no optimizer, gradient or ZeRO hook waits for them.
    """

    attn1: nn.MultiheadAttention
    attn2: nn.MultiheadAttention
    attn3: nn.MultiheadAttention
    attn4: nn.MultiheadAttention
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm
    norm4: nn.LayerNorm

    def __init__(self, width: int):
        super().__init__()
        self.query_token = nn.Parameter(torch.empty(1, width))
        nn.init.normal_(self.query_token, std=0.02)
        for number in range(1, 5):
            self.add_module(f"attn{number}", nn.MultiheadAttention(width, NUM_HEADS, batch_first=True))
            self.add_module(f"norm{number}", nn.LayerNorm(width))
        for unused in (self.attn3, self.attn4, self.norm3, self.norm4):
            unused.requires_grad_(False)

    def forward(self, features_NPv: torch.Tensor) -> torch.Tensor:
        """Return one pooled token per tile: [N, P, v] -> [N, v]."""
        pooled_N1v = self.query_token.unsqueeze(0).expand(len(features_NPv), -1, -1)
        for attention, norm in ((self.attn1, self.norm1), *[(self.attn2, self.norm2)] * 3):
            pooled_N1v = norm(attention(pooled_N1v, features_NPv, features_NPv, need_weights=False)[0])
        return pooled_N1v.squeeze(1)


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
    """Four residual blocks and the gate."""

    block1: GatingBlock
    block2: GatingBlock
    block3: GatingBlock
    block4: GatingBlock

    def __init__(self, width: int, dropout: float):
        super().__init__()
        for number in range(1, 5):
            self.add_module(f"block{number}", GatingBlock(width, dropout))
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, pooled_Nv: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, 2] of pooled tokens [N, v]."""
        for block in (self.block1, self.block2, self.block3, self.block4):
            pooled_Nv = pooled_Nv + block(pooled_Nv)
        return self.gate(pooled_Nv)


class Router(nn.Module):
    """Pooling and gating: the softmax of the logits is (P(compress), P(keep)) of each tile."""

    def __init__(self, vision_width: int, dropout: float = 0.1):
        super().__init__()
        if vision_width % NUM_HEADS:
            raise ValueError(
                f"vision width {vision_width} is not a multiple of the router's {NUM_HEADS} heads"
            )
        self.pooling_before_gating = AttentionPooling(vision_width)
        self.gating = Gating(vision_width, dropout)

    def forward(self, features_NPv: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, 2] of vision tokens [N, P, v]."""
        return self.gating(self.pooling_before_gating(features_NPv))

    def compress_probability(self, features_NPv: torch.Tensor) -> torch.Tensor:
        """Return P(compress) of each tile, float32 [N]."""
        return self(features_NPv).float().softmax(-1)[:, 0]
