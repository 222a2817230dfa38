"""Watches the replicas of a server: how many run, and why others do not."""

import logging
import threading
from contextlib import suppress

from pipeline.serving.replicas.application import Application, State, connect
from vico.errors import one_line

logger = logging.getLogger(__name__)

_POLL_S, _END_S = 1.0, 10.0


class ReplicaWatch:
    """Counts the replicas that run, about once per second, in a thread. Logs every change once.

    Replicas that were deleted from outside, as by `serve shutdown`, are asked for again.
    """

    def __init__(self, application: Application):
        self._application = application
        self._state = application.state() or State(0)
        self._fault = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="replicas", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """The number of replicas that run."""
        return self._state.num_running

    def stop(self) -> None:
        """End the thread soon."""
        self._stopping.set()

    def join(self) -> None:
        """Wait for the end of the thread, but not for a Ray that does not answer."""
        self._thread.join(_END_S)

    def _work(self) -> None:
        is_gone = False
        while not self._stopping.wait(_POLL_S):
            try:
                state = self._application.state()
                if state is None and is_gone and not self._stopping.is_set():
                    logger.error("the replicas were deleted by another program; they are started again")
                    self._application.deploy()
                is_gone = state is None
            except Exception as error:  # Ray Serve may be starting again, or was shut down
                self._log(f"Ray Serve does not answer: {one_line(error)}")
                with suppress(Exception):  # the next round says why
                    connect()
                continue
            self._show(state or State(0))

    def _show(self, state: State) -> None:
        before, self._state = self._state, state
        number = self._application.number
        if state.num_running < number:
            reason = state.reason or "Ray Serve starts the others again"
            self._log(f"{state.num_running} of {number} replicas run: {reason}")
        elif before.num_running < number or self._fault:
            self._fault = ""
            logger.warning("all %d replicas run again", number)

    def _log(self, fault: str) -> None:
        if fault != self._fault:
            self._fault = fault
            logger.error("%s", fault)
