"""Shards of a remote folder (`s3://`, `gs://`, `hf://`) as local files, downloaded when they are first read.

`data_prep/shards/open_shards.py` uses it. All processes of a machine share one cache folder. Its files are
named by digest; the least recently used are removed first, and none while a process has it open.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from data_prep.environment import number_in_environment
from data_prep.remote_files import content, file_version, open_file
from data_prep.shards.names import MANIFEST_FILE
from vico.errors import UserError
from vico.own_files import no_links

FOLDER_VARIABLE, BYTES_VARIABLE = "VICO_SHARD_CACHE", "VICO_SHARD_CACHE_BYTES"
_DEFAULT_BYTES = 100_000_000_000
_CHUNK_BYTES = 8 << 20
_DOWNLOADS = 3
_PAUSE_S = 0.2
logger = logging.getLogger(__name__)


class WrongBytes(Exception):
    """A shard whose bytes differed from its manifest after every download."""


class OpenFile:
    """A file descriptor that closes itself; while it is open no process removes the file from the cache."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    # os.close as a default: at exit the module's globals may be gone before the last file is
    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class ShardCache:
    """The files of one remote shard folder."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.folder = Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "vico" / "shards")
        self.limit = int(number_in_environment(BYTES_VARIABLE, _DEFAULT_BYTES))
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            manifest = json.loads(content(f"{self.address}/{MANIFEST_FILE}"))
        except FileNotFoundError:
            raise UserError(
                f"{self.address} has no {MANIFEST_FILE}; give the output folder of a shard stage"
            ) from None
        self._shards: dict[str, tuple[int, str]] = {
            shard["name"]: (shard["bytes"], shard["sha256"]) for shard in manifest["shards"]
        }

    def index(self, name: str) -> Path:
        """Return a local copy of the index, downloaded again when the remote file has another version."""
        address = f"{self.address}/{name}"
        try:
            version = file_version(address)
        except FileNotFoundError:
            raise UserError(
                f"{address} does not exist; copy the shard stage's complete output there"
            ) from None
        digest = hashlib.sha256(json.dumps([address, *version]).encode()).hexdigest()[:16]
        path = self.folder / f"{digest}.{name}"
        if not path.exists():
            partial = self.folder / f".{path.name}.partial-{os.getpid()}"
            partial.write_bytes(content(address))
            partial.replace(path)
        return path

    def opened(self, name: str) -> OpenFile:
        """Return the shard as an open local file.

        Raises FileNotFoundError when the manifest has no shard of this name, WrongBytes when the bytes differ
        from the manifest after every download, Unreachable when the server fails.
        """
        if name not in self._shards:
            raise FileNotFoundError(name)
        num_bytes, sha256 = self._shards[name]
        path = self.folder / f"{sha256}.tar"
        while True:
            file = _opened_for_use(path)
            if file is not None:
                return file
            with _locked(self.folder / f"{sha256}.lock"):  # the others wait for the first
                if not path.exists():
                    self._download(name, num_bytes, sha256, path)

    def _download(self, name: str, num_bytes: int, sha256: str, path: Path) -> None:
        address = f"{self.address}/{name}"
        partial = self.folder / f"{sha256}.partial"
        for attempt in range(_DOWNLOADS):
            if attempt:
                logger.warning("%s differs from its manifest, downloading it again", address)
                time.sleep(_PAUSE_S * attempt)
            self._make_room(num_bytes, partial)
            if _copied_sha256(address, partial) == sha256:
                os.chmod(partial, 0o444)
                with self._counting():
                    partial.replace(path)
                return
        with self._counting():
            partial.unlink()
        raise WrongBytes(f"its bytes differ from its manifest ({_DOWNLOADS} downloads)")

    def _make_room(self, num_bytes: int, partial: Path) -> None:
        """Remove the least recently used files that are not open until `num_bytes` fit, then claim them."""
        with self._counting():
            files = {
                path: path.stat() for path in self.folder.iterdir() if path.suffix in (".tar", ".partial")
            }
            files.pop(partial, None)
            files = {path: status for path, status in files.items() if not _removed_leftover(path)}
            used = sum(status.st_size for status in files.values())
            for path in sorted(files, key=lambda path: files[path].st_mtime_ns):
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
        """Return the lock for counting files and for adding, removing and renaming them.

        Without it a process that lists the folder could miss a file that is being renamed, or find it gone.
        """
        return _locked(self.folder / "cache.lock")


def _opened_for_use(path: Path) -> OpenFile | None:
    """Return the open file, marked as used now, or None when it is not there."""
    try:
        file = OpenFile(path)
        fcntl.flock(file.descriptor, fcntl.LOCK_SH)
        if not os.fstat(file.descriptor).st_nlink:  # removed in between
            return None
        os.utime(path)
    except FileNotFoundError:
        return None
    return file


def _removed(path: Path) -> bool:
    """Remove the file unless a process reads it; return whether it was removed."""
    file = OpenFile(path)
    try:
        fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    path.unlink()
    return True


def _removed_leftover(path: Path) -> bool:
    """Remove the partial download of a killed process; return whether this file was one."""
    if path.suffix != ".partial":
        return False
    with open(path.with_suffix(".lock"), "a", opener=no_links) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
    return True


def _copied_sha256(address: str, path: Path) -> str:
    """Copy a remote file over the claimed bytes, so that the size stays as claimed, and return its sha256."""
    digest = hashlib.sha256()
    with open_file(address) as source, open(path, "r+b") as target:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
        target.truncate()
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "a", opener=no_links) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
