"""Router training as one small module: labels of tiles against the router's logits, all else frozen."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from vico.model.router import Router

IGNORED = -100


@dataclass(frozen=True)
class LabelledTiles:
    """Tiles of some samples: `pixel_values` float32 [N, 3, S, S] and `labels_N` int64, 0 compress, 1 keep,
    -100 none.

    `loss_weight` is the number of labelled tiles; without any, N is 1 (a zero tile).
    """

    pixel_values: torch.Tensor
    labels_N: torch.Tensor
    loss_weight: float

    def to(self, device: torch.device | str) -> "LabelledTiles":
        return replace(self, pixel_values=self.pixel_values.to(device), labels_N=self.labels_N.to(device))


class RouterTask(nn.Module):
    """`forward(tiles)` gives the summed cross entropy of labelled tiles; only the router's parameters are its
    own."""

    def __init__(self, router: Router, vision_features):
        super().__init__()
        self.router = router
        self._vision_features = vision_features

    def forward(self, tiles: LabelledTiles) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """(loss sum in nats, counts: labelled tiles, correct ones, those labelled keep)."""
        with torch.no_grad():
            features_NPv = self._vision_features(tiles.pixel_values)
        logits_N2 = self.router(features_NPv)
        loss = F.cross_entropy(logits_N2.float(), tiles.labels_N, ignore_index=IGNORED, reduction="sum")
        labelled = tiles.labels_N != IGNORED
        counts = {
            "labelled_tiles": labelled.sum().float(),
            "correct": ((logits_N2.argmax(-1) == tiles.labels_N) & labelled).sum().float(),
            "keep": (tiles.labels_N == 1).sum().float(),
        }
        return loss, counts
