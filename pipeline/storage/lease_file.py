"""lease.json: which process holds the lease of a folder, and whether that process is still alive."""

import os
import socket
from pathlib import Path
from typing import Literal

from pipeline.json_files import StoredModel
from stages.parts import LEASE_FILE


class Holder(StoredModel):
    """lease.json: the process that writes in the folder, and as which attempt."""

    run: str
    attempt: int
    token: str
    """Random; another holder has another token."""
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_started: str
    """When the process started, in clock ticks since boot."""
    since: str
    working_copy: str = ""
    """The id of the working copy in which the process works; empty without an object store."""
    counter: int = 0
    """Grows while the process holds the lease."""
    released: bool = False

    def is_here(self) -> bool:
        """Return whether this process can see the holder: same host, boot and process namespace."""
        here = (socket.gethostname(), boot_id(), pid_namespace())
        return (self.host, self.boot_id, self.pid_namespace) == here

    def is_dead(self) -> bool:
        """Return whether the process is known to be gone, or another one has its number by now."""
        return self.is_here() and process_state(self.pid, self.pid_started) == "dead"

    def is_seen_alive(self) -> bool:
        return self.is_here() and process_state(self.pid, self.pid_started) == "alive"


def read_lease(folder: Path) -> Holder | None:
    return Holder.read(folder / LEASE_FILE, "delete it if no vico process works on that folder")


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def pid_namespace() -> str:
    """Return the namespace of process numbers: containers may share host name and boot, but not the
    numbers."""
    return os.readlink("/proc/self/ns/pid")


def process_state(pid: int, started: str) -> Literal["alive", "dead", "unseen"]:
    """Return the state of the process with this number and start time, as far as it can be seen from here.

    "unseen": a process of another user has the number, and /proc hides it (mounted with hidepid).
    """
    try:
        return "alive" if pid_started(pid) == started else "dead"
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return "unseen" if _exists(pid) else "dead"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # a process of another user
    return True


def pid_started(pid: int) -> str | None:
    """Return when the process started, in clock ticks since boot; None if it is a zombie.

    Raises OSError if the process cannot be seen.
    """
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
