"""The temporary folder of a local Ray: created per session, removed at its end or by a later session."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vico.errors import UserError

FOLDER_PREFIX = "vico-ray-"
OWNER_FILE = "owner.lock"
# The path of a socket has at most 107 bytes; Ray appends /session_<date>_<time>_<pid>/sockets/plasma_store.
LONGEST_FOLDER = 107 - 66


@contextmanager
def temporary_ray_folder(parent: Path | None) -> Iterator[Path]:
    """Create a folder in `parent` (None: the system's folder for temporary files) and remove it at the end.

    Also removes the folders that killed sessions left in `parent`. Raises UserError when the path is too long
    for Ray's sockets or the folder cannot be created.
    """
    folder = _new_folder(parent)
    with open(folder / f".{OWNER_FILE}", "w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        os.rename(folder / f".{OWNER_FILE}", folder / OWNER_FILE)  # visible to others once locked
        remove_abandoned_folders(folder.parent)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _new_folder(configured_parent: Path | None) -> Path:
    parent = configured_parent or Path(tempfile.gettempdir())
    longest = LONGEST_FOLDER - len(FOLDER_PREFIX) - 9
    if len(os.fsencode(parent)) > longest:
        if configured_parent is not None:
            raise UserError(
                f"ray.temp_dir={parent}: the path is too long for Ray's sockets; "
                f"give one of at most {longest} bytes, or null"
            )
        parent = Path("/tmp")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
    except OSError as error:
        raise UserError(
            f"ray.temp_dir={parent}: is not writable ({error.strerror}); give another folder"
        ) from error


def remove_abandoned_folders(parent: Path) -> None:
    """Remove the folders whose owner has died and so has lost its lock."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        try:
            with open(folder / OWNER_FILE) as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # in use, just being created, or another user's
