"""An object store (`storage: s3://bucket/prefix`) with a working copy on this machine.

The working copy (`work` in the site) has the files of a storage folder, and all code reads them there.
Small files (leases, runs, records, `parts.json`, logs, metrics) have the same names in the store. The bytes
of parts are under keys of their own (`parts_file.py`); they are fetched when a stage reads them, checked,
and kept.

A file that two machines must not both write is written under a condition: the object does not exist yet
(If-None-Match), or is still what this process last read (If-Match). A store without conditions is refused.
"""

import hashlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.identity.file_digests import DigestCache
from pipeline.json_files import OutputFile, json_bytes, write_bytes, write_bytes_once
from pipeline.storage.bucket import Bucket, ConditionFailed
from pipeline.storage.folder import MARKER, UPLOAD_MARK, Conflict, FolderStorage, Sha256s
from pipeline.storage.leases import LeaseHeld, Leases
from pipeline.storage.log_uploads import LogUploads
from pipeline.storage.output_files import move_to_superseded, new_superseded_folder
from pipeline.storage.part_downloads import download_files
from pipeline.storage.parts_file import address_of, file_key, file_keys, read_parts
from pipeline.storage.stored_parts import StoredParts
from pipeline.storage.working_copy import BYTES_PREFIX, PARTS_FILE, THREADS, WorkingCopy
from stages.stops import LeaseLost
from vico.errors import Unreachable, UserError

logger = logging.getLogger(__name__)
_ROUND_S = 1.0
_LOCKED_RUNS_WAIT_S = 120.0
_UNFINISHED_AFTER = timedelta(days=1)
"""Age from which an upload in parts counts as left by a kill."""


