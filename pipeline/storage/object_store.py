"""An object store (`storage: s3://bucket/prefix`) with a working copy on this machine.

The working copy (`work` in the site) has the files of a storage folder, and all code reads them there. Small
files (leases, runs, records, `parts.json`, logs, metrics) have the same names in the store. The bytes of
parts lie apart (pipeline/storage/stored_parts.py); they are fetched when a stage reads them, checked, and kept.

What two machines must not both write is written under a condition: that the object is not there yet
(If-None-Match), or still what this process last saw of it (If-Match). A store without that is refused.
"""

import hashlib
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.identity.file_digests import DigestCache
from pipeline.json_files import json_bytes, write_bytes
from pipeline.storage.bucket import Bucket, ConditionFailed
from pipeline.storage.folder import MARKER, FolderStorage, Sha256s
from pipeline.storage.lease import LeaseHeld, Leases
from pipeline.storage.output_files import move_aside, new_superseded
from pipeline.storage.stored_parts import StoredParts, place_of, read_parts
from pipeline.storage.working_copy import BYTES_PREFIX, PARTS_FILE, THREADS, WorkingCopy
from stages.parts import LEASE_FILE
from vico.errors import Unreachable, UserError

logger = logging.getLogger(__name__)
_NOT_SHIPPED = (LEASE_FILE, PARTS_FILE, "record.json", "run.json", "attempt.json", "lease.lock")
_ROUND_S = 1.0
_LOG_BYTES_PER_S = 8 << 20
"""A log goes up whole each time, so a large one goes less often."""
_CHOOSING_S = 120.0


