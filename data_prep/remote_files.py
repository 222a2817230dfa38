"""Files that records name, on this machine or behind `s3://`, `gs://`, `hf://` (fsspec): found, listed, read.

A remote read is tried again, with growing pauses, while the server fails or a body stops early; lengths are
checked. Then comes one Unreachable with the address. Local places are Path, remote ones text.
"""

import fnmatch
import io
import os
import posixpath
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from vico.errors import Unreachable, UserError

Place = Path | str
Found = TypeVar("Found")
SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
PATIENCE_VARIABLE = "VICO_REMOTE_PATIENCE_S"
_PATIENCE_S = 60.0
_FIRST_PAUSE_S, _PAUSE_GROWTH, _LONGEST_PAUSE_S = 0.1, 1.5, 5.0
_WINDOW_BYTES = 8 << 20
_NOT_TRANSIENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_NO_RIGHTS = ("NoCredentialsError", "PartialCredentialsError", "RepositoryNotFoundError", "GatedRepoError")
_GLOB_CHARACTERS = "*?["


def is_remote(place: Place) -> bool:
    return isinstance(place, str) and place.partition("://")[0] in SCHEMES and "://" in place


def as_place(text: str) -> Place:
    """The text as a remote address, or as a local path; UserError for a scheme that is not read."""
    scheme, separator, _ = text.partition("://")
    if not separator:
        return Path(text)
    if scheme not in SCHEMES:
        raise UserError(f"path={text}: {scheme}:// is not read; use a local path, s3://, gs:// or hf://")
    return text


def joined(folder: Place, name: str) -> Place:
    """The place `name` below a folder; an absolute path or address stays as it is."""
    if "://" in name:
        return as_place(name)
    if is_remote(folder) and not name.startswith("/"):
        scheme, _, rest = str(folder).partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(rest, name))}"
    return Path(folder) / name if not is_remote(folder) else Path(name)


def parent(place: Place) -> Place:
    return place.rpartition("/")[0] if isinstance(place, str) else place.resolve().parent


def name_of(place: Place) -> str:
    return place.rpartition("/")[2] if isinstance(place, str) else place.name


def is_file(place: Place) -> bool:
    if isinstance(place, Path):
        return place.is_file()
    try:
        return _info(place)["type"] == "file"
    except FileNotFoundError:
        return False


def is_folder(place: Place) -> bool:
    """Whether a folder is there; an object store has one where some object lies below it."""
    if isinstance(place, Path):
        return place.is_dir()
    try:
        return _info(place)["type"] == "directory"
    except FileNotFoundError:
        return False


def opened(place: Place) -> BinaryIO:
    """The file for reading, with seek; a remote one is read in windows of 8 MiB."""
    if isinstance(place, Path):
        return open(place, "rb", buffering=io.DEFAULT_BUFFER_SIZE * 64)
    return io.BufferedReader(_RemoteFile(place), _WINDOW_BYTES)


def content(place: Place) -> bytes:
    """All bytes of a file, as many as the server says it has."""
    if isinstance(place, Path):
        return place.read_bytes()
    info = _info(place)
    if info["type"] != "file":
        raise IsADirectoryError(place)
    return _range(place, 0, info["size"])


def mark(place: str) -> list[Any]:
    """What a remote file can be known again by without reading it: size, then tag or time of its version."""
    # the Hub's file system tells a file's blob only when it is asked for all
    info = _info(place, **({"expand_info": True} if place.startswith("hf://") else {}))
    names = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "updated", "last_commit")
    return [info["size"], *(str(info.get(name)) for name in names if info.get(name))][:2]


