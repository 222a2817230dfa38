"""Files of kept values, by shard, beside a stage's output while it works.

They are not output: they are computed again if they are missing. A file belongs to one maker, such as a
vision tower, whose digest it holds; values of another maker are refused.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from stages.durable_files import sync_folder, sync_tree
from stages.training.kept.folders import ARRAY_FILE, PARTIAL
from vico.errors import UserError

logger = logging.getLogger(__name__)
_ABOUT = "about.json"
Batches = Iterator[torch.Tensor]
"""The next values, [n, ...] each, in order."""


def tensors_digest(module: nn.Module) -> str:
    """Return sha256 over the names, dtypes and values of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class KeptFiles:
    """The files in a folder, which belong to one maker; each is a folder with an array."""

    def __init__(self, folder: Path, maker: str, dtype: torch.dtype):
        """`maker` is the digest of what computes the values; they are stored in `dtype`."""
        self.dtype = dtype
        self._folder, self._maker = folder, maker
        self._opened = lru_cache(maxsize=64)(self._open)

    def has(self, name: str) -> bool:
        """Return whether a file is complete; raise UserError if it belongs to another maker."""
        target = self._folder / name
        if not target.exists():
            return False
        self._check(target)
        return True

    def write(self, name: str, num_values: int, batches: Callable[[], Batches]) -> None:
        """Write a file of `num_values` values unless it is complete; `batches` computes them.

        Raises UserError if the file belongs to another maker.
        """
        if self.has(name):
            return
        target = self._folder / name
        partial = self._folder / f".{name}{PARTIAL}{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        array: np.memmap | None = None
        start = 0
        for batch in batches():
            values = self._stored(batch)
            if array is None:
                shape = (num_values, *values.shape[1:])
                array = np.lib.format.open_memmap(partial / ARRAY_FILE, "w+", values.dtype, shape)
            array[start : start + len(values)] = values
            start += len(values)
        assert array is not None and start == num_values, f"{name}: {start} of {num_values} values"
        array.flush()
        (partial / _ABOUT).write_text(json.dumps({"maker": self._maker, "values": num_values}))
        sync_tree(partial)
        os.rename(partial, target)
        sync_folder(self._folder)
        logger.info("kept %d values of what a frozen part computes in %s", num_values, target)

    def read(self, name: str, values: Sequence[int] | slice) -> torch.Tensor:
        """Return some values of a file, [n, ...] in the dtype of the files."""
        return torch.from_numpy(np.array(self._opened(name)[values])).view(self.dtype)

    def _stored(self, values: torch.Tensor) -> np.ndarray:
        values = values.to(self.dtype).cpu().contiguous()
        if self.dtype == torch.bfloat16:
            values = values.view(torch.uint16)  # numpy has no bfloat16
        return values.numpy()

    def _open(self, name: str) -> np.ndarray:
        self._check(self._folder / name)
        return np.load(self._folder / name / ARRAY_FILE, mmap_mode="r")

    def _check(self, file: Path) -> None:
        maker = json.loads((file / _ABOUT).read_text(encoding="utf-8"))["maker"]
        if maker != self._maker:
            raise UserError(
                f"{file} was computed with weights of the digest {maker[:12]}, but this training has "
                f"{self._maker[:12]}; remove {self._folder}, and it is computed again"
            )
