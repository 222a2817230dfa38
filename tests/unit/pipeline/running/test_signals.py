"""Signals to this process; each test leaves the handlers as they were."""

import os
import signal
import threading
import time

import pytest

from pipeline.running.signals import StopSignals
from stages.stops import Interrupted
from tests.waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def handlers_are_restored(terminal_signals):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_interrupts_the_main_thread_and_calls_on_stop():
    called = threading.Event()
    with StopSignals() as signals:
        signals.on_stop = called.set
        signals.check()
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        assert called.wait(PATIENCE_S)
        assert signals.received() is signal.SIGTERM
        with pytest.raises(Interrupted, match="SIGTERM"):
            signals.check()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a second one ends the process


def test_a_signal_that_a_library_handles_is_received_too():
    handled = []
    with StopSignals() as signals:
        before = signal.signal(signal.SIGINT, lambda number, frame: handled.append(number))
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received(within_s=60) is signal.SIGINT
        assert handled == [signal.SIGINT]
        with pytest.raises(Interrupted, match="SIGINT"):
            signals.check()
        signal.signal(signal.SIGINT, before)


def test_install_replaces_the_handler_of_a_library():
    with StopSignals() as signals:
        signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("the library's handler ran"))
        signals.install()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)


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


def test_in_a_job_only_the_first_signal_counts():
    """A scheduler signals all processes of a job, and one passes it on: the driver gets it twice."""
    with StopSignals(only_first=True) as signals:
        with pytest.raises(Interrupted, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert signals.received() is signal.SIGTERM
