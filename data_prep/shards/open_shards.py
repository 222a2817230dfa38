"""The open tars of a shard folder, local or remote; `data_prep/shards/reader.py` reads samples from them."""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from data_prep.remote_files import Location, joined
from data_prep.shards.cache import OpenFile, ShardCache, WrongBytes
from data_prep.shards.names import shard_name
from vico.errors import UserError

_NUM_OPEN = 64
_NUM_OPEN_REMOTE = 4  # each stays in the cache while it is open


class ShardMismatch(UserError):
    """A shard whose content differs from its index."""


class OpenShards:
    """The shards that were read last, kept open; safe to use from several threads.

    `index_row` is a row of the index with at least `shard` and `key`, which messages name.
    """

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._cache = ShardCache(folder) if isinstance(folder, str) else None
        self._num_open = _NUM_OPEN if self._cache is None else _NUM_OPEN_REMOTE
        self._shards: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def is_local(self) -> bool:
        return self._cache is None

    def read(self, index_row: dict[str, Any], offset: int, num_bytes: int) -> bytes:
        """Return bytes of a sample's shard. Raises ShardMismatch when the shard is missing or too short."""
        shard = self.file(index_row)  # a name of its own keeps it open until the bytes are read
        if offset < 0 or num_bytes < 0:
            raise self.mismatch(index_row, f"the index has {num_bytes} bytes at byte {offset}")
        missing = offset + num_bytes - os.fstat(shard.descriptor).st_size
        data = b"" if missing > 0 else os.pread(shard.descriptor, num_bytes, offset)
        if len(data) != num_bytes:
            missing = max(missing, num_bytes - len(data))
            raise self.mismatch(index_row, f"it ends {missing} bytes before the sample does")
        return data

    def file(self, index_row: dict[str, Any]) -> OpenFile:
        """Return the open shard of a sample; a file that is dropped here closes after its last reader."""
        number = index_row["shard"]
        with self._lock:
            if number in self._shards:
                self._shards.move_to_end(number)
                return self._shards[number]
        shard = self._opened(index_row)  # without the lock: other threads continue during a download
        with self._lock:
            self._shards[number] = shard
            self._shards.move_to_end(number)
            if len(self._shards) > self._num_open:
                self._shards.popitem(last=False)
            return shard

    def drop(self, number: int) -> None:
        """Forget an open shard, so that the next read opens it again."""
        with self._lock:
            self._shards.pop(number, None)

    def mismatch(self, index_row: dict[str, Any], problem: str) -> ShardMismatch:
        """Return the error that names shard, sample, problem and remedy."""
        path = joined(self.folder, shard_name(index_row["shard"]))
        remedy = "run again with --force shard" if self.is_local else "copy the shard there again"
        return ShardMismatch(f"{path} does not match its index at {index_row['key']}: {problem}; {remedy}")

    def _opened(self, index_row: dict[str, Any]) -> OpenFile:
        name = shard_name(index_row["shard"])
        try:
            return OpenFile(Path(self.folder) / name) if self._cache is None else self._cache.opened(name)
        except FileNotFoundError as error:
            raise self.mismatch(index_row, "the file is missing") from error
        except WrongBytes as error:
            raise self.mismatch(index_row, str(error)) from error