class ObjectStorage(FolderStorage):
    """The object store whose working copy is `folder`. One per process; threads may share it."""

    conditional_writes = True

    def __init__(self, folder: Path, address: str, copy_id: str):
        self.folder, self.bucket, self.copy_id = folder, Bucket(address), copy_id
        self.copy = WorkingCopy(folder, self.bucket, copy_id)
        self.logs = LogUploads(self.copy)
        self._working: dict[Path, StoredParts] = {}
        """Stage folder -> its parts, while this process works on the stage."""
        self._faults: dict[Path, Exception] = {}

    def key(self, path: Path) -> str:
        return self.copy.key(path)

    def address(self, path: Path) -> str:
        return address_of(self.copy, path)

    def check_writable(self) -> None:
        """Raise UserError unless the store refuses writes whose condition fails: two drivers could both
        write."""
        marker = self.folder / MARKER
        content = json.loads(marker.read_text(encoding="utf-8"))
        if content.get("conditional"):
            return
        key = f"probe-{secrets.token_hex(8)}"
        self.bucket.put(key, b"1", etag=None)
        try:
            for data, etag in ((b"2", None), (b"3", '"00000000000000000000000000000000"')):
                try:
                    self.bucket.put(key, data, etag=etag)
                except ConditionFailed:
                    continue
                raise UserError(
                    f"storage={self.bucket.address}: the store does not support conditional writes "
                    "(If-None-Match, If-Match), without which two drivers could both write; name another "
                    "store or a folder"
                )
        finally:
            self.bucket.delete([key])
        write_bytes(marker, json_bytes({**content, "conditional": True}))

    def refresh(self, folder: Path | None = None, *, full: bool = False) -> None:
        if folder is None:
            self.copy.refresh_all()
        else:
            self.copy.refresh(folder, full=full)

    def refresh_file(self, path: Path) -> None:
        self.copy.refresh_file(path)

    def write(self, path: Path, content: Any) -> None:
        self.copy.write(path, content)

    @contextmanager
    def locked_runs(self, runs: Path) -> Iterator[None]:
        try:
            lease = Leases(self).acquire(runs, "that chooses a run", wait_s=_LOCKED_RUNS_WAIT_S)
        except LeaseHeld as held:
            raise UserError(str(held)) from held
        with lease:
            self.copy.refresh_all([f"{self.key(runs)}/"])
            yield

    @contextmanager
    def sharing(self, folder: Path, logs: Path) -> Iterator[None]:
        self.logs.attend(logs)
        stop = threading.Event()
        thread = threading.Thread(target=self._share, args=(folder, logs, stop), name="storage", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _share(self, folder: Path, logs: Path, stop: threading.Event) -> None:
        """Upload logs and parts every second until `stop` is set, and once more then."""
        self._faults.pop(folder, None)
        while True:
            is_last = stop.wait(_ROUND_S)
            try:
                self.logs.upload_changed(logs, at_once=is_last)
                if folder in self._working:
                    self._working[folder].publish_new()
            except Unreachable as error:  # the stage continues; the rest is uploaded at its end
                logger.warning("%s; the upload is retried", error)
            except Exception as error:
                self._faults[folder] = error
                logger.exception("%s gets no more of this attempt", self.address(folder))
                return
            if is_last:
                return

    def shared_bytes(self, path: Path) -> float:
        return self.logs.shared_bytes(path)

    def check_sharing(self, folder: Path) -> None:
        if folder in self._faults:
            raise self._faults.pop(folder)

    def is_committed(self, folder: Path) -> bool:
        record = (folder / "record.json").read_bytes()
        return read_parts(folder).record == hashlib.sha256(record).hexdigest()

    def begin(self, folder: Path, attempt: int) -> None:
        parts = self._parts(folder)
        parts.begin(attempt)
        self._working[folder] = parts

    def fence(self, folder: Path, attempt: int) -> None:
        self.refresh_file(folder / PARTS_FILE)
        if (folder / PARTS_FILE).exists():
            try:
                self._parts(folder).fence(attempt)
            except LeaseLost as lost:
                raise Conflict(str(lost)) from lost

    def _parts(self, folder: Path) -> StoredParts:
        return StoredParts(self.copy, folder, DigestCache(self.folder).sha256s, self.logs.upload_changed)

    def flush(self, folder: Path) -> None:
        self.check_sharing(folder)
        self._working[folder].flush()

    def commit(self, path: Path, content: Any) -> None:
        data = json_bytes(content)
        self._working[path.parent].commit(hashlib.sha256(data).hexdigest())
        self.copy.etags[self.key(path)] = self.bucket.overwrite(self.key(path), data)
        write_bytes(path, data)
        del self._working[path.parent]

    def fetch(self, folder: Path, outputs: Mapping[str, OutputFile], sha256s: Sha256s) -> Path | None:
        return download_files(self.copy, folder, outputs, sha256s)

    def sizes(self, folder: Path) -> dict[str, int]:
        stored = {
            entry.key: entry.bytes for entry in self.bucket.listed(f"{BYTES_PREFIX}{self.key(folder)}/")
        }
        files = read_parts(folder).files
        keys = {name: file_key(self.copy, folder, name, file) for name, file in files.items()}
        return {name: stored[key] for name, key in keys.items() if key in stored}

    def sha256s(self, folder: Path, names: Iterable[str]) -> list[str]:
        files = read_parts(folder).files

        def sha256(name: str) -> str:
            return self.bucket.sha256(file_key(self.copy, folder, name, files[name]), files[name].bytes)

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(sha256, names))

    def supersede(self, folder: Path, names: Iterable[str], damaged: Iterable[str] = ()) -> Path:
        """Do what `FolderStorage.supersede` does.

        From the first write on the earlier result does not count; a kill in between leaves only copies.
        """
        names, damaged = list(names), list(damaged)
        superseded = new_superseded_folder(folder)
        parts = self._working.get(folder) or self._parts(folder)
        parts.supersede(superseded, None if "output" in names else damaged)
        for name in names:
            self._move(folder / name, superseded / name)
        move_to_superseded(folder, superseded, names, damaged)
        return superseded

    def _move(self, path: Path, target: Path) -> None:
        key = self.key(path)
        keys = [entry.key for entry in self.bucket.listed(key) if f"{entry.key}/".startswith(f"{key}/")]
        for old_key in keys:
            self.bucket.copy(old_key, self.key(target) + old_key.removeprefix(key))
        self.bucket.delete(keys)
        for old_key in keys:
            self.copy.etags.pop(old_key, None)

    def size(self, path: Path) -> int:
        key = self.key(path)
        prefixes = [f"{key}/", f"{BYTES_PREFIX}{key}/"] if "superseded" not in key else [f"{key}/"]
        return sum(entry.bytes for prefix in prefixes for entry in self.bucket.listed(prefix))

    def garbage(self, stage_folders: Iterable[Path], unneeded: Iterable[Path]) -> dict[str, int]:
        kept_stages, excluded = {self.key(folder) for folder in stage_folders}, set(unneeded)
        listed: set[str] = set()
        for folder in map(self.folder.joinpath, kept_stages):
            lists = {folder, *folder.glob("superseded/*")} - excluded
            listed |= file_keys(self.copy, folder, map(read_parts, lists))
        garbage = {}
        for entry in self.bucket.listed(BYTES_PREFIX):
            stage = "/".join(entry.key.split("/")[1:3])
            if entry.key not in listed and (stage in kept_stages or not (self.folder / stage).is_dir()):
                garbage[self.bucket.address_of(entry.key)] = entry.bytes
        for upload_id, key in self.bucket.unfinished_uploads(BYTES_PREFIX, _UNFINISHED_AFTER).items():
            size = self.bucket.uploaded_bytes(key, upload_id)
            garbage[f"{self.bucket.address_of(key)}{UPLOAD_MARK}{upload_id}"] = size
        return garbage

    def remove(self, path: Path | str, trash: Path | None) -> None:
        if isinstance(path, str):
            key, _, upload_id = path.removeprefix(f"{self.bucket.address}/").partition(UPLOAD_MARK)
            if upload_id:
                self.bucket.abort_upload(key, upload_id)
            else:
                self.bucket.delete([key])
            return
        key = self.key(path)
        prefixes = (f"{key}/", f"{BYTES_PREFIX}{key}/")
        keys = [entry.key for prefix in prefixes for entry in self.bucket.listed(prefix)]
        self.bucket.delete(sorted(keys, key=lambda name: not name.endswith((PARTS_FILE, "run.json"))))
        if os.path.lexists(path):
            super().remove(path, trash)


@lru_cache(maxsize=16)
def object_storage(folder: Path) -> ObjectStorage:
    """Return the object store of a working copy, from the marker in it."""
    content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    return ObjectStorage(folder, content["address"], content.get("copy", ""))


def make_working_copy(folder: Path, address: str) -> None:
    """Write the marker that makes a folder the working copy of this object store, unless it has one."""
    marker = folder / MARKER
    if marker.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_once(marker, json_bytes({"address": address, "copy": secrets.token_hex(8)}))
