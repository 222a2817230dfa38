"""Files in folders that others can write to, a storage or the folder for temporary files: nothing is written
through a link, and no open waits for a FIFO."""

from __future__ import annotations

import errno
import logging
import os
import stat
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


def _leads_out(path: Path, root: Path) -> bool:
    return path.is_symlink() and path.is_relative_to(root) and path != root and not is_inside(path, root)
