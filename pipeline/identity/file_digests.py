"""sha256 of files, cached until the file system (or the server of a remote file) reports a change."""

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_prep import remote_files
from data_prep.records.identity import file_sha256
from data_prep.remote_files import Location
from pipeline.json_files import SCHEMA, write_json

_THREADS = 4
_RACY_NS = 2_000_000_000
"""A file that changed this shortly before it was read may change again within the same tick of its clock."""


def file_sha256s(paths: Iterable[Path]) -> list[str]:
    """Return the digests of many files, read by several threads."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(file_sha256, paths))


class DigestCache:
    """sha256 of input files, kept in `<storage>/digests.json` so that planning does not read gigabytes
    again.

    Of each file the cache keeps four values that change with its content (real path: size, mtime, ctime,
    inode; remote address: size, version) and the digest.
    """

    def __init__(self, storage: Path):
        self.path = storage / "digests.json"
        self._cached = self._load(self.path)
        self._changed = False

    def sha256(self, path: Location) -> str:
        """Return the digest of a file, from the cache if the file has not changed since."""
        if isinstance(path, str):
            return self._remote_sha256(path)
        real = os.path.realpath(path)
        status = os.stat(real)
        version = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self._known(real, version)
        if known is not None:
            return known
        sha256 = self._read(Path(real))
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _RACY_NS:
            self._keep(real, version, sha256)
        return sha256

    def _known(self, key: str, version: list[Any]) -> str | None:
        cached = self._cached.get(key)
        return cached[-1] if cached is not None and cached[:-1] == version else None

    def _keep(self, key: str, version: list[Any], sha256: str) -> None:
        self._cached[key] = [*version, sha256]
        self._changed = True

    def _read(self, path: Path) -> str:
        return file_sha256(path)

    def _remote_sha256(self, address: str) -> str:
        version = [*remote_files.file_version(address), "remote", ""][:4]
        known = self._known(address, version)
        if known is not None:
            return known
        sha256 = file_sha256(address)
        names_version = len(remote_files.file_version(address)) == 2
        if names_version:  # else the server may change the file without a trace
            self._keep(address, version, sha256)
        return sha256

    def sha256s(self, paths: Iterable[Path]) -> list[str]:
        """Return the digests of many files; several threads read those that are not in the cache."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self.sha256, paths))

    def save(self) -> None:
        """Write new digests to the cache file, without files that no longer exist."""
        if self._changed:
            files = {
                path: values
                for path, values in list(self._cached.items())
                if "://" in path or os.path.exists(path)
            }
            write_json(self.path, {"schema": SCHEMA, "files": files})
            self._changed = False

    @staticmethod
    def _load(path: Path) -> dict[str, list[Any]]:
        """Return the cached values by path; nothing if the cache file cannot be read."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] == SCHEMA:
                return {path: values for path, values in content["files"].items() if len(values) == 5}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass
        return {}


class RemoteInput(Exception):
    """A digest of a remote file was asked for where only local ones are read."""


class LocalDigests(DigestCache):
    """The digests of a cache for local files only: a check may not wait for a server."""

    def __init__(self, cache: DigestCache):
        self._cache = cache

    def sha256(self, path: Location) -> str:
        if isinstance(path, str):
            raise RemoteInput(path)
        return self._cache.sha256(path)
