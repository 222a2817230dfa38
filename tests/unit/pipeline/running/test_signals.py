"""Signals to this very process; each test leaves the handlers as it found them."""

import os
import signal
import threading
import time

import pytest

from pipeline.running.signals import StopSignals
from stages.stops import Interrupted


@pytest.fixture(autouse=True)
def handlers_are_given_back(terminal_signals):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_interrupts_the_main_thread_and_is_told_to_a_listener():
    heard = threading.Event()
    with StopSignals() as signals:
        signals.on_stop = heard.set
        signals.check()
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        assert heard.wait(5)
        assert signals.received() is signal.SIGTERM
        with pytest.raises(Interrupted, match="SIGTERM"):
            signals.check()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a second one ends the process


def test_a_signal_that_a_library_took_is_known_all_the_same():
    taken = []
    with StopSignals() as signals:
        before = signal.signal(signal.SIGINT, lambda number, frame: taken.append(number))
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received(within_s=5) is signal.SIGINT
        assert taken == [signal.SIGINT]
        with pytest.raises(Interrupted, match="SIGINT"):
            signals.check()
        signal.signal(signal.SIGINT, before)


def test_a_signal_taken_by_a_library_is_taken_back():
    with StopSignals() as signals:
        signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("theirs"))
        signals.install()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert signals.received() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_a_signal_nothing_is_received():
    with StopSignals() as signals:
        assert signals.received() is None
        signals.check()
