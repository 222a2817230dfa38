"""Which process is meant by a number, and whether it lives. Used by leases."""

import os
from pathlib import Path
from typing import Literal


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
