"""Find, list and read files on this machine or behind `s3://`, `gs://`, `hf://` (fsspec).

A remote read is retried, with growing pauses, while the server fails or a body ends early; the length of
every body is checked. When the time for retries is over, Unreachable is raised and names the address. A local
location is a Path, a remote one is a string.
"""

import errno
import fnmatch
import io
import os
import posixpath
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from data_prep.environment import number_in_environment
from vico.errors import Unreachable, UserError, missing_package, one_line

Location = Path | str
Result = TypeVar("Result")
SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
PATIENCE_VARIABLE = "VICO_REMOTE_PATIENCE_S"
_PATIENCE_S = 60.0
_FIRST_PAUSE_S, _PAUSE_GROWTH, _LONGEST_PAUSE_S = 0.1, 1.5, 5.0
_WINDOW_BYTES = 8 << 20
_NOT_TRANSIENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_NO_ACCESS = ("NoCredentialsError", "PartialCredentialsError", "RepositoryNotFoundError", "GatedRepoError")
_GLOB_CHARACTERS = "*?["
_COMPRESSED_ENDS = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lzma", ".lz4", ".br", ".zip", ".7z", ".rar")


def is_remote(location: Location) -> bool:
    return isinstance(location, str) and location.partition("://")[0] in SCHEMES and "://" in location


def as_location(text: str) -> Location:
    """Return a remote address unchanged and anything else as a local Path.

    Raises UserError for a scheme that cannot be read.
    """
    scheme, separator, _ = text.partition("://")
    if not separator:
        return Path(text)
    if scheme not in SCHEMES:
        raise UserError(f"path={text}: {scheme}:// cannot be read; use a local path, s3://, gs:// or hf://")
    return text


def joined(folder: Location, name: str) -> Location:
    """Return the location of `name` in a folder; an absolute path or an address stays as it is."""
    if "://" in name:
        return as_location(name)
    if is_remote(folder) and not name.startswith("/"):
        scheme, _, rest = str(folder).partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(rest, name))}"
    return Path(folder) / name if not is_remote(folder) else Path(name)


def parent(location: Location) -> Location:
    """Return the folder of a file: beside the link if the file is one, such as those of the Hub's cache."""
    if isinstance(location, str):
        return location.rpartition("/")[0]
    return Path(os.path.abspath(location)).parent


def name_of(location: Location) -> str:
    return location.rpartition("/")[2] if isinstance(location, str) else location.name


def is_file(location: Location) -> bool:
    if isinstance(location, Path):
        return _is(location, Path.is_file)
    try:
        return _info(location)["type"] == "file"
    except FileNotFoundError:
        return False


