"""The lease that this process holds of the folder of a stage or run: one writer at a time.

The holder increases a counter in lease.json. A driver that lost its lease cannot publish any more:
`stages/parts.py` reads the same file. Between machines that share an object store, writes of lease.json are
conditional instead of locked. `leases.py` takes leases.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Self

from pipeline.storage.folder import Conflict, FolderStorage
from pipeline.storage.lease_file import Holder, read_lease
from stages.durable_files import locked
from stages.parts import LEASE_FILE
from stages.stops import LeaseLost
from vico.errors import Unreachable, UserError

logger = logging.getLogger(__name__)
BEAT_S = 5.0


class Lease:
    """A lease that this process holds; a thread renews it every `beat_s` seconds until `release`."""

    def __init__(self, storage: FolderStorage, folder: Path, holder: Holder, beat_s: float = BEAT_S):
        self.storage, self.folder, self.holder = storage, folder, holder
        self._turn = threading.Lock()
        """Held by the thread that changes the holder and writes it."""
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._beat_s = beat_s
        self._thread = threading.Thread(target=self._beat, name=f"lease {folder.name}", daemon=True)
        self._thread.start()

    @property
    def attempt(self) -> int:
        return self.holder.attempt

    @property
    def lost(self) -> bool:
        """Whether the heartbeat or a write saw another holder; `verify` reads the file."""
        return self._lost.is_set()

    def verify(self) -> None:
        """Raise LeaseLost unless lease.json still names this holder."""
        self.storage.refresh_file(self.folder / LEASE_FILE)
        current = read_lease(self.folder)
        if current is None or current.token != self.holder.token:
            self._lost.set()
            who = "nobody" if current is None else f"run {current.run} on {current.host}, pid {current.pid}"
            address = self.storage.address(self.folder)
            raise LeaseLost(f"the lease of {address} is no longer ours; its holder now: {who}")

    @contextmanager
    def writing(self, *, exclusive: bool = True) -> Iterator[None]:
        """Keep others from taking the lease during a short write under it; raise LeaseLost if it is lost.

        Without `exclusive`, workers can publish meanwhile if the storage itself keeps writers of lease.json
        apart: an object store may take a minute to answer, and they do not wait for the lock that long.
        """
        use_lock = exclusive or not self.storage.conditional_writes
        with self._turn, locked(self.folder) if use_lock else nullcontext():
            self.verify()
            try:
                yield
            except Conflict as error:
                self._lost.set()
                raise LeaseLost(f"another driver has written {error}; this one stops") from error

    def next_attempt(self) -> None:
        """Continue as a new attempt; from now on workers of the old one cannot publish."""
        with self.writing():
            self.holder.attempt += 1
            self.storage.write(self.folder / LEASE_FILE, self.holder.content())

    def release(self) -> None:
        """Release the lease. One that is lost, or whose storage does not answer, becomes stale by itself."""
        self._stop.set()
        self._thread.join()
        try:
            with self.writing():
                self.holder.released = True
                self.storage.write(self.folder / LEASE_FILE, self.holder.content())
        except LeaseLost:
            pass
        except (OSError, UserError, Unreachable) as error:
            logger.warning("the lease of %s could not be released (%s)", self.folder, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                with self.writing(exclusive=False):
                    self.holder.counter += 1
                    self.storage.write(self.folder / LEASE_FILE, self.holder.content())
            except LeaseLost as error:
                logger.error("%s", error)
                return
            except (OSError, UserError, Unreachable) as error:
                logger.warning("the lease of %s could not be renewed (%s); it is retried", self.folder, error)
