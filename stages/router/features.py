"""Vision features of the router's tiles, computed once and kept in files by shard while the stage works.

They are beside the stage's output, not in it: they are computed again if they are missing. A file belongs to
one vision tower, whose digest it holds; features of another tower are refused. If all files together would
exceed `train.memory.router_features_gb`, there are none and every step computes its features.

Shapes: N tiles, P vision tokens per tile, v vision width.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stages.durable_files import sync_folder, sync_tree
from stages.parts import Parts
from vico.errors import UserError
from vico.objectives.router import FEATURE_DTYPE

BLANK_FILE = "blank"
_ARRAY, _ABOUT = "features.npy", "about.json"
TileBatches = Iterator[torch.Tensor]
"""Features of the next tiles, [n, P, v] each, in order."""


def features_folder(parts: Parts) -> Path:
    """Return the folder of a stage's feature files."""
    return parts.folder / "features"


def shard_file(shard: int) -> str:
    """Return the name of the file with the features of a shard's tiles."""
    return f"{shard:05d}"


def tower_digest(tower: nn.Module) -> str:
    """Return sha256 over the names, dtypes and values of a vision tower's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FeatureFiles:
    """The feature files in a folder, which belong to one vision tower; each is a folder with an array."""

    def __init__(self, folder: Path, tower: str):
        """`tower` is the tower's digest."""
        self._folder, self._tower = folder, tower
        self._opened = lru_cache(maxsize=64)(self._open)

    def write(self, name: str, num_tiles: int, batches: Callable[[], TileBatches]) -> None:
        """Write a file of `num_tiles` tiles unless it is complete; `batches` computes them.

        Raises UserError if the file belongs to another tower.
        """
        target = self._folder / name
        if target.exists():
            self._check(target)
            return
        partial = self._folder / f".{name}.partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
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
        sync_tree(partial)
        os.rename(partial, target)
        sync_folder(self._folder)

    def read(self, name: str, tiles: Sequence[int] | slice) -> torch.Tensor:
        """Return the features of some tiles of a file, bfloat16 [N, P, v]."""
        return torch.from_numpy(np.array(self._opened(name)[tiles])).view(FEATURE_DTYPE)

    def _open(self, name: str) -> np.ndarray:
        self._check(self._folder / name)
        return np.load(self._folder / name / _ARRAY, mmap_mode="r")

    def _check(self, file: Path) -> None:
        written_by = json.loads((file / _ABOUT).read_text(encoding="utf-8"))["tower"]
        if written_by != self._tower:
            raise UserError(
                f"{file} has features of the vision tower {written_by[:12]}, but the policy has the tower "
                f"{self._tower[:12]}; remove {self._folder}, and the features are computed again"
            )
