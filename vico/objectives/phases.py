"""Where the time of a training step goes: seconds by phase, for the engine and the task that share it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Adds up seconds under names while `enabled`; costs nothing else.

    On CUDA a phase waits for the device at its begin and end, or the time would be that of launching: the
    step gets slower by it, so this is asked for, never always on.
    """

    def __init__(self, enabled: bool = False):
        self.enabled = enabled
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the block to `name`. Blocks lie side by side, not in each other."""
        if not self.enabled:
            yield
            return
        started = self._now()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - started

    def taken(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
