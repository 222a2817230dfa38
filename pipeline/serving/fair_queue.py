"""What waits, jobs or their pictures: first in, first out for each client, and the clients take turns."""

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    @property
    def client(self) -> str: ...
    @property
    def is_over(self) -> bool: ...


W = TypeVar("W", bound=Waiting)


@dataclass
class FairQueue(Generic[W]):
    """A client with many entries delays the next entry of another by at most one of its own."""

    _clients: dict[str, deque[W]] = field(default_factory=dict)
    """In the order in which it is their turn; none without an entry."""

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._clients.values())

    def put(self, entry: W) -> None:
        self._clients.setdefault(entry.client, deque()).append(entry)

    def remove(self, entry: W) -> None:
        """Remove an entry, if it is there."""
        entries = self._clients.get(entry.client)
        if entries is not None and entry in entries:
            entries.remove(entry)
            if not entries:
                del self._clients[entry.client]

    def first(self) -> W | None:
        """Return the entry whose turn it is; drop those before it that are over."""
        while self._clients:
            client, entries = next(iter(self._clients.items()))
            while entries and entries[0].is_over:
                entries.popleft()
            if entries:
                return entries[0]
            del self._clients[client]
        return None

    def pop(self) -> None:
        """Remove the entry that `first` returned; it is then the next client's turn."""
        client, entries = next(iter(self._clients.items()))
        entries.popleft()
        del self._clients[client]
        if entries:
            self._clients[client] = entries

    def take_all(self) -> list[W]:
        """Remove and return all entries."""
        entries = [entry for waiting in self._clients.values() for entry in waiting]
        self._clients.clear()
        return entries
