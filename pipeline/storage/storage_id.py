"""The id of a storage, by which a run in MLflow is known as one of it: paths of two machines may be equal."""

import secrets
from pathlib import Path

from pipeline.json_files import write_bytes_once
from pipeline.storage.lookup import storage_of

ID_FILE = "storage-id"


def storage_id(folder: Path) -> str:
    """Return the id of the storage with this folder: its address in an object store, else that in its file.

    A folder without the file gets one; one that may not be written has the id "".
    """
    storage = storage_of(folder)
    if storage.conditional_writes:
        return storage.address(folder)
    path = folder / ID_FILE
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return _new_id(path)


def _new_id(path: Path) -> str:
    try:
        write_bytes_once(path, f"{secrets.token_hex(8)}\n".encode())  # a faster command's id is kept
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
