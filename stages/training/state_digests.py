"""Digests of a checkpoint's state files: made while they are written, compared before they are loaded."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypedDict, TypeVar

Value = TypeVar("Value")
_MOST_READERS = 8


class UnsafeState(RuntimeError):
    """A state file holds more than tensors, plain values and DeepSpeed's own few classes."""


class FileDigest(TypedDict):
    """What identifies the content of a file."""

    sha256: str
    size: int
    """In bytes."""


class HashingFile:
    """A file that is open for writing and computes the digest of what is written, so that nothing is read
    again. Bytes must be written in order."""

    def __init__(self, file: BinaryIO):
        self._file, self._sha256, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Write all of `data`; return its size in bytes."""
        self._sha256.update(data)
        self._size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> FileDigest:
        """Return the digest of what was written so far."""
        return {"sha256": self._sha256.hexdigest(), "size": self._size}


def state_files(folder: Path) -> list[str]:
    """Return the names of all files below `folder`, relative to it and sorted, except hidden files: no loader
    reads those, and NFS puts its own there."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(name.as_posix() for name in names if not any(part[0] == "." for part in name.parts))


def digests_below(folder: Path, check: Callable[[], None] = lambda: None) -> dict[str, FileDigest]:
    """Return name -> digest of all state files; `check` is called between files."""
    names = state_files(folder)
    return dict(zip(names, _threaded(lambda name: _digest(folder / name), names, check), strict=True))


def differences(
    folder: Path,
    digests: Mapping[str, FileDigest],
    share: tuple[int, int] = (0, 1),
    check: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Yield one line for each file that is not the file of its digest, or that no digest names.

    `share` is (rank, world size): each rank reads its share of the files, and rank 0 looks for files without
    a digest. `check` is called between files.
    """
    rank, world_size = share
    if rank == 0:
        for name in sorted({*state_files(folder)} - digests.keys()):
            yield f"{name} was not there when the checkpoint was written"
    by_size = sorted(digests, key=lambda name: (-digests[name]["size"], name))[rank::world_size]
    yield from filter(
        None, _threaded(lambda name: _difference(folder / name, name, digests[name]), by_size, check)
    )


def _threaded(
    function: Callable[[str], Value], names: Sequence[str], check: Callable[[], None]
) -> Iterator[Value]:
    """Yield the function's values in order, computed by several threads: hashing releases Python's lock."""
    pool = ThreadPoolExecutor(min(_MOST_READERS, len(os.sched_getaffinity(0))))
    try:
        for value in pool.map(function, names):
            check()
            yield value
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _difference(path: Path, name: str, written: FileDigest) -> str | None:
    try:
        size = path.stat().st_size
        if size != written["size"]:
            return f"{name} has {size} bytes, and {written['size']} were written"
        sha256 = _digest(path)["sha256"]
    except FileNotFoundError:
        return f"{name} is missing"
    if sha256 != written["sha256"]:
        return f"{name} has the sha256 {sha256[:12]}, and {written['sha256'][:12]} was written"
    return None


def _digest(path: Path) -> FileDigest:
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": file.tell()}
