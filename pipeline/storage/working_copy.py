"""The copy of an object store's small files on this machine, and which versions of them it has.

Used by `object_store.py`. A file is written to the store only if nobody else wrote it since this process last
read it.
"""

import json
import os
import threading
from collections import defaultdict
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.metric_lines import METRIC_FILES
from pipeline.json_files import json_bytes, write_bytes
from pipeline.storage.bucket import Bucket, ConditionFailed, ListedObject
from pipeline.storage.folder import Conflict
from pipeline.storage.lease_file import Holder, read_lease
from stages.durable_files import locked
from stages.parts import LEASE_FILE
from vico.errors import UserError
from vico.own_files import check_inside, is_inside

PARTS_FILE = "parts.json"
BYTES_PREFIX = "parts/"
THREADS = 8
SEEN_FILE = ".seen.json"
"""In each folder of the working copy: file name -> ETag of the version that was read from the store."""
_SHORT_FILES = (LEASE_FILE, PARTS_FILE, "record.json", "run.json", "attempt.json", "mlflow.json")


class WorkingCopy:
    """Files below `folder`, whose paths in it are the keys of the objects; threads may share it."""

    def __init__(self, folder: Path, bucket: Bucket, copy_id: str):
        self.folder, self.bucket, self.copy_id = folder, bucket, copy_id
        self.etags: dict[str, str] = {}
        """Key -> ETag of the version that this process last read or wrote."""
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        """Key -> lock of the thread that reads or writes it."""

    def key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def refresh(self, folder: Path, *, full: bool) -> None:
        """Read the whole folder of a run or stage from the store; with `full`, unchanged files too."""
        self._refresh_folder(folder, self.bucket.listed(f"{self.key(folder)}/"), deep=True, full=full)

    def refresh_all(self, prefixes: Iterable[str] | None = None) -> None:
        """Read the short files of all folders, or of those below these prefixes."""
        if prefixes is None:
            prefixes = [prefix for prefix in self.bucket.folders() if prefix != BYTES_PREFIX]
            patterns = [f"*/*/{SEEN_FILE}"]
        else:
            prefixes = list(prefixes)
            patterns = [f"{prefix}*/{SEEN_FILE}" for prefix in prefixes]
        copied_folders = [path.parent for pattern in patterns for path in self.folder.glob(pattern)]
        by_folder: dict[Path, list[ListedObject]] = defaultdict(list)
        with ThreadPoolExecutor(THREADS) as pool:
            for listed in pool.map(self.bucket.listed, prefixes):
                for entry in listed:
                    parts = entry.key.split("/")
                    if len(parts) > 2:
                        by_folder[self.folder / parts[0] / parts[1]].append(entry)
            folders = {*by_folder, *copied_folders}
            list(pool.map(lambda folder: self._refresh_folder(folder, by_folder[folder]), folders))

    def _refresh_folder(
        self, folder: Path, listed: list[ListedObject], *, deep: bool = False, full: bool = False
    ) -> None:
        """Read changed files. Folders in which a driver works in this copy are newer than the store: only
        that driver refreshes them."""
        check_inside(folder, self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if self._is_of_another_driver(folder):
                return
            seen = {} if full else _seen_etags(folder)
            before = dict(seen)
            prefix = f"{self.key(folder)}/"
            etags = {entry.key.removeprefix(prefix): entry.etag for entry in listed}
            for name, etag in etags.items():
                if not deep and name.rpartition("/")[2] not in _SHORT_FILES:
                    continue
                if seen.get(name) != etag or not (folder / name).exists():
                    self.refresh_file(folder / name)
                    seen[name] = self.etags.get(prefix + name, "")
                else:
                    self.etags[prefix + name] = etag
            for name in set(seen) - set(etags):
                check_inside((folder / name).parent, self.folder)
                (folder / name).unlink(missing_ok=True)
                self.etags.pop(prefix + name, None)
                del seen[name]
            if deep:
                _remove_unshared_metrics(folder, etags)
            if seen != before or full:
                write_bytes(folder / SEEN_FILE, json_bytes(seen))

    def _is_of_another_driver(self, folder: Path) -> bool:
        """Return whether another process works in the folder in this copy of it.

        It may be on another machine that shares the copy; then the store says whether it was taken over.
        """
        try:
            holder = read_lease(folder)
        except UserError:
            return False
        if holder is None or holder.released or holder.working_copy != self.copy_id:
            return False
        if holder.is_here():
            return not holder.is_dead() and holder.pid != os.getpid()
        stored = self.bucket.get(self.key(folder / LEASE_FILE))
        try:
            return stored is not None and Holder.model_validate_json(stored[0]).token == holder.token
        except ValueError:
            return False

    def refresh_file(self, path: Path) -> None:
        """Read one file from the store; delete the copy if the store does not have it."""
        key = self.key(path)
        check_inside(path.parent, self.folder)
        with self._locks[key]:
            stored = self.bucket.get(key)
            if stored is None:
                path.unlink(missing_ok=True)
                self.etags.pop(key, None)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            data, etag = stored
            write_bytes(path, data)
            self.etags[key] = etag

    def write(self, path: Path, content: Any) -> None:
        """Write a JSON file to the store and to the copy; raise Conflict if the store has another version."""
        data, key = json_bytes(content), self.key(path)
        check_inside(path.parent, self.folder)
        with self._locks[key]:
            try:
                self.etags[key] = self.bucket.put(key, data, etag=self.etags.get(key))
            except ConditionFailed as error:
                raise Conflict(str(error)) from error
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, data)


def _remove_unshared_metrics(folder: Path, names: Container[str]) -> None:
    """Remove metrics that a driver killed on this machine did not upload: the driver that resumed without
    them has computed their steps again."""
    for path in folder.glob(f"attempts/*/{METRIC_FILES}"):
        if path.relative_to(folder).as_posix() not in names and is_inside(path.parent, folder):
            path.unlink()


def _seen_etags(folder: Path) -> dict[str, str]:
    """Return the content of SEEN_FILE; nothing if it cannot be read, so that all files are read again."""
    try:
        return json.loads((folder / SEEN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
