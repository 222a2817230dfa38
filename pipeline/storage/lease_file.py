"""lease.json: who holds the lease of a folder, and whether that process is still alive."""

import os
import socket
from pathlib import Path
from typing import Literal

from pipeline.json_files import StoredModel
from stages.parts import LEASE_FILE


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


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def pid_namespace() -> str:
    """Two containers may share host name and boot and still number their processes apart."""
    return os.readlink("/proc/self/ns/pid")


def sight(pid: int, started: str) -> Literal["alive", "dead", "unseen"]:
    """How the process that started then under this number looks from here. Where /proc hides the processes
    of other users (hidepid), there may be one that is not seen."""
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
        return True  # of another user
    return True


def pid_started(pid: int) -> str | None:
    """When the process started, in ticks since boot; None if there is only its corpse. Raises OSError where
    it cannot be seen."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
