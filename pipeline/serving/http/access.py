"""Who may use the server: API keys, names of the host, and the requests of one client at once."""

import hashlib
import hmac
import ipaddress
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.serving.limits import Limits, RequestError
from vico.errors import UserError

RETRY_AFTER_S = 2
"""When a client that was refused for want of room should try again."""

OPEN_PATHS = ("/health",)
"""Paths that need no key, since load balancers have none."""


@dataclass(frozen=True)
class Access:
    """The API keys, none for a server that is open to all, and the host names that clients may use."""

    keys: tuple[bytes, ...] = ()
    hosts: tuple[str, ...] = ()

    def client(self, address: str, authorization: str) -> str:
        """Return who asks: the address, and where keys are checked a digest of the key.

        The name goes to replicas, the key does not. Other spellings of the header are the same client.
        """
        if not self.keys:
            return address
        return f"{hashlib.sha256(_bearer_key(authorization)).hexdigest()[:16]} {address}"

    def check_host(self, host: str | None) -> None:
        """Raise RequestError unless the Host header is missing, an IP address, localhost or an allowed name.

        A web page can point a name of its own at this server (DNS rebinding) and would then be let in by the
        browser; it cannot do so with an address.
        """
        if host is None:  # HTTP/1.0, as of some load balancers; browsers always send it
            return
        name = host_name(host)
        if name in ("localhost", *self.hosts) or _is_address(name):
            return
        shown = name[:60]
        message = f"this server does not answer for the host {shown!r}; its operator can add --allowed-host"
        raise RequestError(message, status=421, code="host_not_allowed")

    def check_key(self, authorization: str | None) -> None:
        """Raise RequestError unless the header has one of the keys."""
        if not self.keys:
            return
        key = _bearer_key(authorization or "")
        # Every key is compared, in constant time, so the time tells nothing about them.
        matches = [hmac.compare_digest(key, expected) for expected in self.keys]
        if not any(matches):
            message = "give a valid API key: Authorization: Bearer KEY"
            raise RequestError(message, status=401, code="invalid_api_key")


def _bearer_key(authorization: str) -> bytes:
    """Return the key in an Authorization header; empty if it has none."""
    scheme, _, given = authorization.partition(" ")
    return given.strip().encode() if scheme.lower() == "bearer" else b""


OPEN = Access()
"""Access without keys, by address or as localhost."""


def host_name(host: str) -> str:
    """Return the name in a Host header, in lower case, without its port and the brackets of IPv6."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def api_keys(key: str | None, file: Path | None) -> tuple[bytes, ...]:
    """Return the keys of both options; a file has one key per line.

    Raises UserError for an empty key, one with spaces, and a file that cannot be read or has no key.
    """
    keys = [] if key is None else [key]
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--api-key-file={file}: {error}; give a text file with one key per line"
            ) from error
        keys_in_file = [line.strip() for line in lines if line.strip()]
        if not keys_in_file:
            raise UserError(f"--api-key-file={file} has no key; write one key per line")
        keys += keys_in_file
    for entry in keys:
        if not entry or not entry.isascii() or any(character.isspace() for character in entry):
            raise UserError("an API key is empty, or has spaces or characters beyond ASCII; give another")
    return tuple(entry.encode() for entry in keys)


@dataclass
class Places:
    """Counts what the requests in the server hold, and refuses more. Used by the event loop only."""

    limits: Limits
    num_open: int = 0
    """Whole requests, waiting or answered."""
    held_bytes: int = 0
    _of_client: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def of_client(self, client: str) -> Iterator[None]:
        """Hold one of the client's places; raise RequestError if it has none left."""
        limit = self.limits.client_requests
        if self._of_client[client] >= limit:
            raise _busy(f"{limit} requests of this client are being served, the limit of one client")
        self._of_client[client] += 1
        try:
            yield
        finally:
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]

    def check_room(self) -> None:
        """Raise RequestError if no further whole request is taken on now."""
        if self.num_open >= self.limits.waiting:
            raise _busy(f"{self.limits.waiting} requests are being served, this server's limit")

    @contextmanager
    def open_request(self) -> Iterator[None]:
        """Hold one of the places of whole requests; raise RequestError if there is none."""
        self.check_room()
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    @contextmanager
    def memory(self) -> Iterator["HeldMemory"]:
        """Hold memory for a request, as much as is taken by the end of the block."""
        held = HeldMemory(self)
        try:
            yield held
        finally:
            self.held_bytes -= held.num_bytes


@dataclass
class HeldMemory:
    """The bytes of a request's body that are in memory, in one form or another."""

    places: Places
    num_bytes: int = 0

    def take(self, count: int) -> None:
        """Hold so many more bytes; raise RequestError if the server has none."""
        places = self.places
        if places.held_bytes + count > places.limits.held_bytes:
            raise _busy(f"requests hold {places.held_bytes} bytes, this server's limit")
        places.held_bytes += count
        self.num_bytes += count


def _busy(reason: str) -> RequestError:
    message = f"{reason}; try again later"
    return RequestError(message, status=429, code="too_many_requests", retry_after_s=RETRY_AFTER_S)


def header(headers: Mapping[str, str], name: str) -> str:
    """Return a header that names one thing, such as a media type, without parameters and in lower case."""
    return headers.get(name, "").partition(";")[0].strip().lower()
