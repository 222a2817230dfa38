"""Digests of files, remembered by what the file system says of them, and of the inputs from outside the
pipeline."""

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep import remote_files as storage
from data_prep.records.config import file_sha256
from data_prep.remote_files import Place
from pipeline.json_files import SCHEMA, write_json

_THREADS = 4
_RACY_NS = 2_000_000_000
"""A file changed this shortly before it was read may change again within one tick of its clock."""


def file_sha256s(paths: Iterable[Path]) -> list[str]:
    """The digests of many files, read by several threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(file_sha256, paths))


class DigestCache:
    """sha256 of input files, kept in `<storage>/digests.json` so that planning need not read gigabytes
    again."""

    def __init__(self, storage: Path):
        self.path = storage / "digests.json"
        self._known = self._load()
        self._changed = False

    def sha256(self, path: Place) -> str:
        """The file's digest, from the cache while real path, size, times and inode are what they were; of a
        remote file, its size and version."""
        if isinstance(path, str):
            return self._remote_sha256(path)
        real = os.path.realpath(path)
        before = os.stat(real)
        mark = [before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino]
        known = self._known.get(real)
        if known is not None and known[:-1] == mark:
            return known[-1]
        value = file_sha256(Path(real))
        if time.time_ns() - max(before.st_mtime_ns, before.st_ctime_ns) > _RACY_NS:
            self._known[real] = [*mark, value]
            self._changed = True
        return value

    def _remote_sha256(self, address: str) -> str:
        mark = [*storage.mark(address), "remote", ""][:4]
        known = self._known.get(address)
        if known is not None and known[:-1] == mark:
            return known[-1]
        value = file_sha256(address)
        if len(storage.mark(address)) == 2:  # a server that names no version may change the file unseen
            self._known[address] = [*mark, value]
            self._changed = True
        return value

    def sha256s(self, paths: Iterable[Path]) -> list[str]:
        """The digests of many files; those that are not known are read by several threads."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self.sha256, paths))

    def save(self) -> None:
        """Keep what was learned; files that are gone are forgotten."""
        if self._changed:
            files = {
                path: mark
                for path, mark in list(self._known.items())
                if "://" in path or os.path.exists(path)
            }
            write_json(self.path, {"schema": SCHEMA, "files": files})
            self._changed = False

    def _load(self) -> dict[str, list]:
        """What is remembered; a cache that cannot be read is no cache."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["schema"] == SCHEMA:
                return {path: mark for path, mark in content["files"].items() if len(mark) == 5}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass
        return {}
