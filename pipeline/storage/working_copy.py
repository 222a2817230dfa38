"""The copy of an object store's small files on this machine, and what is known of their versions there.

Used by pipeline/storage/object_store.py. A file is written there under the condition that nobody else has written
it since this process last read it.
"""

import json
import os
import threading
from collections import defaultdict
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.json_files import json_bytes, write_bytes
from pipeline.storage.bucket import Bucket, ConditionFailed, Listed
from pipeline.storage.folder import Conflict
from pipeline.storage.lease_file import Holder, read_lease
from stages.durable_files import locked
from stages.parts import LEASE_FILE
from vico.errors import UserError

PARTS_FILE = "parts.json"
BYTES_PREFIX = "parts/"
THREADS = 8
SEEN_FILE = ".seen.json"
"""In each folder of the working copy: name -> ETag of what was read from the store."""
_SHORT_FILES = (LEASE_FILE, PARTS_FILE, "record.json", "run.json", "attempt.json", "mlflow.json")


class WorkingCopy:
    """Files below `folder`, whose names are those of the objects; threads may share it."""

    def __init__(self, folder: Path, bucket: Bucket, copy_id: str):
        self.folder, self.bucket, self.copy_id = folder, bucket, copy_id
        self.etags: dict[str, str] = {}
        """Key -> ETag of what this process last read or wrote."""
        self._writing: dict[str, threading.Lock] = defaultdict(threading.Lock)
        """Key -> held by the thread that writes it."""

    def key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def refresh(self, folder: Path, *, anew: bool) -> None:
        """See all of a run's or stage's folder as it is there."""
        self._refresh_folder(folder, self.bucket.listed(f"{self.key(folder)}/"), deep=True, anew=anew)

    def refresh_all(self, prefixes: Iterable[str] | None = None) -> None:
        """See the short files, of all folders or of those below these prefixes."""
        if prefixes is None:
            prefixes = [prefix for prefix in self.bucket.folders() if prefix != BYTES_PREFIX]
            known = [path.parent for path in self.folder.glob(f"*/*/{SEEN_FILE}")]
        else:
            prefixes = list(prefixes)
            known = [
                path.parent for prefix in prefixes for path in self.folder.glob(f"{prefix}*/{SEEN_FILE}")
            ]
        by_folder: dict[Path, list[Listed]] = defaultdict(list)
        with ThreadPoolExecutor(THREADS) as pool:
            for one in (one for found in pool.map(self.bucket.listed, prefixes) for one in found):
                parts = one.key.split("/")
                if len(parts) > 2:
                    by_folder[self.folder / parts[0] / parts[1]].append(one)
            folders = {*by_folder, *known}
            list(pool.map(lambda one: self._refresh_folder(one, by_folder[one]), folders))

    def _refresh_folder(
        self, folder: Path, listed: list[Listed], *, deep: bool = False, anew: bool = False
    ) -> None:
        """Read what has changed. A driver that works in this copy has its folders newer than the store; they
        are its to refresh."""
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if self._is_of_another_driver(folder):
                return
            seen = {} if anew else _seen(folder)
            before = dict(seen)
            prefix = f"{self.key(folder)}/"
            names = {one.key.removeprefix(prefix): one.etag for one in listed}
            for name, etag in names.items():
                if not deep and name.rpartition("/")[2] not in _SHORT_FILES:
                    continue
                if seen.get(name) != etag or not (folder / name).exists():
                    self.refresh_file(folder / name)
                    seen[name] = self.etags.get(prefix + name, "")
                else:
                    self.etags[prefix + name] = etag
            for name in set(seen) - set(names):
                (folder / name).unlink(missing_ok=True)
                self.etags.pop(prefix + name, None)
                del seen[name]
            if deep:
                _drop_unshared_metrics(folder, names)
            if seen != before or anew:
                write_bytes(folder / SEEN_FILE, json_bytes(seen))

    def _is_of_another_driver(self, folder: Path) -> bool:
        """Whether a process other than this one works in the folder, in this copy of it: here, or on another
        machine that shares the copy, and is not seen to be dead and has not been taken over."""
        try:
            holder = read_lease(folder)
        except UserError:
            return False
        if holder is None or holder.released or holder.working_copy != self.copy_id:
            return False
        if holder.is_here():
            return not holder.is_dead() and holder.pid != os.getpid()
        there = self.bucket.get(self.key(folder / LEASE_FILE))
        try:
            return there is not None and Holder.model_validate_json(there[0]).token == holder.token
        except ValueError:
            return False

    def refresh_file(self, path: Path) -> None:
        key = self.key(path)
        with self._writing[key]:
            found = self.bucket.get(key)
            if found is None:
                path.unlink(missing_ok=True)
                self.etags.pop(key, None)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, found[0])
            self.etags[key] = found[1]

    def write(self, path: Path, content: Any) -> None:
        data, key = json_bytes(content), self.key(path)
        with self._writing[key]:
            try:
                self.etags[key] = self.bucket.put(key, data, etag=self.etags.get(key))
            except ConditionFailed as error:
                raise Conflict(str(error)) from error
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data)


def _drop_unshared_metrics(folder: Path, names: Container[str]) -> None:
    """Remove metrics of a driver that was killed here before they reached the store: nobody else went on
    from them, and whoever did go on has counted their steps again."""
    for path in folder.glob("attempts/*/*.jsonl"):
        if path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _seen(folder: Path) -> dict[str, str]:
    """What was read from the store; what cannot be read is read again."""
    try:
        return json.loads((folder / SEEN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
