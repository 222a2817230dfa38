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

from pipeline.json_files import StoredModel
from pipeline.processes import boot_id, pid_namespace, pid_started, sight
from pipeline.storage import Conflict, storage_of
from stages.context import LeaseLost
from stages.parts import LEASE_FILE, locked
from vico.errors import Unreachable, UserError

logger = logging.getLogger(__name__)

BEAT_S = 5.0
STALE_S = 30.0
_POLL_S = 0.25
_WAIT = "wait for it with --wait SECONDS, or stop it first"


class LeaseHeld(Exception):
    """Another driver that lives holds the lease."""

    def __init__(self, folder: Path, holder: "Holder", remedy: str = _WAIT):
        self.folder, self.holder = folder, holder
        place = storage_of(folder).place(folder)
        super().__init__(
            f"{place} is held by run {holder.run} on host {holder.host}, pid {holder.pid}, "
            f"since {holder.since}; {remedy}"
        )


class Holder(StoredModel):
    """lease.json: who writes here, as which attempt."""

    run: str
    attempt: int
    token: str
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_started: str
    since: str
    working_copy: str = ""
    """The working copy of an object store in which it works."""
    counter: int = 0
    released: bool = False

    def is_here(self) -> bool:
        """Whether its process number means something here: same host, boot and process namespace."""
        here = (socket.gethostname(), boot_id(), pid_namespace())
        return (self.host, self.boot_id, self.pid_namespace) == here

    def is_dead(self) -> bool:
        """Whether its process is seen to be gone, or its number to belong to another process by now."""
        return self.is_here() and sight(self.pid, self.pid_started) == "dead"

    def is_seen_alive(self) -> bool:
        return self.is_here() and sight(self.pid, self.pid_started) == "alive"


def read_lease(folder: Path) -> Holder | None:
    return Holder.read(folder / LEASE_FILE, "delete it when no vico process works on that folder")


class Lease:
    """A lease this process holds; a thread keeps its counter going until `release`."""

    def __init__(self, folder: Path, holder: Holder, beat_s: float = BEAT_S):
        self.folder, self.holder = folder, holder
        self.storage = storage_of(folder)
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


def acquire(
    folder: Path,
    run: str,
    *,
    min_attempt: int = 1,
    wait_s: float = 0.0,
    on_wait: Callable[[Holder], None] | None = None,
    beat_s: float = BEAT_S,
    stale_s: float = STALE_S,
) -> Lease:
    """The lease of the folder, its attempt number above every earlier one and at least `min_attempt`.

    Raises LeaseHeld when another driver is alive and still holds it after `wait_s`. A holder whose process
    cannot be seen from here is watched until its counter moves (alive) or stood still for `stale_s` (taken
    over).
    """
    folder.mkdir(parents=True, exist_ok=True)
    storage = storage_of(folder)
    watch, deadline, told = _Watch(), time.monotonic() + wait_s, False
    while True:
        storage.refresh_file(folder / LEASE_FILE)
        with locked(folder):
            current = read_lease(folder)
            if (
                current is None
                or current.released
                or current.is_dead()
                or watch.stood_still_s(current) >= stale_s
            ):
                attempt = max(min_attempt, current.attempt + 1 if current else 1)
                holder = _this_process(run, attempt, storage.copy_id)
                try:
                    storage.write(folder / LEASE_FILE, holder.content())
                except Conflict:
                    continue  # another machine was quicker
                return Lease(folder, holder, beat_s)
        seen_alive = current.is_seen_alive() or watch.moved
        if seen_alive and time.monotonic() >= deadline:
            raise LeaseHeld(folder, current)
        if not told and on_wait is not None:
            on_wait(current)
        told = True
        time.sleep(_POLL_S)


def refuse_living(folders: Iterable[Path], remedy: str) -> dict[Path, str]:
    """Raise LeaseHeld when a holder of one of these folders lives; those whose process cannot be seen from
    here are watched together, as in `acquire`. Else folder -> token of those that stood still."""
    watched = {folder: _Watch() for folder in folders if _holder_at_work(folder)}
    began = time.monotonic()
    while True:
        for folder, watch in list(watched.items()):
            storage_of(folder).refresh_file(folder / LEASE_FILE)
            holder = _holder_at_work(folder)
            if holder is None:
                del watched[folder]
                continue
            watch.stood_still_s(holder)
            if holder.is_seen_alive() or watch.moved:
                raise LeaseHeld(folder, holder, remedy)
        if not watched or time.monotonic() - began >= STALE_S:
            return {folder: read_lease(folder).token for folder in watched}
        time.sleep(_POLL_S)


def refuse_holders(folders: Iterable[Path], known: Mapping[Path, str], remedy: str) -> None:
    """Raise LeaseHeld when one of these folders has a holder that is not seen to be dead, nor `known` by its
    token."""
    for folder in folders:
        holder = _holder_at_work(folder)
        if holder is not None and known.get(folder) != holder.token:
            raise LeaseHeld(folder, holder, remedy)


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
