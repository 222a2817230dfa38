"""SIGINT, SIGTERM and SIGHUP as one exception in the main thread, so that a stopped run can record its stop.

A library may replace a signal's handler (Ray Train replaces that of SIGINT), and a blocking call may delay
the exception for seconds. Therefore a thread receives every signal immediately.
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
    """Raises Interrupted at the first signal; a second signal ends the process as usual.

    With `only_first` more signals are ignored: schedulers send the same stop to several processes of a job,
    which pass it on, and kill a job that does not end.
    """

    def __init__(self, *, only_first: bool = False) -> None:
        self._only_first = only_first
        self.on_stop: Callable[[], None] | None = None
        """Called once, in another thread, as soon as a signal has come."""
        self._received: int | None = None
        self._handlers_before: dict[int, Any] = {}
        self._has_come = threading.Event()

    def __enter__(self) -> Self:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)  # ends the listener
        self._listener.join()
        os.close(self._read_end)

    def install(self) -> None:
        """Set our handlers, also over those of a library. Ignored signals (nohup) stay ignored."""
        for number in _SIGNALS:
            current = signal.getsignal(number)
            if current is signal.SIG_IGN or self._received is not None:
                continue
            if current != self._stop:
                self._handlers_before.setdefault(number, current)
                signal.signal(number, self._stop)

    def received(self, within_s: float = 0.0) -> signal.Signals | None:
        """Return the first signal that has come, or comes within this time; else None."""
        self._has_come.wait(within_s)
        return None if self._received is None else signal.Signals(self._received)

    def check(self) -> None:
        """Raise Interrupted if a signal has come, even if something caught the exception that it raised."""
        if self._received is not None:
            raise Interrupted(signal.Signals(self._received).name)

    def wait(self, seconds: float) -> None:
        """Sleep; raise Interrupted when a signal comes."""
        self._has_come.wait(seconds)
        self.check()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        if self._only_first:
            for other in self._handlers_before:
                signal.signal(other, _ignore)
        else:
            self._restore()
        raise Interrupted(signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number: int) -> None:
        if self._received is None:
            self._received = number
            self._has_come.set()

    def _listen(self) -> None:
        has_called = False
        while byte := os.read(self._read_end, 1):
            if byte[0] not in _SIGNALS or signal.getsignal(byte[0]) is signal.SIG_IGN:
                continue
            self._note(byte[0])
            if self.on_stop is not None and not has_called:
                has_called = True
                self.on_stop()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing. Unlike SIG_IGN this is not inherited by programs that are started."""
