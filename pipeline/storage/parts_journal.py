"""The journal of an attempt as its uploads read it: what an object store does not have yet. Used by
`stored_parts.py`."""

import json
from pathlib import Path

from stages.parts import is_within


class PartsJournal:
    """The part of a journal that was read: parts that wait for their upload, and names that were removed."""

    def __init__(self, path: Path, output: Path):
        self.path, self._output = path, output
        self._read_bytes = 0
        self._waiting: list[str] = []
        self.removed: list[str] = []

    def read(self) -> None:
        """Read the lines that were added to the file; call it while the stage's folder is locked."""
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            lines = [line for line in file if line.endswith(b"\n")]
        self._read_bytes += sum(map(len, lines))
        for line in lines:
            [(action, name)] = json.loads(line).items()
            self._waiting = [part for part in self._waiting if not is_within(part, name)]
            self.removed = [part for part in self.removed if part != name]
            (self._waiting if action == "published" else self.removed).append(name)

    def next_batch(self) -> list[str]:
        """Return the waiting parts to upload next: all single files, and the newest folder of each parent."""
        newest = {part.rpartition("/")[0]: part for part in self._waiting if (self._output / part).is_dir()}
        return [
            part
            for part in self._waiting
            if not (self._output / part).is_dir() or part == newest[part.rpartition("/")[0]]
        ]

    def mark_done(self, uploaded: list[str], removed: list[str]) -> None:
        """Forget these parts: the store has the first and no longer the second."""
        self._waiting = [part for part in self._waiting if part not in uploaded]
        self.removed = [name for name in self.removed if name not in removed]
