"""Where results are kept, behind one interface: a folder that every machine sees, or an object store with a
working copy here (pipeline/storage/object_store.py).

All other code reads the files of the storage folder; what it writes for others to see, and what it needs to
be there, goes through the methods of `FolderStorage`, which object stores give another body.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pipeline.identity.file_digests import file_sha256s
from pipeline.json_files import write_json
from pipeline.storage.output_files import move_aside, new_superseded, partials, published
from stages.durable_files import locked

MARKER = "object-storage.json"
"""In the working copy of an object store: which one it is of."""
Sha256s = Callable[[list[Path]], list[str]]


class Conflict(Exception):
    """Somebody else wrote that file since it was last read here."""


class FolderStorage:
    """A folder on a local disk or shared file system: what is written there is seen by all, at once."""

    conditional = False
    """Whether `write` itself keeps two writers apart."""
    copy_id = ""
    """Which working copy of an object store this is."""

    def place(self, path: Path) -> str:
        """How people find the file."""
        return str(path)

    def check_writable(self) -> None:
        """Raise UserError when what leases need is not there."""

    def refresh(self, folder: Path | None = None, *, anew: bool = False) -> None:
        """See what others wrote: in a run's or stage's folder, or everywhere. `anew`: trust nothing that was
        read before."""

    def refresh_file(self, path: Path) -> None:
        """See what others wrote into one file."""

    def write(self, path: Path, content: Any) -> None:
        """Write a JSON file, whole or not at all; raises Conflict when another machine wrote it meanwhile.

        Processes of this machine keep each other off with `locked`.
        """
        write_json(path, content)

    def choosing(self, runs: Path) -> AbstractContextManager[None]:
        """The critical section, between all machines, in which runs are found, made and removed."""
        return locked(runs)

    def attending(self, folder: Path, logs: Path) -> AbstractContextManager[None]:
        """While it is open, finished parts of the folder that this process works in, and its logs, reach
        others."""
        return nullcontext()

    def shared_bytes(self, path: Path) -> float:
        """How many bytes of a log or metrics file others see."""
        return math.inf

    def check(self, folder: Path) -> None:
        """Raise what went wrong for good with that."""

    def is_believed(self, folder: Path) -> bool:
        """Whether the stage's record.json is the one that its last writer committed."""
        return True

    def begin(self, folder: Path, attempt: int) -> None:
        """Clear what earlier attempts left half-written; from now on they can commit nothing more."""
        for leftover in list(partials(folder / "output")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def settle(self, folder: Path) -> None:
        """Wait until every file of the output is where others find it."""

    def commit(self, path: Path, content: Any) -> None:
        """Write the record, which makes the stage done."""
        write_json(path, content)

    def fetch(self, folder: Path, outputs: Mapping[str, Any], sha256s: Sha256s) -> Path | None:
        """Make the recorded outputs readable here; the first whose bytes are not those recorded."""
        paths = [folder / "output" / name for name in outputs]
        found = zip(paths, sha256s(paths), outputs.values(), strict=True)
        return next((path for path, sha256, file in found if sha256 != file.sha256), None)

    def sizes(self, folder: Path) -> dict[str, int]:
        """Name -> bytes of every published file of a stage's output."""
        output = folder / "output"
        return {name: (output / name).stat().st_size for name in published(output)}

    def sha256s(self, folder: Path, names: Iterable[str]) -> list[str]:
        """The digests of published files, read in full where they are kept."""
        return file_sha256s(folder / "output" / name for name in names)

    def set_aside(self, folder: Path, names: Iterable[str], damaged: Iterable[str] = ()) -> Path:
        """Move files and folders of a stage to a new superseded/<n>, in this order, and the `damaged` files
        of its output."""
        aside = new_superseded(folder)
        move_aside(folder, aside, names, damaged)
        return aside

    def size(self, path: Path) -> int:
        """Bytes of a file, or of all files below a folder."""
        if not path.is_dir():
            return path.lstat().st_size
        inner = (os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
        return sum(os.lstat(one).st_size for one in inner)

    def garbage(self, stage_folders: Iterable[Path], given_up: Iterable[Path]) -> dict[str, int]:
        """Address -> bytes of what lies in no folder that `vico gc` looks at, and belongs to no stage of
        these; `given_up`: superseded results that count no more."""
        return {}

    def remove(self, path: Path | str, trash: Path) -> None:
        """Take something out of sight of everybody, at once; `trash` is removed later."""
        trash.parent.mkdir(exist_ok=True)
        os.rename(path, trash)
