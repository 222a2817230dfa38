"""ViCO's second stage, the router's training: cross entropy of its logits against the targets of tiles.

Vision tower, connectors and language model are frozen. Several routers, the candidates, train side by side on
the same vision features; they share nothing else.

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
    the wanted probability of keep, `weights_N` float32 the weight of each tile in the loss (0: none).
    `labels_N` int64 is 0 (compress), 1 (keep) or -100 (not counted in the accuracy). `loss_weight` is the
    number of tiles with a weight; without any tiles, N is 1.
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

    def __init__(self, routers: Sequence[Router], vision_features: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.routers = nn.ModuleList(routers)
        self.vision_features = vision_features

    @torch.no_grad()
    def features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the features [N, P, v] of pixels or stored features, rounded to FEATURE_DTYPE, in the dtype
        of the routers."""
        if tiles.dtype == torch.uint8:
            tiles = self.vision_features(tiles)
        return tiles.to(FEATURE_DTYPE).to(next(self.parameters()).dtype)

    def logits(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the logits of every candidate, float32 [candidates, N, 2]."""
        features_NPv = self.features(tiles)
        return torch.stack([router(features_NPv).float() for router in self.routers])

    def forward(self, batch: TargetTiles) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """Return (loss sum in nats, averaged over the candidates; counts of tiles).

        The counts are `labelled_tiles`, `correct` (averaged over the candidates), `keep` and `weighted`.
        """
        logits_CN2 = self.logits(batch.tiles)
        log_p_CN2 = F.log_softmax(logits_CN2, -1)
        targets_N2 = torch.stack([1 - batch.targets_N, batch.targets_N], -1)
        loss = -(log_p_CN2 * targets_N2 * batch.weights_N[:, None]).sum() / len(self.routers)
        labelled = batch.labels_N != IGNORED
        correct_CN = (logits_CN2.argmax(-1) == batch.labels_N) & labelled
        counts: dict[str, torch.Tensor | float] = {
            "labelled_tiles": labelled.sum().float(),
            "correct": correct_CN.sum() / len(self.routers),
            "keep": (batch.labels_N == 1).sum().float(),
        }
        return loss, counts


def soft_targets(ratios_N: np.ndarray, taus_N: np.ndarray, spread: float) -> np.ndarray:
    """Return the probability that a tile's ratio exceeds tau, float64 [N].

    It is logistic in log(ratio / tau) with the scale `spread`, in nats: a ratio says what one question made
    of the tile, and another question would have given another one.
    """
    distance_N = np.log(np.asarray(ratios_N, np.float64)) - np.log(np.asarray(taus_N, np.float64))
    return 1 / (1 + np.exp(-distance_N / spread))


def class_weights(num_compress: int, num_keep: int) -> tuple[float, float]:
    """Return the loss weights of (compress, keep) that give both classes the same total, with mean 1.

    Raises ValueError if a class has no tiles.
    """
    if not num_compress or not num_keep:
        raise ValueError("class weights need tiles of both labels")
    total = num_compress + num_keep
    return total / (2 * num_compress), total / (2 * num_keep)
