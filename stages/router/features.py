"""Vision features of the router's tiles, computed once and kept in files by shard while the stage works.

A file belongs to one vision tower, whose digest it holds; features of another tower are refused. If all files
together would exceed `train.memory.router_features_gb`, there are none and every step computes its features.

Shapes: N tiles, P vision tokens per tile, v vision width.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stages.parts import Parts
from vico.errors import UserError
from vico.objectives.router import FEATURE_DTYPE

FEATURES = "features"
BLANK_FILE = f"{FEATURES}/blank"
_ARRAY, _ABOUT = "features.npy", "about.json"
TileBatches = Iterator[torch.Tensor]
"""Features of the next tiles, [n, P, v] each, in order."""


def shard_file(shard: int) -> str:
    """Return the name of the part with the features of a shard's tiles."""
    return f"{FEATURES}/{shard:05d}"


def tower_digest(tower: nn.Module) -> str:
    """Return sha256 over the names, dtypes and values of a vision tower's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureFiles:
    """The feature files of a stage, which belong to one vision tower."""

    def __init__(self, parts: Parts, tower: str):
        """`tower` is the tower's digest."""
        self._parts, self._tower = parts, tower
        self._opened = lru_cache(maxsize=64)(self._open)

    def write(self, name: str, num_tiles: int, batches: Callable[[], TileBatches]) -> None:
        """Publish a file of `num_tiles` tiles unless it is published; `batches` computes them.

        Raises UserError if the file belongs to another tower.
        """
        if self._parts.done(name):
            self._check(self._parts.output / name)
            return
        partial = self._parts.partial(name)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        array: np.memmap | None = None
        start = 0
        for features_NPv in batches():
            bits = features_NPv.to(FEATURE_DTYPE).cpu().view(torch.uint16).numpy()
            if array is None:
                shape = (num_tiles, *bits.shape[1:])
                array = np.lib.format.open_memmap(partial / _ARRAY, "w+", np.uint16, shape)
            array[start : start + len(bits)] = bits
            start += len(bits)
        assert array is not None and start == num_tiles, f"{name}: {start} of {num_tiles} tiles"
        array.flush()
        (partial / _ABOUT).write_text(json.dumps({"tower": self._tower, "tiles": num_tiles}))
        self._parts.publish(name)

    def read(self, name: str, tiles: Sequence[int] | slice) -> torch.Tensor:
        """Return the features of some tiles of a file, bfloat16 [N, P, v]."""
        return torch.from_numpy(np.array(self._opened(name)[tiles])).view(FEATURE_DTYPE)

    def _open(self, name: str) -> np.ndarray:
        folder = self._parts.output / name
        self._check(folder)
        return np.load(folder / _ARRAY, mmap_mode="r")

    def _check(self, folder: Path) -> None:
        written_by = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))["tower"]
        if written_by != self._tower:
            raise UserError(
                f"{folder} has features of the vision tower {written_by[:12]}, but the policy has the tower "
                f"{self._tower[:12]}; remove {folder.parent}, and the features are computed again"
            )
