"""Shards of a remote folder (`s3://`, `gs://`, `hf://`) as local files, fetched when they are first read.

Used by `data_prep/shards/reader.py`. One cache folder serves all processes of a machine: files are named by their
digest, those used longest ago go first, and none goes while a process has it open.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from data_prep.remote_files import content, joined, mark, opened
from data_prep.shards.names import MANIFEST_FILE
from vico.errors import UserError

FOLDER_VARIABLE, BYTES_VARIABLE = "VICO_SHARD_CACHE", "VICO_SHARD_CACHE_BYTES"
_DEFAULT_BYTES = 100_000_000_000
_CHUNK_BYTES = 8 << 20
_FETCHES = 3
_PAUSE_S = 0.2
logger = logging.getLogger(__name__)


class WrongBytes(Exception):
    """A shard came with other bytes than its manifest says as often as it was fetched."""


class OpenFile:
    """A descriptor that closes itself; while it is open no process takes the file out of the cache."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close) -> None:
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class ShardCache:
    """The files of one remote shard folder."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self.folder = Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "vico" / "shards")
        self.limit = int(os.environ.get(BYTES_VARIABLE) or _DEFAULT_BYTES)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            manifest = json.loads(content(joined(self.address, MANIFEST_FILE)))
        except FileNotFoundError:
            raise UserError(
                f"{self.address} has no {MANIFEST_FILE}; give the output folder of a shard stage"
            ) from None
        self._facts = {one["name"]: (one["bytes"], one["sha256"]) for one in manifest["shards"]}

    def index(self, name: str) -> Path:
        """A local copy of the index, fetched anew where the remote one has another version."""
        place = joined(self.address, name)
        try:
            version = hashlib.sha256(json.dumps([place, *mark(place)]).encode()).hexdigest()[:16]
        except FileNotFoundError:
            raise UserError(f"{place} does not exist; copy the shard stage's whole output there") from None
        path = self.folder / f"{version}.{name}"
        if not path.exists():
            partial = self.folder / f".{path.name}.partial-{os.getpid()}"
            partial.write_bytes(content(place))
            partial.replace(path)
        return path

    def opened(self, name: str) -> OpenFile:
        """The shard as an open local file. Raises FileNotFoundError when the remote folder has none of this
        name, WrongBytes when other bytes than the manifest's come every time, Unreachable when the server
        fails.
        """
        if name not in self._facts:
            raise FileNotFoundError(name)
        num_bytes, sha256 = self._facts[name]
        path = self.folder / f"{sha256}.tar"
        while True:
            file = _opened_for_use(path)
            if file is not None:
                return file
            with _locked(self.folder / f"{sha256}.lock"):  # the others wait for the first
                if not path.exists():
                    self._fetch(name, num_bytes, sha256, path)

    def _fetch(self, name: str, num_bytes: int, sha256: str, path: Path) -> None:
        place = joined(self.address, name)
        partial = self.folder / f"{sha256}.partial"
        for attempt in range(_FETCHES):
            if attempt:
                logger.warning("%s came with other bytes than its manifest says, fetching it again", place)
                time.sleep(_PAUSE_S * attempt)
            self._make_room(num_bytes, partial)
            if _copied_sha256(place, partial) == sha256:
                os.chmod(partial, 0o444)
                with self._counting():
                    partial.replace(path)
                return
        with self._counting():
            partial.unlink()
        raise WrongBytes(f"it has other bytes than its manifest says ({_FETCHES} fetches)")

    def _make_room(self, num_bytes: int, partial: Path) -> None:
        """Take out what was used longest ago, and stands open nowhere, until `num_bytes` fit; then claim
        them.
        """
        with self._counting():
            files = {
                path: path.stat() for path in self.folder.iterdir() if path.suffix in (".tar", ".partial")
            }
            files.pop(partial, None)
            files = {path: found for path, found in files.items() if not _left_behind(path)}
            used = sum(found.st_size for found in files.values())
            for path in sorted(files, key=lambda one: files[one].st_mtime_ns):
                if used + num_bytes <= self.limit:
                    break
                if path.suffix == ".tar" and _removed(path):
                    used -= files[path].st_size
            if used + num_bytes > self.limit:
                raise UserError(
                    f"{BYTES_VARIABLE}={self.limit} leaves no room for a shard of {num_bytes} bytes beside "
                    f"{used} in use in {self.folder}; raise it, or write smaller shards"
                )
            with open(partial, "wb") as file:
                file.truncate(num_bytes)

    def _counting(self) -> AbstractContextManager[None]:
        """Held where files are counted and where they come, go or change their name: a file that is renamed
        while another process lists the folder would be missed by its sum, or be gone under its hands.
        """
        return _locked(self.folder / "cache.lock")


def _opened_for_use(path: Path) -> OpenFile | None:
    """The open file, marked as used now; None where it is not there (any more)."""
    try:
        file = OpenFile(path)
        fcntl.flock(file.descriptor, fcntl.LOCK_SH)
        if not os.fstat(file.descriptor).st_nlink:  # taken out in between
            return None
        os.utime(path)
    except FileNotFoundError:
        return None
    return file


def _removed(path: Path) -> bool:
    """Whether the file could be taken out: not while a process reads it."""
    file = OpenFile(path)
    try:
        fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    path.unlink()
    return True


def _left_behind(path: Path) -> bool:
    """Whether this is what a killed process had fetched of a shard; it is taken out then."""
    if path.suffix != ".partial":
        return False
    with open(path.with_suffix(".lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
    return True


def _copied_sha256(place: str, path: Path) -> str:
    """Writes over the bytes that were claimed: the file never looks smaller to another process's sum."""
    digest = hashlib.sha256()
    with opened(place) as source, open(path, "r+b") as target:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
        target.truncate()
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
