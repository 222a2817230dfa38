"""Digests of large inputs, remembered for all storages of a user, with progress while they are read.

A model of 60 GB takes minutes to read. `vico plan` writes nothing to the storage, and another `--storage` has
a cache of its own, so large files are also remembered in the user's cache folder.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.identity.file_digests import DigestCache
from pipeline.json_files import SCHEMA, write_json

logger = logging.getLogger(__name__)
LARGE_BYTES = 100 << 20
_CHUNK = 8 << 20
_NOTIFY_EVERY_S = 5.0


def user_cache_folder() -> Path:
    """Return the folder for what vico remembers of this user: `$XDG_CACHE_HOME/vico`, or `~/.cache/vico`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vico"


class InputDigests(DigestCache):
    """The digests of a pipeline's inputs. `notify` gets lines about large files while they are read."""

    def __init__(self, storage: Path, notify: Callable[[str], None] = lambda text: None):
        super().__init__(storage)
        self._notify = notify
        self._user_file = user_cache_folder() / "digests.json"
        self._remembered = self._load(self._user_file)
        self._new: dict[str, list[Any]] = {}

    def save(self) -> None:
        """Write the storage's cache and the user's."""
        super().save()
        self.remember()

    def remember(self) -> None:
        """Write the digests of large files that were read to the user's cache, beside those of others."""
        if not self._new:
            return
        try:
            self._user_file.parent.mkdir(parents=True, exist_ok=True)
            files = {**self._load(self._user_file), **self._new}
            kept = {path: values for path, values in files.items() if os.path.exists(path)}
            write_json(self._user_file, {"schema": SCHEMA, "files": kept})
            self._new = {}
        except OSError as error:
            logger.info("digests are not remembered in %s: %s", self._user_file, error)

    def _known(self, key: str, version: list[Any]) -> str | None:
        known = super()._known(key, version)
        if known is None and self._remembered.get(key, [])[:-1] == version:
            known = self._remembered[key][-1]
            super()._keep(key, version, known)
        return known

    def _keep(self, key: str, version: list[Any], sha256: str) -> None:
        super()._keep(key, version, sha256)
        if "://" not in key and version[0] >= LARGE_BYTES:
            self._new[key] = [*version, sha256]

    def _read(self, path: Path) -> str:
        size = path.stat().st_size
        if size < LARGE_BYTES:
            return super()._read(path)
        self._notify(f"reading {path.name}, {size / 1e9:.1f} GB, for its digest; once, it is remembered")
        digest, done, last_s = hashlib.sha256(), 0, time.monotonic()
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                if time.monotonic() - last_s >= _NOTIFY_EVERY_S:
                    last_s = time.monotonic()
                    self._notify(f"{path.name}: {done / 1e9:.1f} of {size / 1e9:.1f} GB read")
        return digest.hexdigest()


class UnreadInputs(DigestCache):
    """Stands in for the digests while inputs are only checked: files must exist, and are not read."""

    def sha256(self, path: Path | str) -> str:
        if isinstance(path, Path):
            os.stat(path)
        return ""
