"""Taking the lease of a folder, from a holder that is dead or silent if need be.

A lease is taken over at once if the holder's process is known to be dead. If it cannot be seen from here, its
counter is watched by this process's own clock; clocks of two machines are never compared.
"""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pipeline.storage.folder import Conflict, FolderStorage
from pipeline.storage.lease import BEAT_S, Lease
from pipeline.storage.lease_file import Holder, boot_id, pid_namespace, pid_started, read_lease
from stages.durable_files import locked
from stages.parts import LEASE_FILE
from vico.own_files import check_inside

STALE_S = 30.0
_POLL_S = 0.25
_WAIT = "wait for it with --wait SECONDS, or stop it first"


class LeaseHeld(Exception):
    """A live driver holds the lease of the folder that users know by `address`."""

    def __init__(self, address: str, holder: Holder, remedy: str = _WAIT):
        self.address, self.holder = address, holder
        super().__init__(
            f"{address} is held by run {holder.run} on host {holder.host}, pid {holder.pid}, "
            f"since {holder.since}; {remedy}"
        )


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
        """Take the lease of the folder, with an attempt number above all earlier ones and at least
        `min_attempt`.

        Raises LeaseHeld if another driver is alive and still holds the lease after `wait_s` seconds. A
        holder that cannot be seen from here is watched: it is alive if its counter moves; if the counter
        does not move for `stale_s` seconds, the lease is taken over. `on_wait` is called once with the
        holder before waiting. Raises UserError if the folder is reached through a link that leads out of the
        storage.
        """
        check_inside(folder, folder.parents[1])
        folder.mkdir(parents=True, exist_ok=True)
        watch, deadline, reported = _Watch(), time.monotonic() + wait_s, False
        while True:
            lease, holder = self._try_to_take(folder, run, min_attempt, watch)
            if lease is not None:
                return lease
            if holder is None:
                continue  # another machine was faster; read who it is
            seen_alive = holder.is_seen_alive() or watch.moved
            if seen_alive and time.monotonic() >= deadline:
                raise LeaseHeld(self.storage.address(folder), holder)
            if not reported and on_wait is not None:
                on_wait(holder)
            reported = True
            time.sleep(_POLL_S)

    def _try_to_take(
        self, folder: Path, run: str, min_attempt: int, watch: "_Watch"
    ) -> tuple[Lease | None, Holder | None]:
        """Return the new lease, or who holds it; neither if another machine wrote at the same moment."""
        self.storage.refresh_file(folder / LEASE_FILE)
        with locked(folder):
            current = read_lease(folder)
            if current is not None and not (
                current.released or current.is_dead() or watch.unchanged_s(current) >= self.stale_s
            ):
                return None, current
            attempt = max(min_attempt, current.attempt + 1 if current else 1)
            holder = _this_process(run, attempt, self.storage.copy_id)
            try:
                self.storage.write(folder / LEASE_FILE, holder.content())
            except Conflict:
                return None, None
            return Lease(self.storage, folder, holder, self.beat_s), holder

    def refuse_live_holders(self, folders: Iterable[Path], remedy: str) -> dict[Path, str]:
        """Raise LeaseHeld if a live driver holds the lease of one of these folders.

        Holders that cannot be seen from here are watched together, as in `acquire`. Returns the token of each
        lease whose counter did not move for `stale_s` seconds, by folder.
        """
        watched = {folder: _Watch() for folder in folders if holder_at_work(folder)}
        stale_tokens: dict[Path, str] = {}
        began = time.monotonic()
        while True:
            for folder, watch in list(watched.items()):
                self.storage.refresh_file(folder / LEASE_FILE)
                holder = holder_at_work(folder)
                if holder is None:  # the lease was released, or its folder removed, in the meantime
                    del watched[folder]
                    stale_tokens.pop(folder, None)
                    continue
                stale_tokens[folder] = holder.token
                watch.unchanged_s(holder)
                if holder.is_seen_alive() or watch.moved:
                    raise LeaseHeld(self.storage.address(folder), holder, remedy)
            if not watched or time.monotonic() - began >= self.stale_s:
                return stale_tokens
            time.sleep(_POLL_S)

    def refuse_new_holders(
        self, folders: Iterable[Path], stale_tokens: Mapping[Path, str], remedy: str
    ) -> None:
        """Raise LeaseHeld if one of these folders has a holder that is not known to be dead and whose token
        is not the one in `stale_tokens`."""
        for folder in folders:
            holder = holder_at_work(folder)
            if holder is not None and stale_tokens.get(folder) != holder.token:
                raise LeaseHeld(self.storage.address(folder), holder, remedy)

    def revoke(self, tokens: Mapping[Path, str], remedy: str) -> None:
        """Take the lease of each folder from the silent holder with this token, which commits nothing more.

        Raises LeaseHeld if one renewed or ended its lease at this moment.
        """
        for folder, token in tokens.items():
            self.storage.refresh_file(folder / LEASE_FILE)
            with locked(folder):
                current = holder_at_work(folder)
                if current is None:
                    continue
                attempt = current.attempt + 1
                taken = _this_process("of vico gc", attempt, self.storage.copy_id)
                try:
                    if current.token != token:
                        raise Conflict(folder)
                    released = taken.model_copy(update={"released": True})
                    self.storage.write(folder / LEASE_FILE, released.content())
                    self.storage.fence(folder, attempt)
                except Conflict as conflict:
                    raise LeaseHeld(self.storage.address(folder), current, remedy) from conflict


def holder_at_work(folder: Path) -> Holder | None:
    """Return the holder of a folder's lease unless it released the lease or is known to be dead."""
    holder = read_lease(folder)
    return None if holder is None or holder.released or holder.is_dead() else holder


class _Watch:
    """Measures how long a holder's counter has not moved."""

    def __init__(self) -> None:
        self._last: tuple[str, int] | None = None
        self._since = 0.0
        self.moved = False

    def unchanged_s(self, holder: Holder) -> float:
        """Return the seconds since the counter was first seen at its value."""
        now, value = time.monotonic(), (holder.token, holder.counter)
        if value != self._last:
            self.moved = self._last is not None
            self._last, self._since = value, now
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
