"""Waits of tests. Their limit only ends a test that hangs: how long things take depends on the machine."""

import subprocess
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import psutil

PATIENCE_S: Final = 900.0


def wait_until(
    condition: Callable[[], object],
    process: subprocess.Popen[Any] | None = None,
    *,
    pause_s: float = 0.02,
    or_else: Callable[[], str] = lambda: "",
) -> None:
    """Wait until the condition holds.

    Fails, with the text of `or_else`, when `process` ends before that or after PATIENCE_S.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process is not None and process.poll() is not None:
            if condition():  # the last thing it did
                return
            raise AssertionError(f"ended with {process.returncode}: {_last_words(process)} {or_else()}")
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s {or_else()}"
        time.sleep(pause_s)


def _last_words(process: subprocess.Popen[Any]) -> tuple[Any, Any]:
    """Return what an ended process wrote, unless something that it started still holds its streams."""
    try:
        return process.communicate(timeout=10)
    except subprocess.TimeoutExpired as unread:
        return unread.stdout, unread.stderr


def wait_for_end(processes: Iterable[psutil.Process]) -> None:
    """Wait until all have ended. `psutil.wait_procs` also waits until a parent asks for the exit codes."""
    processes = list(processes)
    wait_until(
        lambda: all(map(has_ended, processes)),
        or_else=lambda: f"for {[process for process in processes if not has_ended(process)]}",
    )


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, also if nobody has asked for its exit code."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
