"""What the journal of an attempt says and an object store has not been told. Used by `object_parts.py`."""

import json
from pathlib import Path

from stages.parts import is_within


class PartsNews:
    """Parts that wait to be brought, in order, and names that were dropped; by the journal as far as read."""

    def __init__(self, journal: Path, output: Path):
        self.journal, self._output = journal, output
        self._read_bytes = 0
        self._waiting: list[str] = []
        self.dropped: list[str] = []

    def read(self) -> None:
        """Take in what was added to the journal; call while the folder is locked."""
        with self.journal.open("rb") as file:
            file.seek(self._read_bytes)
            lines = [line for line in file if line.endswith(b"\n")]
        self._read_bytes += sum(map(len, lines))
        for line in lines:
            [(kind, name)] = json.loads(line).items()
            self._waiting = [part for part in self._waiting if not is_within(part, name)]
            self.dropped = [part for part in self.dropped if part != name]
            (self._waiting if kind == "published" else self.dropped).append(name)

    def next_batch(self) -> list[str]:
        """Parts that wait: all single files, and the newest folder of each parent."""
        folders = {part.rpartition("/")[0]: part for part in self._waiting if (self._output / part).is_dir()}
        return [
            part
            for part in self._waiting
            if not (self._output / part).is_dir() or part == folders[part.rpartition("/")[0]]
        ]

    def done(self, brought: list[str], dropped: list[str]) -> None:
        """The store names these parts, and no longer those."""
        self._waiting = [part for part in self._waiting if part not in brought]
        self.dropped = [name for name in self.dropped if name not in dropped]
