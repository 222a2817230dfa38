"""Find the storage that a file or folder belongs to."""

from pathlib import Path

from pipeline.storage.folder import MARKER, FolderStorage


def storage_of(path: Path) -> FolderStorage:
    """Return the storage of a file or folder: an object store if a folder above has its marker, else a
    folder."""
    for folder in (path, *path.parents):
        if (folder / MARKER).is_file():
            from pipeline.storage.object_store import object_storage

            return object_storage(folder)
    return FolderStorage()
