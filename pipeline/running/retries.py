"""Kinds of failure, and which of them are tried again: by the site's `retries`. Called by the runner."""

import errno
from collections.abc import Iterator

from cluster.site import Retries
from vico.errors import Unreachable, UserError

MEMORY, WORKER, IO, ERROR = "memory", "worker", "io", "error"
_LOST_WORKERS = ("WorkersFailed", "WorkerLost")
_GONE_WRONG = ("Diverged", "CheckpointDiffers")  # the same again would go wrong again
_MEMORY_WORDS = ("OutOfMemory", "out of memory")


def disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that a disk is full; Ray wraps what its workers raise."""
    return any(
        (isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT))
        or "No space left on device" in str(one)
        for one in _chain(error)
    )


def failure_kind(error: BaseException) -> str | None:
    """Which of the site's `retries` applies: memory, worker (a process or node died, or a rank ended in an
    error), io (a file system or connection), error (any other); None for what only the user can mend, and for
    a training whose numbers went wrong.
    """
    chain = list(_chain(error))
    if disk_full(error) or any(isinstance(one, UserError) for one in chain):
        return None
    if any(type(one).__name__ in _GONE_WRONG for one in chain):
        return None
    if any(isinstance(one, MemoryError) or _says(one, _MEMORY_WORDS) for one in chain):
        return MEMORY
    if any(isinstance(one, Unreachable) for one in chain):
        return IO
    if any(type(one).__name__ in _LOST_WORKERS or _is_of_ray(one) for one in chain):
        return WORKER
    return IO if any(isinstance(one, OSError) for one in chain) else ERROR


class RetriesLeft:
    """How many more failures of each kind this command lives through, over all its stages."""

    def __init__(self, allowed: Retries):
        self.pause_s = allowed.pause_s
        self._left = {MEMORY: allowed.memory, WORKER: allowed.worker, IO: allowed.io, ERROR: allowed.error}

    def take(self, error: BaseException) -> str | None:
        """The kind of the failure if it is to be tried again, which counts; else None."""
        kind = failure_kind(error)
        if kind is None or not self._left[kind]:
            return None
        self._left[kind] -= 1
        return kind

    def left(self, kind: str) -> int:
        return self._left[kind]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    text = f"{type(error).__name__}: {error}"
    return any(word in text for word in words)


def _is_of_ray(error: BaseException) -> bool:
    """Of Ray itself, and not the envelope in which it brings what a worker raised."""
    is_envelope = any(kind.__name__ == "RayTaskError" for kind in type(error).__mro__)
    return type(error).__module__.partition(".")[0] == "ray" and not is_envelope