class ObjectStorage(FolderStorage):
    """The object store whose working copy is `folder`. One for each process; threads may share it."""

    conditional = True

    def __init__(self, folder: Path, address: str, copy_id: str):
        self.folder, self.bucket, self.copy_id = folder, Bucket(address), copy_id
        self.copy = WorkingCopy(folder, self.bucket, copy_id)
        self._working: dict[Path, StoredParts] = {}
        self._faults: dict[Path, Exception] = {}
        self._shipped: dict[Path, tuple[int, int]] = {}
        self._shipped_at: dict[Path, float] = {}
        self._attended: set[Path] = set()
        """Folders of logs whose files reach the store through this process alone."""

    def key(self, path: Path) -> str:
        return self.copy.key(path)

    def _parts(self, folder: Path, sha256s: Sha256s) -> StoredParts:
        return StoredParts(self.copy, folder, sha256s, ship=self.ship)

    def place(self, path: Path) -> str:
        return place_of(self.copy, path)

    def check_writable(self) -> None:
        """Write under conditions that must fail; a store that lets them pass would let two drivers write."""
        marker = self.folder / MARKER
        known = json.loads(marker.read_text(encoding="utf-8"))
        if known.get("conditional"):
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
                    f"storage={self.bucket.address}: the store knows no conditional writes (If-None-Match, "
                    "If-Match), without which two drivers could both write; name one that does, or a folder"
                )
        finally:
            self.bucket.delete([key])
        write_bytes(marker, json_bytes({**known, "conditional": True}))

    def refresh(self, folder: Path | None = None, *, anew: bool = False) -> None:
        if folder is None:
            self.copy.refresh_all()
        else:
            self.copy.refresh(folder, anew=anew)

    def refresh_file(self, path: Path) -> None:
        self.copy.refresh_file(path)

    def write(self, path: Path, content: Any) -> None:
        self.copy.write(path, content)

    @contextmanager
    def choosing(self, runs: Path) -> Iterator[None]:
        try:
            lease = Leases(self).acquire(runs, "that chooses a run", wait_s=_CHOOSING_S)
        except LeaseHeld as held:
            raise UserError(str(held)) from held
        with lease:
            self.copy.refresh_all([f"{self.key(runs)}/"])
            yield

    @contextmanager
    def attending(self, folder: Path, logs: Path) -> Iterator[None]:
        self._attended.add(logs)
        stop = threading.Event()
        thread = threading.Thread(target=self._attend, args=(folder, logs, stop), name="storage", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _attend(self, folder: Path, logs: Path, stop: threading.Event) -> None:
        """Bring logs and parts to the store until told to stop, and once more then."""
        self._faults.pop(folder, None)
        while True:
            is_last = stop.wait(_ROUND_S)
            try:
                self.ship(logs, at_once=is_last)
                if folder in self._working:
                    self._working[folder].publish_new()
            except Unreachable as error:  # the stage goes on; when it ends, what is missing is tried again
                logger.warning("%s; goes on trying", error)
            except Exception as error:
                self._faults[folder] = error
                logger.exception("%s gets no more of this attempt", self.place(folder))
                return
            if is_last:
                return

    def shared_bytes(self, path: Path) -> float:
        if path.parent not in self._attended:
            return math.inf
        return self._shipped.get(path, (0, 0))[0]

    def check(self, folder: Path) -> None:
        if folder in self._faults:
            raise self._faults.pop(folder)

    def ship(self, logs: Path, *, at_once: bool = True) -> None:
        """Bring the files of a folder to the store that only its driver writes and that have changed; unless
        `at_once`, a large one waits until its turn."""
        for path in sorted(logs.iterdir() if logs.is_dir() else ()):
            if path.name in _NOT_SHIPPED or path.name.startswith(".") or not path.is_file():
                continue
            facts = path.stat()
            mark = facts.st_size, facts.st_mtime_ns
            waited_s = time.monotonic() - self._shipped_at.get(path, -math.inf)
            if self._shipped.get(path) == mark or not (
                at_once or waited_s * _LOG_BYTES_PER_S >= facts.st_size
            ):
                continue
            self.bucket.upload(self.key(path), path)
            self._shipped[path], self._shipped_at[path] = mark, time.monotonic()

    def is_believed(self, folder: Path) -> bool:
        record = (folder / "record.json").read_bytes()
        return read_parts(folder).record == hashlib.sha256(record).hexdigest()

    def begin(self, folder: Path, attempt: int) -> None:
        parts = self._parts(folder, DigestCache(self.folder).sha256s)
        parts.begin(attempt)
        self._working[folder] = parts

    def settle(self, folder: Path) -> None:
        self.check(folder)
        self._working[folder].settle()

    def commit(self, path: Path, content: Any) -> None:
        data = json_bytes(content)
        self._working[path.parent].commit(hashlib.sha256(data).hexdigest())
        self.copy.etags[self.key(path)] = self.bucket.put_anyway(self.key(path), data)
        write_bytes(path, data)
        del self._working[path.parent]

    def fetch(self, folder: Path, outputs: Mapping[str, Any], sha256s: Sha256s) -> Path | None:
        return self._parts(folder, sha256s).fetch(outputs, sha256s)

    def sizes(self, folder: Path) -> dict[str, int]:
        parts = self._parts(folder, list)
        there = {one.key: one.bytes for one in self.bucket.listed(f"{BYTES_PREFIX}{self.key(folder)}/")}
        keys = {name: parts.key(name, file.sha256) for name, file in read_parts(folder).files.items()}
        return {name: there[key] for name, key in keys.items() if key in there}

    def sha256s(self, folder: Path, names: Iterable[str]) -> list[str]:
        parts, files = self._parts(folder, list), read_parts(folder).files

        def one(name: str) -> str:
            return self.bucket.sha256(parts.key(name, files[name].sha256), files[name].bytes)

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(one, names))

    def set_aside(self, folder: Path, names: Iterable[str], damaged: Iterable[str] = ()) -> Path:
        """What lay there is not believed from the first write on; a kill in between leaves copies only."""
        names, damaged = list(names), list(damaged)
        aside = new_superseded(folder)
        working = self._working.get(folder) or self._parts(folder, list)
        working.set_aside(aside, None if "output" in names else damaged)
        for name in names:
            self._move(folder / name, aside / name)
        move_aside(folder, aside, names, damaged)
        return aside

    def _move(self, path: Path, target: Path) -> None:
        key = self.key(path)
        keys = [one.key for one in self.bucket.listed(key) if f"{one.key}/".startswith(f"{key}/")]
        for one in keys:
            self.bucket.copy(one, self.key(target) + one.removeprefix(key))
        self.bucket.delete(keys)
        for one in keys:
            self.copy.etags.pop(one, None)

    def size(self, path: Path) -> int:
        key = self.key(path)
        prefixes = [f"{key}/", f"{BYTES_PREFIX}{key}/"] if "superseded" not in key else [f"{key}/"]
        return sum(one.bytes for prefix in prefixes for one in self.bucket.listed(prefix))

    def garbage(self, stage_folders: Iterable[Path], given_up: Iterable[Path]) -> dict[str, int]:
        kept, given_up = {self.key(one) for one in stage_folders}, set(given_up)
        named: set[str] = set()
        for folder in map(self.folder.joinpath, kept):
            for one in {folder, *folder.glob("superseded/*")} - given_up:
                parts = self._parts(folder, list)
                named |= {parts.key(name, file.sha256) for name, file in read_parts(one).files.items()}
        found = {}
        for one in self.bucket.listed(BYTES_PREFIX):
            stage = "/".join(one.key.split("/")[1:3])
            if one.key not in named and (stage in kept or not (self.folder / stage).is_dir()):
                found[self.bucket.place(one.key)] = one.bytes
        return found

    def remove(self, path: Path | str, trash: Path) -> None:
        if isinstance(path, str):
            self.bucket.delete([path.removeprefix(f"{self.bucket.address}/")])
            return
        key = self.key(path)
        keys = [
            one.key for prefix in (f"{key}/", f"{BYTES_PREFIX}{key}/") for one in self.bucket.listed(prefix)
        ]
        self.bucket.delete(sorted(keys, key=lambda one: not one.endswith((PARTS_FILE, "run.json"))))
        if path.exists():
            super().remove(path, trash)


@lru_cache(maxsize=16)
def object_storage(folder: Path) -> ObjectStorage:
    """The object store of a working copy, which its marker names."""
    found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    return ObjectStorage(folder, found["address"], found.get("copy", ""))


def make_working_copy(folder: Path, address: str) -> None:
    """Say in a folder that it is the working copy of this object store."""
    marker = folder / MARKER
    if marker.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f".{MARKER}.{secrets.token_hex(8)}.tmp"
    write_bytes(mine, json_bytes({"address": address, "copy": secrets.token_hex(8)}))
    try:
        os.link(mine, marker)  # unlike a rename it leaves the marker of a command that was quicker
    except FileExistsError:
        pass
    finally:
        mine.unlink()
