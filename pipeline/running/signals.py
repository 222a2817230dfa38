"""SIGINT, SIGTERM and SIGHUP as one exception in the main thread, so that a stopped run can say so.

A library may take a signal for itself (Ray Train takes SIGINT), and a blocking call may keep the exception
back for seconds; a thread therefore hears of every signal at once.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from stages.stops import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Raises Interrupted at the first signal; a second one ends the process as it would without us."""

    def __init__(self):
        self.on_stop: Callable[[], None] | None = None
        """Called once, in a thread of its own, as soon as a signal has come."""
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        self._heard = threading.Event()

    def __enter__(self) -> Self:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        self._give_back()
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)  # ends the listener
        self._listener.join()
        os.close(self._read_end)

    def install(self) -> None:
        """Take the signals, also from a library that took them; ignored ones (nohup) stay ignored."""
        for number in _SIGNALS:
            current = signal.getsignal(number)
            if current is signal.SIG_IGN or self._received is not None:
                continue
            if current != self._stop:
                self._before.setdefault(number, current)
                signal.signal(number, self._stop)

    def received(self, within_s: float = 0.0) -> signal.Signals | None:
        """The signal that came first, if one has come or comes within this time."""
        self._heard.wait(within_s)
        return None if self._received is None else signal.Signals(self._received)

    def check(self) -> None:
        """Raise Interrupted if a signal has come, whatever became of its exception."""
        if self._received is not None:
            raise Interrupted(signal.Signals(self._received).name)

    def wait(self, seconds: float) -> None:
        """Sleep, unless a signal comes: then raise Interrupted."""
        self._heard.wait(seconds)
        self.check()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        self._give_back()
        raise Interrupted(signal.Signals(number).name)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int) -> None:
        if self._received is None:
            self._received = number
            self._heard.set()

    def _listen(self) -> None:
        told = False
        while byte := os.read(self._read_end, 1):
            if byte[0] not in _SIGNALS or signal.getsignal(byte[0]) is signal.SIG_IGN:
                continue
            self._note(byte[0])
            if self.on_stop is not None and not told:
                told = True
                self.on_stop()
