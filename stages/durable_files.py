"""Files that survive a crash: fsync of files and folders, a lock between processes, deletion."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vico.errors import UserError
from vico.own_files import held_folder, no_links, owner_and_mode, user_name

_LOCK_TIMEOUT_S = 60.0
logger = logging.getLogger(__name__)


def delete(path: Path, root: Path) -> None:
    """Delete a hidden file or folder in `root`; of a link the link, not what it leads to.

    The driver and a rank may delete a folder and a folder in it at the same time; a path that is already gone
    is not an error. Raises UserError if a link leads out of `root` on the way to the path.
    """
    with suppress(FileNotFoundError, NotADirectoryError), held_folder(path.parent, root) as parent:
        if stat.S_ISDIR(os.stat(path.name, dir_fd=parent, follow_symlinks=False).st_mode):
            shutil.rmtree(path.name, ignore_errors=True, dir_fd=parent)
        else:
            os.unlink(path.name, dir_fd=parent)
    if os.path.lexists(path):
        logger.warning("%s could not be deleted; the next attempt deletes it", path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock between all processes that share the folder, for a short critical section.

    The lease is read and written under this lock.
    """
    with locked_file(folder / "lease.lock"):
        yield


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is created, between all processes that share it.

    Raises UserError if the holder does not release it within a minute, or if it belongs to another user.
    """
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    with _lockable(path) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{path} is locked by a process that does not release it; wait if that is vico gc, "
                        f"else end it (lsof {path})"
                    ) from None
                time.sleep(0.01)
            except OSError as error:
                raise UserError(
                    f"{path} cannot be locked ({error.strerror}); put --storage on a file system with flock"
                ) from error
        yield


def _lockable(path: Path) -> IO[str]:
    try:
        return open(path, "a", opener=no_links)
    except PermissionError as error:
        if not path.exists():
            raise
        raise UserError(
            f"{path} is {owner_and_mode(path)}, and {user_name(os.geteuid())} may not write it; to share a "
            "storage, all its users need one group, setgid folders and umask 002 (docs/storage.md)"
        ) from error


def sync_tree(path: Path) -> None:
    """fsync a file, or every file and folder below a folder."""
    if not path.is_dir():
        sync_file(path)
        return
    for parent, _, names in os.walk(path):
        for name in names:
            sync_file(Path(parent, name))
        sync_folder(Path(parent))


def sync_file(path: Path) -> None:
    """fsync one file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """fsync a folder, so that a rename in it survives a crash of the machine."""
    sync_file(path)
