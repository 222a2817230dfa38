"""The thread that answers one conversation after another. Knows nothing of HTTP."""

import logging
import queue
import threading

from pipeline.serving.answer import ServedModel
from pipeline.serving.job import Event, Job
from pipeline.serving.limits import RequestError

logger = logging.getLogger(__name__)


class Engine:
    """Answers jobs in order, in a thread of its own, with greedy decoding."""

    def __init__(self, served: ServedModel):
        self.served, self.limits = served, served.limits
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        if self._stopping.is_set():
            job.send(Event(error=_stopping_error()))
        else:
            self._jobs.put(job)

    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping.is_set()

    def stop(self) -> None:
        """End the current answer at its next token, and refuse the waiting ones."""
        self._stopping.set()
        self._jobs.put(None)

    def join(self) -> None:
        """Wait until the thread has ended: torch must not run while the interpreter shuts down."""
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._answer(job)
            except RequestError as error:
                job.send(Event(error=error))
            except Exception as error:  # the client gets the error, and the next job runs
                logger.exception("an answer failed")
                kind = type(error).__name__
                job.send(Event(error=RequestError(f"the model failed ({kind}); see the log", status=500)))

    def _answer(self, job: Job) -> None:
        def check() -> None:
            if self._stopping.is_set():
                raise _stopping_error()
            if job.cancelled.is_set():
                raise RequestError("the client disconnected", status=499)

        self.served.answer(job.chat, job.send, check)


def _stopping_error() -> RequestError:
    return RequestError("the server is stopping", status=503, code="stopping")
