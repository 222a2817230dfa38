"""parts.json: which parts of a stage are in an object store, and under which keys their bytes are.

The bytes of a file are under `parts/<stage>/<fingerprint>/<sha256>/<file name>`, whoever uploads them.
"""

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field

from pipeline.json_files import OutputFile, StoredModel
from pipeline.storage.working_copy import BYTES_PREFIX, PARTS_FILE, WorkingCopy
from stages.parts import is_within

_REMEDY = "--force its stage moves it to superseded/"


class PartsFile(StoredModel):
    """parts.json, replaced by every attempt when it begins and whenever parts are added or removed."""

    attempt: int = 0
    nonce: str = ""
    """Random; makes every version of the file unique."""
    record: str | None = None
    """sha256 of the record.json that was committed; None before the stage is done."""
    parts: dict[str, dict[str, OutputFile]] = Field(default_factory=dict)
    """Name of a part -> its files by their names within the output."""

    @property
    def files(self) -> dict[str, OutputFile]:
        return {name: file for files in self.parts.values() for name, file in files.items()}

    def without(self, name: str) -> dict[str, dict[str, OutputFile]]:
        """Return the parts without this one and without those in a folder of this name."""
        return {part: files for part, files in self.parts.items() if not is_within(part, name)}


def read_parts(folder: Path) -> PartsFile:
    """Return the parts of a stage's folder; an empty list if nothing was uploaded."""
    return PartsFile.read(folder / PARTS_FILE, _REMEDY) or PartsFile()


def file_key(copy: WorkingCopy, folder: Path, name: str, file: OutputFile) -> str:
    """Return the key of the bytes of an output file of the stage with this folder in the working copy."""
    return f"{BYTES_PREFIX}{copy.key(folder)}/{file.sha256}/{name.rpartition('/')[2]}"


def file_keys(copy: WorkingCopy, folder: Path, lists: Iterable[PartsFile]) -> set[str]:
    """Return the keys of all files that these lists of the stage's parts name."""
    return {file_key(copy, folder, name, file) for parts in lists for name, file in parts.files.items()}


def address_of(copy: WorkingCopy, path: Path) -> str:
    """Return the address in the store of a file of the working copy."""
    key = copy.key(path)
    stage, _, name = key.partition("/output/")
    if name:
        file = read_parts(copy.folder / stage).files.get(name)
        key = file_key(copy, copy.folder / stage, name, file) if file else key
    return copy.bucket.address if key == "." else copy.bucket.address_of(key)
