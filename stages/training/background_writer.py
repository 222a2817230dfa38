"""Write checkpoint files in a thread, from copies in host memory: training waits for the copy, not for the
disk.

Given to DeepSpeed as its checkpoint engine, which needs no base class, only these methods.
"""

import copy
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from stages.training.state_digests import FileDigest, HashingFile


class StateReader(Protocol):
    """The part of DeepSpeed's own checkpoint engine that still loads."""

    def load(self, path: str, map_location: Any = None) -> Any: ...


def host_copy(value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    """Return `value` with every tensor copied to host memory; tensors that shared a storage share its copy.

    `storages` holds the copies by the address of the original; pass an empty one.
    """
    if isinstance(value, torch.Tensor):
        source = value.detach().untyped_storage()
        if source.data_ptr() not in storages:
            storages[source.data_ptr()] = source.cpu() if value.is_cuda else source.clone()
        whole = torch.empty(0, dtype=value.dtype)
        layout = value.storage_offset(), value.size(), value.stride()
        return whole.set_(storages[source.data_ptr()], *layout)
    if isinstance(value, dict):
        return type(value)((key, host_copy(inner, storages)) for key, inner in value.items())
    if type(value) in (list, tuple):
        return type(value)(host_copy(inner, storages) for inner in value)
    return copy.deepcopy(value)


class BackgroundWriter:
    """Writes one file after another in one thread; `written` says whether all of them are on the disk."""

    name = "background"

    def __init__(self, reader: StateReader) -> None:
        self._reader = reader
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writes: list[Future[None]] = []
        self._digests: dict[str, FileDigest] = {}

    def save(self, state_dict: Any, path: str) -> None:
        """Copy the state and return; the file exists when `written` says so."""
        self._writes.append(self._pool.submit(self._write, host_copy(state_dict, {}), path))

    def _write(self, state: Any, path: str) -> None:
        with open(path, "wb") as file:
            hashing = HashingFile(file)
            torch.save(state, hashing)  # type: ignore[arg-type]  # needs write and flush only
            file.flush()
            os.fsync(file.fileno())
        self._digests[path] = hashing.digest()

    def pop_digests(self) -> dict[str, FileDigest]:
        """Return path -> digest of the files written since the last call."""
        digests, self._digests = self._digests, {}
        return digests

    def written(self) -> bool:
        """Return whether every file is on the disk; raise what its writing raised."""
        if not all(write.done() for write in self._writes):
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Wait for all files; raise what their writing raised."""
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
