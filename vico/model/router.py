"""ViCO's router (ViR): from the vision tokens of one tile to the probability of compressing that tile.

Structure and parameter names are those of the published Flash checkpoints, unused weights included. Column 0
of the output means compress (rate 1/16), column 1 means keep (rate 1/4).

Shapes: N tiles, P vision tokens per tile (before the pixel shuffle), v vision width.
"""

import torch
import torch.nn.functional as F
from torch import nn

NUM_HEADS = 16


class QueryAttention(nn.Module):
    """Multi-head attention of one query per tile over the tile's vision tokens.

    Equal to torch's MultiheadAttention, with its parameter names, at 1 / (width of a head) of the work on
    tokens: instead of projecting every token to a key and a value, it projects the query back to the tokens'
    space, and projects the weighted mean of the tokens. The bias of the keys drops out of the softmax.
    """

    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query_Nv: torch.Tensor, features_NPv: torch.Tensor) -> torch.Tensor:
        """Return the attended token of each tile, [N, v]."""
        num_tiles, width = query_Nv.shape
        # H heads of D
        query_weight, key_weight_HDv, value_weight_HDv = (
            self.in_proj_weight[:width],
            *self.in_proj_weight[width:].view(2, NUM_HEADS, width // NUM_HEADS, width),
        )
        query_bias, _, value_bias = self.in_proj_bias.chunk(3)
        query_NHD = F.linear(query_Nv, query_weight, query_bias).view(num_tiles, NUM_HEADS, -1)
        probe_NHv = torch.einsum("nhd,hdv->nhv", query_NHD * query_NHD.shape[-1] ** -0.5, key_weight_HDv)
        weights_NHP = (probe_NHv @ features_NPv.transpose(1, 2)).softmax(-1)
        value_NHD = torch.einsum("nhv,hdv->nhd", weights_NHP @ features_NPv, value_weight_HDv)
        return self.out_proj(value_NHD.reshape(num_tiles, width) + value_bias)


class AttentionPooling(nn.Module):
    """Pool the vision tokens of each tile with a learned query: attn1, norm1, then attn2, norm2 three times.

    The published forward never uses attn3, attn4, norm3 and norm4, but its checkpoints contain them. They are
    frozen here, so that no optimizer, gradient or ZeRO hook waits for them.
    """

    attn1: QueryAttention
    attn2: QueryAttention
    attn3: QueryAttention
    attn4: QueryAttention
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm
    norm4: nn.LayerNorm

    def __init__(self, width: int):
        super().__init__()
        self.query_token = nn.Parameter(torch.empty(1, width))
        nn.init.normal_(self.query_token, std=0.02)
        for number in range(1, 5):
            self.add_module(f"attn{number}", QueryAttention(width))
            self.add_module(f"norm{number}", nn.LayerNorm(width))
        for unused in (self.attn3, self.attn4, self.norm3, self.norm4):
            unused.requires_grad_(False)

    def forward(self, features_NPv: torch.Tensor) -> torch.Tensor:
        """Return one pooled token per tile: [N, P, v] -> [N, v]."""
        pooled_Nv = self.query_token.expand(len(features_NPv), -1)
        for attention, norm in ((self.attn1, self.norm1), *[(self.attn2, self.norm2)] * 3):
            pooled_Nv = norm(attention(pooled_Nv, features_NPv))
        return pooled_Nv


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
