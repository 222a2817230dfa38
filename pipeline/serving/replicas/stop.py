"""Signals outside the time in which the server answers: while replicas start and end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from stages.stops import Interrupted


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise Interrupted at SIGTERM and SIGHUP, as Python does at SIGINT, so that the replicas are deleted.

    While uvicorn runs, its handlers are in their place. Use it in the main thread.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number).name)
