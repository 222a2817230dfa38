"""Files in folders that others can write to, a storage or the folder for temporary files: nothing is written
through a link, and no open waits for a FIFO."""

from __future__ import annotations

import errno
import grp
import logging
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

from vico.errors import UserError


def no_links(path: str | Path, flags: int) -> int:
    """Open a file and return its descriptor: an `opener` for `open`.

    Raises UserError if the path is a link or a FIFO, a device or anything else but a regular file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a link, and nothing is written through links; remove it") from error
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a FIFO without a reader, a socket, a device
            raise UserError(f"{path} is not a regular file; remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a regular file; remove it")
    return descriptor


class LogFile(logging.FileHandler):
    """Appends log records to a file that is not a link."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", delay=False)

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, opener=no_links)


def is_own_folder(path: Path) -> bool:
    """Return whether a path is a folder, not a link, that belongs to the user of this process."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def make_own_folder(path: Path, remedy: str) -> None:
    """Create a folder that only this user can use, or take the rights to write there from others.

    Raises UserError if the path is a link, not a folder or somebody else's: its files could be theirs.
    """
    try:
        path.mkdir(mode=0o700, parents=True)
        return
    except FileExistsError:
        pass
    if not is_own_folder(path):
        raise UserError(
            f"{path} is not a folder of {user_name(os.geteuid())} but {owner_and_mode(path)}; {remedy}"
        )
    if path.stat().st_mode & 0o022:
        path.chmod(path.stat().st_mode & 0o7755)


def owner_and_mode(path: Path) -> str:
    """Return to whom a path belongs and its mode in words of `ls`, for messages."""
    status = os.lstat(path)
    owner, mode = user_name(status.st_uid), stat.filemode(status.st_mode)
    return f"of {owner}, group {group_name(status.st_gid)}, with mode {mode}"


def user_name(uid: int) -> str:
    """Return the name of a user, or the number if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def group_name(gid: int) -> str:
    """Return the name of a group, or the number if it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def is_inside(path: Path, root: Path) -> bool:
    """Return whether no link on the way to `path`, which need not exist, leads out of `root`.

    `root` itself may be a link, or be reached through one.
    """
    real_root = os.path.realpath(root)
    return os.path.realpath(path) == real_root or os.path.realpath(path).startswith(
        os.path.join(real_root, "")
    )


def check_inside(path: Path, root: Path) -> None:
    """Raise UserError if a link leads out of `root` on the way to `path`."""
    if is_inside(path, root):
        return
    link = next((folder for folder in (*reversed(path.parents), path) if _leads_out(folder, root)), path)
    raise UserError(
        f"{link} is a link to {os.path.realpath(link)}, out of {root}, and nothing is written through such "
        "links; remove the link (to keep results elsewhere, make the whole storage a link)"
    )


@contextmanager
def held_folder(folder: Path, root: Path) -> Iterator[int]:
    """Open a folder and yield its descriptor, which stays this folder if somebody puts a link in its place.

    Raises UserError if a link leads out of `root` on the way to it, FileNotFoundError or NotADirectoryError
    if there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        where = os.readlink(f"/proc/self/fd/{descriptor}")
        if not is_inside(Path(where), root):
            check_inside(folder, root)  # names the link, if it is still there
            raise UserError(
                f"{folder} was a link to {where}, out of {root}, and nothing behind it is changed"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def move_inside(path: Path, target: Path, root: Path) -> None:
    """Rename a file, folder or link; `target` may be an existing file. Raises as `held_folder` does."""
    with held_folder(path.parent, root) as source, held_folder(target.parent, root) as destination:
        os.replace(path.name, target.name, src_dir_fd=source, dst_dir_fd=destination)


def _leads_out(path: Path, root: Path) -> bool:
    return path.is_symlink() and path.is_relative_to(root) and path != root and not is_inside(path, root)
