"""Which storage a file or folder belongs to."""

from pathlib import Path

from pipeline.storage.folder import MARKER, FolderStorage


def storage_of(path: Path) -> FolderStorage:
    """The storage that a file or folder belongs to: one that says so itself, in a marker above it, is the
    working copy of an object store."""
    for folder in (path, *path.parents):
        if (folder / MARKER).is_file():
            from pipeline.storage.object_store import object_storage

            return object_storage(folder)
    return FolderStorage()
