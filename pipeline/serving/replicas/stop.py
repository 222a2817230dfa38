"""Signals outside the time in which the server answers: while replicas start and end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from stages.stops import Interrupted


@contextmanager
def stop_signals() -> Iterator[None]:
    """Interrupt the block at SIGTERM and SIGHUP, as Python does at SIGINT, so that the replicas are deleted.

    Then raise SystemExit with 128 and the signal's number. While uvicorn runs, its handlers are in the place
    of these. Use it in the main thread.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as error:  # inside a call of Ray, ours arrives as a plain one
        if received:
            raise SystemExit(128 + received[0]) from error  # the command line makes 130 of every interrupt
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
