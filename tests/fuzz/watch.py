"""A watch on everything that a reader must leave alone, by the kernel (inotify) and by Python's audit hook.

The kernel reports every change and every read below a folder, also by native code. The hook reports what
Python itself opens for writing anywhere, network connections and programs that are started.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_READ, _IS_FOLDER = 0x00000001, 0x40000000
_CHANGED = 0x00000FCE  # written, moved, created, deleted, other permissions or times
_EVENT = struct.Struct("iIII")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = frozenset(
    [
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.chmod",
        "os.chown",
        "os.truncate",
        "os.utime",
        "shutil.rmtree",
        "shutil.move",
    ]
)
_PROCESSES = frozenset(
    [
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "subprocess.Popen",
        "socket.connect",
        "socket.sendto",
        "socket.getaddrinfo",
    ]
)


class KernelWatch:
    """Events on the files below a folder since the last look."""

    def __init__(self, folder: Path):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify is not available")
        self._folders: dict[int, str] = {}
        for parent, _, _ in os.walk(folder):
            number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(parent), _READ | _CHANGED)
            if number < 0:
                raise OSError(ctypes.get_errno(), f"{parent} cannot be watched")
            self._folders[number] = parent

    def events(self) -> list[str]:
        """Return `path (mask)` of each file that was read, written, created, moved or removed."""
        events = []
        while True:
            try:
                data = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return list(dict.fromkeys(events))
            at = 0
            while at < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, at)
                name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
                at += _EVENT.size + length
                if mask & _CHANGED or (mask & _READ and not mask & _IS_FOLDER):  # a listing reads no file
                    events.append(f"{self._folders.get(number)}/{os.fsdecode(name)} ({mask:#x})")


class PythonWatch:
    """What Python does outside of the folders that it may write; the hook stays for the process's life."""

    def __init__(self, writable: tuple[Path, ...]):
        self._writable = tuple(os.path.realpath(folder) for folder in writable)
        self._is_on = False
        self.events: list[str] = []
        sys.addaudithook(self._note)

    @contextmanager
    def on(self) -> Iterator[None]:
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    def taken(self) -> list[str]:
        """Return the events so far and forget them."""
        events, self.events = self.events, []
        return events

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(flags, int) and flags & _WRITES) or (
                isinstance(mode, str) and mode[:1] in "wax"
            )
            if writes and not self._may_write(path):
                self.events.append(f"{event} {path!r}")
        elif event in _CHANGES:
            if not all(
                self._may_write(path) for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]
            ):
                self.events.append(f"{event} {arguments!r}")
        elif event in _PROCESSES:
            self.events.append(f"{event} {arguments!r}")

    def _may_write(self, path: Any) -> bool:
        if isinstance(path, int):
            return True  # a file that is open already
        real = os.path.realpath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        return real == "/dev/null" or any(real.startswith(folder) for folder in self._writable)
