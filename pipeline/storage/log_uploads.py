"""Logs and metric files on their way to an object store, while their driver writes them."""

import math
import time
from pathlib import Path

from pipeline.storage.working_copy import PARTS_FILE, WorkingCopy
from stages.parts import LEASE_FILE

_NOT_UPLOADED = (LEASE_FILE, PARTS_FILE, "record.json", "run.json", "attempt.json", "lease.lock")
"""Written under a condition, by other code, or of use on this machine only."""
_BYTES_PER_S = 8 << 20
"""A file is uploaded as a whole each time, so a large one is uploaded less often."""


class LogUploads:
    """Uploads files that only their driver writes, and remembers how much of them the store has."""

    def __init__(self, copy: WorkingCopy):
        self._copy = copy
        self._uploaded: dict[Path, tuple[int, int]] = {}
        """File -> size and mtime in ns when it was last uploaded."""
        self._uploaded_at: dict[Path, float] = {}
        self._attended: set[Path] = set()

    def attend(self, logs: Path) -> None:
        """From now on, the files of this folder reach the store through this process alone."""
        self._attended.add(logs)

    def upload_changed(self, logs: Path, *, at_once: bool = True) -> None:
        """Upload the changed files of a folder; unless `at_once`, a large one waits until it is due."""
        for path in sorted(logs.iterdir() if logs.is_dir() else ()):
            if path.name in _NOT_UPLOADED or path.name.startswith(".") or not path.is_file():
                continue
            try:
                self._upload_if_changed(path, at_once)
            except FileNotFoundError:  # the file, or the bucket
                if path.exists():
                    raise

    def _upload_if_changed(self, path: Path, at_once: bool) -> None:
        """Upload a file; raise FileNotFoundError if it is removed meanwhile, such as an old stop notice."""
        status = path.stat()
        version = status.st_size, status.st_mtime_ns
        waited_s = time.monotonic() - self._uploaded_at.get(path, -math.inf)
        is_due = at_once or waited_s * _BYTES_PER_S >= status.st_size
        if self._uploaded.get(path) == version or not is_due:
            return
        self._copy.bucket.upload(self._copy.key(path), path)
        self._uploaded[path], self._uploaded_at[path] = version, time.monotonic()

    def shared_bytes(self, path: Path) -> float:
        """Return how many bytes of the file the store has; infinity if another process uploads it."""
        if path.parent not in self._attended:
            return math.inf
        return self._uploaded.get(path, (0, 0))[0]
