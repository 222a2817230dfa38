"""Kinds of failure, and which of them are tried again by the site's `retries`. Called by the driver."""

import errno
from collections.abc import Iterator

from cluster.settings.blocks import Retries
from vico.errors import Unreachable, UserError

MEMORY, WORKER, IO, ERROR = "memory", "worker", "io", "error"
_LOST_WORKERS = ("WorkersFailed", "WorkerLost")
_DETERMINISTIC = ("Diverged", "CheckpointDiffers")  # another try would fail in the same way
_MEMORY_WORDS = ("OutOfMemory", "out of memory")


def disk_full(error: BaseException | None) -> bool:
    """Return whether an exception or one of its causes says that a disk is full."""
    return any(
        (isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left on device" in str(cause)
        for cause in _chain(error)
    )


def failure_kind(error: BaseException) -> str | None:
    """Return which of the site's `retries` applies; None if another try cannot help.

    memory: out of memory. worker: a process or node died, or a rank ended in an error. io: a file system or
    connection failed. error: anything else. None: the user must fix something, or a training diverged.
    """
    chain = list(_chain(error))
    if disk_full(error) or any(isinstance(cause, UserError) for cause in chain):
        return None
    if any(type(cause).__name__ in _DETERMINISTIC for cause in chain):
        return None
    if any(isinstance(cause, MemoryError) or _says(cause, _MEMORY_WORDS) for cause in chain):
        return MEMORY
    if any(isinstance(cause, Unreachable) for cause in chain):
        return IO
    if any(type(cause).__name__ in _LOST_WORKERS or _is_of_ray(cause) for cause in chain):
        return WORKER
    return IO if any(isinstance(cause, OSError) for cause in chain) else ERROR


class RetriesLeft:
    """How many more failures of each kind this command tries again, over all its stages."""

    def __init__(self, allowed: Retries):
        self.pause_s = allowed.pause_s
        self._left = {MEMORY: allowed.memory, WORKER: allowed.worker, IO: allowed.io, ERROR: allowed.error}

    def take(self, error: BaseException) -> str | None:
        """Return the kind of a failure that is to be tried again, and count it; None if it is not."""
        kind = failure_kind(error)
        if kind is None or not self._left[kind]:
            return None
        self._left[kind] -= 1
        return kind

    def left(self, kind: str) -> int:
        return self._left[kind]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    text = f"{type(error).__name__}: {error}"
    return any(word in text for word in words)


def _is_of_ray(error: BaseException) -> bool:
    """Return whether Ray itself failed. A RayTaskError is only the wrapper of what a worker raised."""
    is_wrapper = any(kind.__name__ == "RayTaskError" for kind in type(error).__mro__)
    return type(error).__module__.partition(".")[0] == "ray" and not is_wrapper
