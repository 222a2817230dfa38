"""ViCO's second stage, the router's training: cross entropy of its logits against the targets of tiles.

Vision tower, connectors and language model are frozen. Several routers, the candidates, train side by side on
the same vision features. Besides those they share the clipping of gradients, whose norm is over all of them.

Shapes: N tiles, S tile side in pixels, P vision tokens per tile, v vision width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vico.model.router import Router

IGNORED = -100
"""The label of a tile that enters no loss."""
FEATURE_DTYPE = torch.bfloat16
"""Routers train on vision features rounded to this dtype, whether they are read from files or computed."""


@dataclass(frozen=True)
class TargetTiles:
    """Tiles with the targets that routers learn.

    `tiles` holds pixels, uint8 [N, 3, S, S], or vision features, bfloat16 [N, P, v]. `targets_N` float32 is
    the wanted probability of keep, `weights_N` float32 the weight of each tile in the loss (0: none),
    `loss_weight` the sum of the weights. `labels_N` int64 is 0 (compress), 1 (keep) or -100 (not counted in
    the accuracy). Without any tiles, N is 1.
    """

    tiles: torch.Tensor
    targets_N: torch.Tensor
    weights_N: torch.Tensor
    labels_N: torch.Tensor
    loss_weight: float

    def to(self, device: torch.device | str) -> "TargetTiles":
        """Return a copy with all tensors on `device`."""
        moved = {
            name: getattr(self, name).to(device) for name in ("tiles", "targets_N", "weights_N", "labels_N")
        }
        return replace(self, **moved)


class RouterTask(nn.Module):
    """Averages the cross entropy of the candidates; only their parameters belong to the module."""

    def __init__(
        self,
        routers: Sequence[Router],
        vision_features: Callable[[torch.Tensor], torch.Tensor],
        token_dropout: float = 0.0,
    ):
        """`token_dropout` is the share of each tile's vision tokens that a training step leaves out."""
        super().__init__()
        self.routers = nn.ModuleList(routers)
        self.vision_features = vision_features
        self.token_dropout = token_dropout

    def forward(
        self, batch: TargetTiles, with_log_odds: bool = False
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """Return (loss sum in nats, averaged over the candidates; counts of labelled tiles).

        The counts are `labelled_tiles`, `correct` (averaged over the candidates) and `keep`; with
        `with_log_odds` also `log_odds_CN`, the log-odds of keep by each of C candidates.
        """
        features_NPv = self._features(batch.tiles)
        logits_CN2 = torch.stack([router(features_NPv).float() for router in self.routers])
        targets_N2 = torch.stack([1 - batch.targets_N, batch.targets_N], -1) * batch.weights_N[:, None]
        loss = -(F.log_softmax(logits_CN2, -1) * targets_N2).sum() / len(self.routers)
        labelled_N = batch.labels_N != IGNORED
        correct_CN = (logits_CN2.argmax(-1) == batch.labels_N) & labelled_N
        counts: dict[str, torch.Tensor | float] = {
            "labelled_tiles": labelled_N.sum().float(),
            "correct": correct_CN.sum() / len(self.routers),
            "keep": (batch.labels_N == 1).sum().float(),
        }
        if with_log_odds:
            counts["log_odds_CN"] = logits_CN2[..., 1] - logits_CN2[..., 0]
        return loss, counts

    @torch.no_grad()
    def _features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the features [N, P, v] of pixels or stored features, rounded to FEATURE_DTYPE, in the dtype
        of the routers."""
        if tiles.dtype == torch.uint8:
            tiles = self.vision_features(tiles)
        features_NPv = tiles.to(FEATURE_DTYPE).to(next(self.parameters()).dtype)
        if not (self.training and self.token_dropout):
            return features_NPv
        num_tiles, num_tokens, width = features_NPv.shape
        num_kept = max(round(num_tokens * (1 - self.token_dropout)), 1)
        order_NP = torch.rand(num_tiles, num_tokens, device=tiles.device).argsort(1)[:, :num_kept]
        return features_NPv.gather(1, order_NP[..., None].expand(-1, -1, width))


def soft_targets(ratios_N: np.ndarray, taus_N: np.ndarray, spread: float) -> np.ndarray:
    """Return the probability that a tile's ratio exceeds tau, float64 [N].

    It is logistic in log(ratio / tau) with the scale `spread`, in nats: a ratio says what one question made
    of the tile, and another question would have given another one.
    """
    distance_N = np.log(np.asarray(ratios_N, np.float64)) - np.log(np.asarray(taus_N, np.float64))
    return 1 / (1 + np.exp(-distance_N / spread))


def class_weights(num_compress: float, num_keep: float) -> tuple[float, float]:
    """Return the loss weights of (compress, keep) that give both classes the same total, with mean 1.

    Raises ValueError if a class has no tiles.
    """
    if not num_compress or not num_keep:
        raise ValueError("class weights need tiles of both labels")
    total = num_compress + num_keep
    return total / (2 * num_compress), total / (2 * num_keep)