def matching_files(pattern: Place, suffix: str) -> list[Place]:
    """The files that a path names: itself, those of a folder that end in `suffix`, or those of a pattern with
    `*`, `?` or `[..]` in its last part; sorted by name. UserError when there are none.
    """
    if any(letter in name_of(pattern) for letter in _GLOB_CHARACTERS):
        folder, wanted = (
            (parent(pattern), name_of(pattern))
            if isinstance(pattern, str)
            else (pattern.parent, pattern.name)
        )
    elif is_file(pattern):
        return [pattern]
    else:
        folder, wanted = pattern, f"*{suffix}"
    names = [name for name in _names(folder) if fnmatch.fnmatchcase(name, wanted)]
    if not names:
        raise UserError(f"records path={pattern} names no file ({wanted} in {folder}); mend the path")
    return [joined(folder, name) for name in sorted(names)]


def _names(folder: Place) -> list[str]:
    if isinstance(folder, Path):
        return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    try:
        entries = patiently(lambda: _filesystem(folder).ls(folder, detail=True, refresh=True), folder)
    except FileNotFoundError:
        return []
    return [name_of(entry["name"]) for entry in entries if entry["type"] == "file"]


class _RemoteFile(io.RawIOBase):
    """A remote file that is read by ranges, each of them retried and checked."""

    def __init__(self, place: str):
        self._place, self._at = place, 0
        self._size = _info(place)["size"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        data = _range(self._place, self._at, self._at + wanted)
        buffer[:wanted] = data
        self._at += wanted
        return wanted


def _info(place: str, **asked: Any) -> dict[str, Any]:
    return patiently(lambda: _filesystem(place).info(place, refresh=True, **asked), place)


def _range(place: str, start: int, end: int) -> bytes:
    def once() -> bytes:
        data = _filesystem(place).cat_file(place, start=start, end=end) if end > start else b""
        if len(data) != end - start:
            raise OSError(f"the body has {len(data)} of {end - start} bytes")
        return data

    return patiently(once, place)


def patiently(action: Callable[[], Found], place: str, verb: str = "read") -> Found:
    """The action's result; tried again while the server fails, for as long as VICO_REMOTE_PATIENCE_S says.

    `verb` says in messages what could not be done with the place.
    """
    patience_s = float(os.environ.get(PATIENCE_VARIABLE, _PATIENCE_S))
    deadline, pause_s, tries = time.monotonic() + patience_s, _FIRST_PAUSE_S, 1
    while True:
        try:
            return action()
        except _NOT_TRANSIENT as error:
            if isinstance(error, PermissionError):
                raise UserError(
                    f"{place} may not be {verb} ({_line(error)}); mend the credentials"
                ) from error
            if type(error.__cause__).__name__ in _NO_RIGHTS:  # private looks like missing, and so every file
                raise UserError(
                    f"{place} may not be {verb}, or there is no such repository ({_line(error)}); give "
                    "credentials, or mend its name"
                ) from error
            raise
        except UserError:
            raise
        except Exception as error:  # each library has its own: of the server, the connection, the body
            if type(error).__name__ in _NO_RIGHTS:
                raise UserError(f"{place} may not be {verb} ({_line(error)}); give credentials") from error
            if time.monotonic() + pause_s > deadline:
                raise Unreachable(
                    f"{place} could not be {verb} in {tries} tries over {patience_s:.0f} s "
                    f"({_line(error)}); nothing is lost, give the same command again later"
                ) from error
        time.sleep(pause_s)
        pause_s, tries = min(pause_s * _PAUSE_GROWTH, _LONGEST_PAUSE_S), tries + 1


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _filesystem(place: str) -> Any:
    return _filesystem_of(place.partition("://")[0], os.getpid())


@lru_cache(maxsize=8)
def _filesystem_of(scheme: str, process: int) -> Any:
    """The fsspec file system of a scheme, anew in each process. Its own retries are off: ours are counted.

    fsspec would hand out one instance to all of a process, whatever endpoint the environment names by then.
    """
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": 10,
            "read_timeout": 60,
        }
    try:
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = SCHEMES[scheme]
        raise UserError(
            f"{scheme}:// needs the package {package}; install it: pip install {package}"
        ) from error
    if scheme == "s3":
        filesystem.retries = 1
    return filesystem