def is_folder(location: Location) -> bool:
    """Return whether the folder exists; in an object store it does when its prefix has objects."""
    if isinstance(location, Path):
        return _is(location, Path.is_dir)
    try:
        return _info(location)["type"] == "directory"
    except FileNotFoundError:
        return False


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Return what `Path.is_file` or `is_dir` says; False for a name that no file can have."""
    try:
        return kind(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def open_file(location: Location) -> BinaryIO:
    """Open the file for reading, with seek; a remote file is read in windows of 8 MiB."""
    if isinstance(location, Path):
        return open(location, "rb", buffering=io.DEFAULT_BUFFER_SIZE * 64)
    return io.BufferedReader(_RemoteFile(location), _WINDOW_BYTES)


def content(location: Location) -> bytes:
    """Return all bytes of a file; a remote file has as many as the server states."""
    if isinstance(location, Path):
        return location.read_bytes()
    info = _info(location)
    if info["type"] != "file":
        raise IsADirectoryError(location)
    return _range(location, 0, info["size"])


def file_version(address: str) -> list[Any]:
    """Return what identifies the version of a remote file without reading it: its size, then its tag or time.

    The list has one element when the server states neither a tag nor a time.
    """
    # The Hub's file system gives the blob of a file only when it is asked for all details.
    info = _info(address, **({"expand_info": True} if address.startswith("hf://") else {}))
    names = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "updated", "last_commit")
    return [info["size"], *(str(info.get(name)) for name in names if info.get(name))][:2]


def matching_files(pattern: Location, suffixes: tuple[str, ...]) -> list[Location]:
    """Return the files that a path stands for, sorted by name.

    A file stands for itself, a folder for its files that end in one of `suffixes`, and a path with `*`, `?`
    or `[..]` in its last part for the files that match. Raises UserError when there are none, or when a
    folder also has compressed files, which would be left out.
    """
    if any(character in name_of(pattern) for character in _GLOB_CHARACTERS):
        folder, wanted = (
            (parent(pattern), name_of(pattern))
            if isinstance(pattern, str)
            else (pattern.parent, pattern.name)
        )
        names = [
            name
            for name in _file_names(folder)
            if fnmatch.fnmatchcase(name, wanted) and (wanted.startswith(".") or not name.startswith("."))
        ]
    elif is_file(pattern):
        return [pattern]
    else:
        folder, wanted = pattern, " or ".join(f"*{suffix}" for suffix in suffixes)
        all_names = [name for name in _file_names(folder) if not name.startswith(".")]
        names = [name for name in all_names if name.lower().endswith(suffixes)]
        compressed = tuple(suffix + end for suffix in suffixes for end in _COMPRESSED_ENDS)
        for name in all_names:
            if name.lower().endswith(compressed) and name not in names:
                raise UserError(
                    f"records path={pattern}: {name} is compressed and would be left out; decompress it or "
                    f"move it away, or give a pattern (*{suffixes[0]})"
                )
    if not names:
        raise UserError(f"records path={pattern} matches no file ({wanted} in {folder}); correct the path")
    return [joined(folder, name) for name in sorted(names)]


def _file_names(folder: Location) -> list[str]:
    if isinstance(folder, Path):
        # A link to nothing is listed, too: the command that opens it reports it.
        return [path.name for path in folder.iterdir() if not path.is_dir()] if folder.is_dir() else []
    try:
        infos = with_retries(lambda: _filesystem(folder).ls(folder, detail=True, refresh=True), folder)
    except FileNotFoundError:
        return []
    return [name_of(info["name"]) for info in infos if info["type"] == "file"]


class _RemoteFile(io.RawIOBase):
    """A remote file that is read by ranges; each range is retried and its length checked."""

    def __init__(self, address: str) -> None:
        self._address, self._position = address, 0
        self._size: int = _info(address)["size"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:  # a writable buffer; Python has a type for it from 3.12 on
        num_bytes = max(0, min(len(buffer), self._size - self._position))
        buffer[:num_bytes] = _range(self._address, self._position, self._position + num_bytes)
        self._position += num_bytes
        return num_bytes


def _info(address: str, **details: bool) -> dict[str, Any]:
    return with_retries(lambda: _filesystem(address).info(address, refresh=True, **details), address)


def _range(address: str, start: int, end: int) -> bytes:
    def read_once() -> bytes:
        data: bytes = _filesystem(address).cat_file(address, start=start, end=end) if end > start else b""
        if len(data) != end - start:
            raise OSError(f"the body has {len(data)} of {end - start} bytes")
        return data

    return with_retries(read_once, address)


def with_retries(action: Callable[[], Result], address: str, verb: str = "read") -> Result:
    """Return the result of the action; retry it while the server fails.

    Retries end after VICO_REMOTE_PATIENCE_S seconds. `verb` says in messages what could not be done with the
    address. Raises UserError when access is denied and Unreachable when the time is over; FileNotFoundError
    and its like are raised as they are.
    """
    patience_s = number_in_environment(PATIENCE_VARIABLE, _PATIENCE_S)
    deadline, pause_s, num_tries = time.monotonic() + patience_s, _FIRST_PAUSE_S, 1
    while True:
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # every library has errors of its own for the server, connection and body
            refusal = _refusal(error, address, verb)
            if refusal is not None:
                raise refusal from error
            if isinstance(error, _NOT_TRANSIENT):
                raise
            if time.monotonic() + pause_s > deadline:
                raise Unreachable(
                    f"{address} could not be {verb} in {num_tries} tries over {patience_s:.0f} s "
                    f"({_line(error)}); nothing is lost, run the same command again later"
                ) from error
        time.sleep(pause_s)
        pause_s, num_tries = min(pause_s * _PAUSE_GROWTH, _LONGEST_PAUSE_S), num_tries + 1


def _refusal(error: Exception, address: str, verb: str) -> UserError | None:
    """Return the error to raise when the server denies access, or None for any other error."""
    if isinstance(error, PermissionError):
        return UserError(f"{address} may not be {verb} ({_line(error)}); fix the credentials")
    if isinstance(error, _NOT_TRANSIENT):
        if type(error.__cause__).__name__ not in _NO_ACCESS:
            return None
        # For the Hub a private repository looks like a missing one, and so does every file in it.
        return UserError(
            f"{address} may not be {verb}, or there is no such repository ({_line(error)}); give "
            "credentials, or correct its name"
        )
    if type(error).__name__ in _NO_ACCESS:
        return UserError(f"{address} may not be {verb} ({_line(error)}); give credentials")
    return None


def _line(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")


def _filesystem(address: str) -> Any:
    return _filesystem_of(address.partition("://")[0], os.getpid())


@lru_cache(maxsize=8)
def _filesystem_of(scheme: str, process: int) -> Any:
    """Return the fsspec file system of a scheme, one per process, with its own retries off: ours are counted.

    fsspec would give the whole process one instance, even after the environment names another endpoint.
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
        raise missing_package(f"{scheme}://", SCHEMES[scheme]) from error
    if scheme == "s3":
        filesystem.retries = 1
    return filesystem
