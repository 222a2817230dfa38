"""ViCO's second stage, the router's training: cross entropy of its logits against the labels of tiles.

Vision tower, connectors and language model are frozen.

Shapes: N tiles, S tile side in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from vico.model.router import Router

IGNORED = -100
"""The label of a tile that enters no loss."""


@dataclass(frozen=True)
class LabelledTiles:
    """Tiles of some samples: `pixel_values` uint8 [N, 3, S, S] and `labels_N` int64.

    Labels are 0 (compress), 1 (keep) or -100 (none). `loss_weight` is the number of labelled tiles; without
    any tiles, N is 1 (a tile of zeros).
    """

    pixel_values: torch.Tensor
    labels_N: torch.Tensor
    loss_weight: float

    def to(self, device: torch.device | str) -> "LabelledTiles":
        """Return a copy with both tensors on `device`."""
        return replace(self, pixel_values=self.pixel_values.to(device), labels_N=self.labels_N.to(device))


class RouterTask(nn.Module):
    """Sums the cross entropy of labelled tiles; only the router's parameters belong to the module."""

    def __init__(self, router: Router, vision_features: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.router = router
        self.vision_features = vision_features

    def forward(self, tiles: LabelledTiles) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """Return (loss sum in nats, counts of tiles: labelled, correctly classified, labelled keep)."""
        with torch.no_grad():
            features_NPv = self.vision_features(tiles.pixel_values)
        logits_N2 = self.router(features_NPv)
        loss = F.cross_entropy(logits_N2.float(), tiles.labels_N, ignore_index=IGNORED, reduction="sum")
        labelled = tiles.labels_N != IGNORED
        counts: dict[str, torch.Tensor | float] = {
            "labelled_tiles": labelled.sum().float(),
            "correct": ((logits_N2.argmax(-1) == tiles.labels_N) & labelled).sum().float(),
            "keep": (tiles.labels_N == 1).sum().float(),
        }
        return loss, counts
