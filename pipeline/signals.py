"""SIGINT, SIGTERM and SIGHUP as one exception in the main thread, so that a stopped run can say so."""

import signal
from types import FrameType
from typing import Self

from stages.context import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Raises Interrupted at the first signal; a second one ends the process as it would without us."""

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals, also from a library that has taken them meanwhile; ignored ones (nohup) stay
        ignored."""
        for number in _SIGNALS:
            current = signal.getsignal(number)
            if current is signal.SIG_IGN or self.received is not None:
                continue
            self._before.setdefault(number, current)
            signal.signal(number, self._stop)

    def check(self) -> None:
        """Raise Interrupted if a signal came whose exception was lost in a callback."""
        if self.received is not None:
            raise Interrupted(signal.Signals(self.received).name)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for taken, handler in self._before.items():
            signal.signal(taken, handler)
        raise Interrupted(signal.Signals(number).name)
