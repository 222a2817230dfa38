"""One writer at a time: the lease of a stage's or a run's folder.

The holder bumps a counter. Another driver takes over at once where it can see that the holder's process is
dead, else when the counter stood still for STALE_S as it watched it; clocks of two machines are never
compared. What a driver that lost its lease still tries to publish is refused (stages/parts.py reads the same
file). Between machines that share an object store, writes of lease.json are conditional in place of locked.
"""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from pipeline.storage.folder import Conflict, FolderStorage
from pipeline.storage.lease_file import Holder, boot_id, pid_namespace, pid_started, read_lease
from stages.durable_files import locked
from stages.parts import LEASE_FILE
from stages.stops import LeaseLost
from vico.errors import Unreachable, UserError

logger = logging.getLogger(__name__)
BEAT_S = 5.0
STALE_S = 30.0
_POLL_S = 0.25
_WAIT = "wait for it with --wait SECONDS, or stop it first"


class LeaseHeld(Exception):
    """A live driver holds the lease of `place`, a folder or address as users know it."""

    def __init__(self, place: str, holder: Holder, remedy: str = _WAIT):
        self.place, self.holder = place, holder
        super().__init__(
            f"{place} is held by run {holder.run} on host {holder.host}, pid {holder.pid}, "
            f"since {holder.since}; {remedy}"
        )


