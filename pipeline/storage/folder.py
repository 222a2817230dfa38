"""A storage as a folder that every machine sees, and the interface of all storages.

Other code reads the files of the storage folder directly. Writing for others, and making sure that files are
there, goes through the methods of `FolderStorage`; `object_store.py` overrides them for object stores.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pipeline.identity.file_digests import file_sha256s
from pipeline.json_files import OutputFile, write_json
from pipeline.storage.output_files import (
    move_to_superseded,
    new_superseded_folder,
    published,
    remove_partials,
)
from stages.durable_files import delete, locked
from vico.own_files import move_inside

MARKER = "object-storage.json"
"""The file that makes a folder the working copy of an object store, and names the store."""
UPLOAD_MARK = "?uploadId="
"""In an address of `garbage`: before the id of an upload that was never finished."""
Sha256s = Callable[[list[Path]], list[str]]


class Conflict(Exception):
    """Another machine wrote the file since this one last read it."""


class FolderStorage:
    """A folder on a local disk or shared file system: everybody sees at once what is written there."""

    conditional_writes = False
    """Whether `write` itself keeps two writers apart."""
    copy_id = ""
    """The id of the working copy of an object store; empty for a folder."""

    def address(self, path: Path) -> str:
        """Return the address under which users find the file: its path, or its URL in an object store."""
        return str(path)

    def check_writable(self) -> None:
        """Raise UserError if the storage lacks what leases need."""

    def refresh(self, folder: Path | None = None, *, full: bool = False) -> None:
        """Read what others wrote: in the folder of a run or stage, or everywhere.

        With `full`, read files again although the store reports no change.
        """

    def refresh_file(self, path: Path) -> None:
        """Read what others wrote into one file."""

    def write(self, path: Path, content: Any) -> None:
        """Write a JSON file, as a whole or not at all; raise Conflict if another machine wrote it meanwhile.

        Processes of the same machine keep each other off with `locked`.
        """
        write_json(path, content)

    def locked_runs(self, runs: Path) -> AbstractContextManager[None]:
        """Hold a lock between all machines, under which runs are looked up, created and removed."""
        return locked(runs)

    def sharing(self, folder: Path, logs: Path) -> AbstractContextManager[None]:
        """While open, let others see finished parts and logs of the folder that this process works in."""
        return nullcontext()

    def shared_bytes(self, path: Path) -> float:
        """Return how many bytes of a log or metric file others can see."""
        return math.inf

    def check_sharing(self, folder: Path) -> None:
        """Raise the error that ended `sharing` of the folder, if there is one."""

    def is_committed(self, folder: Path) -> bool:
        """Return whether the stage's record.json is the one that its last writer committed."""
        return True

    def begin(self, folder: Path, attempt: int) -> None:
        """Remove half-written parts of earlier attempts; from now on those can commit nothing more."""
        remove_partials(folder / "output")

    def fence(self, folder: Path, attempt: int) -> None:
        """Let no attempt before this one commit anything in the folder of a stage, whose lease it has lost.

        Raises Conflict if that attempt is still writing.
        """

    def flush(self, folder: Path) -> None:
        """Wait until others can read every file of the output."""

    def commit(self, path: Path, content: Any) -> None:
        """Write the record, which makes the stage done."""
        write_json(path, content)

    def fetch(self, folder: Path, outputs: Mapping[str, OutputFile], sha256s: Sha256s) -> Path | None:
        """Make the recorded outputs readable on this machine; return the first that differs, or None."""
        paths = [folder / "output" / name for name in outputs]
        checked = zip(paths, sha256s(paths), outputs.values(), strict=True)
        return next((path for path, sha256, file in checked if sha256 != file.sha256), None)

    def sizes(self, folder: Path) -> dict[str, int]:
        """Return the bytes of every published file of a stage's output, by name."""
        output = folder / "output"
        return {name: (output / name).stat().st_size for name in published(output)}

    def sha256s(self, folder: Path, names: Iterable[str]) -> list[str]:
        """Return the digests of published files, reading them in full where they are kept."""
        return file_sha256s(folder / "output" / name for name in names)

    def supersede(self, folder: Path, names: Iterable[str], damaged: Iterable[str] = ()) -> Path:
        """Move files and folders of a stage, in this order, and the `damaged` files of its output to a new
        superseded/<n>, which is returned."""
        superseded = new_superseded_folder(folder)
        move_to_superseded(folder, superseded, names, damaged)
        return superseded

    def size(self, path: Path) -> int:
        """Return the bytes of a file or link, or of all files below a folder."""
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_size
        files = (os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
        return sum(os.lstat(file).st_size for file in files)

    def garbage(self, stage_folders: Iterable[Path], unneeded: Iterable[Path]) -> dict[str, int]:
        """Return address -> bytes of what is in none of the storage's folders and belongs to no stage of
        `stage_folders`; `unneeded` are superseded results of these that no longer count."""
        return {}

    def remove(self, path: Path | str, trash: Path | None) -> None:
        """Hide a path, or an address of `garbage`, from everybody.

        `trash`, a path in a folder of the storage, is where it waits for deletion. Without one, as on a full
        disk, it is deleted, beginning with the file that makes it count.
        """
        path = Path(path)
        if trash is not None:
            move_inside(path, trash, trash.parents[1])
            return
        for name in ("record.json", "run.json"):
            delete(path / name, path.parent)
        delete(path, path.parent)
