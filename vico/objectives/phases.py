"""Seconds of a training step by phase, measured by the engine and the task that share a `Phases` object."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Adds up seconds by name while `enabled`; when disabled it costs nothing.

    On CUDA a phase waits for the device at its start and end, as otherwise only kernel launches would be
    timed. This slows the step down, so it is off by default.
    """

    def __init__(self, enabled: bool = False):
        self.enabled = enabled
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`. Blocks must not be nested."""
        if not self.enabled:
            yield
            return
        started = self._now()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - started

    def pop_seconds(self) -> dict[str, float]:
        """Return the seconds by name since the last call, and start again from zero."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
