"""Checkpoint files written by a thread from copies in host memory: training waits for the copy, not for the
disk.

Given to DeepSpeed as its checkpoint engine (it needs no base class, only these methods).
"""

import copy
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


def host_copy(value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    """`value` with every tensor copied to host memory; tensors that shared a storage share its copy.

    `storages` keeps the copies by the address of the original; start with an empty one.
    """
    if isinstance(value, torch.Tensor):
        source = value.detach().untyped_storage()
        if source.data_ptr() not in storages:
            storages[source.data_ptr()] = source.cpu() if value.is_cuda else source.clone()
        whole = torch.empty(0, dtype=value.dtype)
        shape = value.storage_offset(), value.size(), value.stride()
        return whole.set_(storages[source.data_ptr()], *shape)
    if isinstance(value, Mapping):
        return type(value)((key, host_copy(one, storages)) for key, one in value.items())
    if type(value) in (list, tuple):
        return type(value)(host_copy(one, storages) for one in value)
    return copy.deepcopy(value)


class BackgroundWriter:
    """One file after another in one thread; `written` says when all that was asked for is on the disk."""

    name = "background"

    def __init__(self, reader: Any) -> None:
        """`reader` is DeepSpeed's own checkpoint engine: it goes on loading."""
        self._reader = reader
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writes: list[Future] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Copies the state and returns; the file is there when `written` says so."""
        self._writes.append(self._pool.submit(_write, host_copy(state_dict, {}), path))

    def written(self) -> bool:
        """Whether every file is on the disk; raises what its writing raised."""
        if not all(write.done() for write in self._writes):
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Waits for all files; raises what their writing raised."""
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    def load(self, path: str, map_location: Any = None) -> Any:
        return self._reader.load(path, map_location=map_location)

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True

    def cleanup(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _write(state: Any, path: str) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