class Lease:
    """A lease this process holds; a thread keeps its counter going until `release`."""

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
        """Whether the heartbeat found another holder; `verify` looks itself."""
        return self._lost.is_set()

    def verify(self) -> None:
        """Raise LeaseLost unless lease.json still names this holder."""
        self.storage.refresh_file(self.folder / LEASE_FILE)
        current = read_lease(self.folder)
        if current is None or current.token != self.holder.token:
            self._lost.set()
            who = "nobody" if current is None else f"run {current.run} on {current.host}, pid {current.pid}"
            place = self.storage.place(self.folder)
            raise LeaseLost(f"the lease of {place} is no longer ours; now holds it: {who}")

    @contextmanager
    def writing(self, *, alone: bool = True) -> Iterator[None]:
        """Hold everyone off the lease while something short is written under it; raises LeaseLost.

        Not `alone`, workers can publish meanwhile, where the storage keeps writers of lease.json apart by
        itself: an object store may take a minute to answer, longer than they wait for the lock.
        """
        keep_off = alone or not self.storage.conditional
        with self._turn, locked(self.folder) if keep_off else nullcontext():
            self.verify()
            try:
                yield
            except Conflict as error:
                self._lost.set()
                raise LeaseLost(f"another driver has written {error}; this one stops") from error

    def next_attempt(self) -> None:
        """Go on as a new attempt: what the old one's workers still publish is refused."""
        with self.writing():
            self.holder.attempt += 1
            self.storage.write(self.folder / LEASE_FILE, self.holder.content())

    def release(self) -> None:
        """Give the lease back; quietly if it was lost or the storage does not answer: it becomes stale
        then."""
        self._stop.set()
        self._thread.join()
        try:
            with self.writing():
                self.holder.released = True
                self.storage.write(self.folder / LEASE_FILE, self.holder.content())
        except LeaseLost:
            pass
        except (OSError, UserError, Unreachable) as error:
            logger.warning("the lease of %s could not be given back (%s)", self.folder, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                with self.writing(alone=False):
                    self.holder.counter += 1
                    self.storage.write(self.folder / LEASE_FILE, self.holder.content())
            except LeaseLost as error:
                logger.error("%s", error)
                return
            except (OSError, UserError, Unreachable) as error:
                logger.warning("the lease of %s could not be renewed (%s); trying again", self.folder, error)


class Leases:
    """Takes and checks the leases of the folders in one storage.

    A holder renews its lease every `beat_s` seconds; one that this machine cannot see and that did not renew
    it for `stale_s` seconds is taken over.
    """

    def __init__(self, storage: FolderStorage, *, beat_s: float = BEAT_S, stale_s: float = STALE_S):
        self.storage, self.beat_s, self.stale_s = storage, beat_s, stale_s

    def acquire(
        self,
        folder: Path,
        run: str,
        *,
        min_attempt: int = 1,
        wait_s: float = 0.0,
        on_wait: Callable[[Holder], None] | None = None,
    ) -> Lease:
        """Take the lease of the folder, with an attempt number above every earlier one and at least
        `min_attempt`.

        Raises LeaseHeld if another driver is alive and still holds the lease after `wait_s` seconds. If the
        holder's process cannot be seen from here, its counter is watched: it moves if the holder is alive; if
        it stands still for `stale_s` seconds, the lease is taken over.
        """
        folder.mkdir(parents=True, exist_ok=True)
        watch, deadline, told = _Watch(), time.monotonic() + wait_s, False
        while True:
            lease, holder = self._try_to_take(folder, run, min_attempt, watch)
            if lease is not None:
                return lease
            if holder is None:
                continue  # another machine was quicker; see who it is
            seen_alive = holder.is_seen_alive() or watch.moved
            if seen_alive and time.monotonic() >= deadline:
                raise LeaseHeld(self.storage.place(folder), holder)
            if not told and on_wait is not None:
                on_wait(holder)
            told = True
            time.sleep(_POLL_S)

    def _try_to_take(
        self, folder: Path, run: str, min_attempt: int, watch: "_Watch"
    ) -> tuple[Lease | None, Holder | None]:
        """Return the new lease, or who holds it; neither if another machine wrote at the same moment."""
        self.storage.refresh_file(folder / LEASE_FILE)
        with locked(folder):
            current = read_lease(folder)
            if current is not None and not (
                current.released or current.is_dead() or watch.stood_still_s(current) >= self.stale_s
            ):
                return None, current
            attempt = max(min_attempt, current.attempt + 1 if current else 1)
            holder = _this_process(run, attempt, self.storage.copy_id)
            try:
                self.storage.write(folder / LEASE_FILE, holder.content())
            except Conflict:
                return None, None
            return Lease(self.storage, folder, holder, self.beat_s), holder

    def refuse_living(self, folders: Iterable[Path], remedy: str) -> dict[Path, str]:
        """Raise LeaseHeld if a live driver holds the lease of one of these folders.

        Holders that cannot be seen from here are watched together, as in `acquire`. Returns the token of each
        lease whose holder stood still for `stale_s` seconds, by folder.
        """
        watched = {folder: _Watch() for folder in folders if _holder_at_work(folder)}
        stood_still: dict[Path, str] = {}
        began = time.monotonic()
        while True:
            for folder, watch in list(watched.items()):
                self.storage.refresh_file(folder / LEASE_FILE)
                holder = _holder_at_work(folder)
                if holder is None:  # released, or its folder removed, since
                    del watched[folder]
                    stood_still.pop(folder, None)
                    continue
                stood_still[folder] = holder.token
                watch.stood_still_s(holder)
                if holder.is_seen_alive() or watch.moved:
                    raise LeaseHeld(self.storage.place(folder), holder, remedy)
            if not watched or time.monotonic() - began >= self.stale_s:
                return stood_still
            time.sleep(_POLL_S)

    def refuse_holders(self, folders: Iterable[Path], known: Mapping[Path, str], remedy: str) -> None:
        """Raise LeaseHeld if one of these folders has a holder that is not seen to be dead and whose token is
        not the `known` one."""
        for folder in folders:
            holder = _holder_at_work(folder)
            if holder is not None and known.get(folder) != holder.token:
                raise LeaseHeld(self.storage.place(folder), holder, remedy)


def _holder_at_work(folder: Path) -> Holder | None:
    """The holder that did not give the lease back and is not seen to be dead."""
    holder = read_lease(folder)
    return None if holder is None or holder.released or holder.is_dead() else holder


class _Watch:
    """How long a holder's counter has stood still, by this process's own clock."""

    def __init__(self):
        self._last: tuple[str, int] | None = None
        self._since = 0.0
        self.moved = False

    def stood_still_s(self, holder: Holder) -> float:
        now, mark = time.monotonic(), (holder.token, holder.counter)
        if mark != self._last:
            self.moved = self._last is not None
            self._last, self._since = mark, now
        return now - self._since


def _this_process(run: str, attempt: int, working_copy: str) -> Holder:
    return Holder(
        run=run,
        attempt=attempt,
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        boot_id=boot_id(),
        pid_namespace=pid_namespace(),
        pid=os.getpid(),
        pid_started=pid_started(os.getpid()) or "",
        working_copy=working_copy,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )
