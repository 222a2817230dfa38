"""The thread that answers conversations, many at once. Knows nothing of HTTP.

    submit -> FairQueue -> a row in the decoder -> pictures decoded and encoded -> prompt routed -> tokens

Between two steps of the decoder it takes in new jobs, drops those that nobody waits for, and runs one pass of
the vision tower. So no job waits for the end of another's answer, and none delays the others by more than one
step and one pass.
"""

import logging
import threading
import time
from collections.abc import Callable

from pipeline.serving.answer import ServedModel
from pipeline.serving.fair_queue import FairQueue
from pipeline.serving.growing_text import GrowingText
from pipeline.serving.job import Event, Job
from pipeline.serving.limits import RequestError, stopping_error
from pipeline.serving.picture_work import PictureWork
from pipeline.serving.running import AnswerDecoder, Running
from vico.errors import one_line
from vico.inference.decoding import Decoder

logger = logging.getLogger(__name__)

_IDLE_S = 0.5
"""How long an engine without work sleeps before it looks for clients that left."""


class Engine:
    """Answers jobs, in a thread of its own, at most `limits.batch` at once, the clients in turn."""

    num_replicas = 1

    def __init__(
        self,
        served: ServedModel,
        on_step: Callable[[float, int], object] = lambda *_: None,
        decoder: AnswerDecoder | None = None,
        is_ready: Callable[[], bool] = lambda: True,
    ):
        self.served, self.limits, self._is_ready = served, served.limits, is_ready
        self._on_step = on_step
        self._lock = threading.Lock()
        self._waiting: FairQueue[Job] = FairQueue()
        self._running: list[Running] = []
        self._wake, self._draining, self._stopping = (threading.Event() for _ in range(3))
        self.decoder = decoder or Decoder(served.model, self.limits.decoded_tokens, self.limits.batch)
        self.pictures = PictureWork(served.model, self.limits.picture_cache_bytes, self._wake.set)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._lock:
            if not self._draining.is_set():
                self._waiting.put(job)
                self._wake.set()
                return
        job.emit(Event(error=stopping_error()))

    def cancel(self, job: Job) -> None:
        """Forget a job that nobody waits for: one that waits at once, a running one at the next step."""
        job.cancelled.set()
        with self._lock:
            self._waiting.remove(job)
        self._wake.set()

    @property
    def status(self) -> str:
        """`ok`, `stopping`, or `starting` while the language model's process is not ready (again)."""
        if self._draining.is_set() or not self._thread.is_alive():
            return "stopping"
        return "ok" if self._is_ready() else "starting"

    def wake(self) -> None:
        """Look for work now, from any thread."""
        self._wake.set()

    @property
    def num_waiting(self) -> int:
        with self._lock:
            return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_reserved(self) -> int:
        """The number of tokens for which rows have room."""
        return self.decoder.num_reserved

    def drain(self) -> None:
        """Refuse the waiting jobs and all new ones; the running ones go on."""
        self._draining.set()
        with self._lock:
            waiting = self._waiting.take_all()
        for job in waiting:
            job.emit(Event(error=stopping_error()))
        self._wake.set()

    def stop(self) -> None:
        """End all jobs. Their clients get the error at once, also while the thread is in a long step."""
        self.drain()
        self._stopping.set()
        for running in list(self._running):
            running.job.emit(Event(error=stopping_error()))
        self._wake.set()

    def join(self) -> None:
        """Wait until the thread has ended: torch must not run while the interpreter shuts down."""
        self._thread.join()
        self.pictures.close()

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                if not self._worked():
                    if self._draining.is_set() and not self._running:
                        break
                    self._wake.wait(_IDLE_S)
            except BaseException as error:  # the clients get the error, and the next jobs run
                self._fail(list(self._running), error)
        for running in list(self._running):  # one that was taken in while `stop` looked
            running.job.emit(Event(error=stopping_error()))

    def _worked(self) -> bool:
        for running in [running for running in self._running if running.job.is_over]:
            self._end(running)
        self._take_in()
        worked = self.pictures.work()
        self._take_pictures()
        return self._stepped() or worked

    def _take_in(self) -> None:
        """Give waiting jobs a row, as long as the next of them fits; none overtakes it."""
        with self._lock:
            while (job := self._waiting.first()) is not None and self.decoder.fits(job.prompt.most_tokens):
                self._waiting.pop()
                text = GrowingText(self.served.prompts.tokenizer, job.chat.stop)
                running = Running(job, self.decoder.reserve(job.prompt.most_tokens), text)
                self._running.append(running)
                self.pictures.add(running)

    def _take_pictures(self) -> None:
        """Start the rows whose pictures are encoded; end those whose pictures are broken."""
        for running, error in self.pictures.take_failures():
            self._fail([running], error)
        for running in [running for running in self._running if running.prompt is None]:
            pictures = running.encoded
            if pictures is None:
                continue
            chat = running.job.chat
            try:
                prompt = self.served.routed_prompt(chat, running.job.prompt, pictures)
                running.row.start(prompt.embeds_LD, prompt.max_new_tokens, chat.sampling)
            except Exception as error:
                self._fail([running], error)
                continue
            running.prompt, running.pictures = prompt, []

    def _stepped(self) -> bool:
        """Run one step of the decoder; return whether there was something to do."""
        started = time.perf_counter()
        tokens = self.decoder.step()
        if not tokens and all(running.row.num_unread == 0 for running in self._running):
            return False
        self._on_step(time.perf_counter() - started, len(tokens))
        running_of = {running.row: running for running in self._running}
        for row, token in tokens:
            running = running_of[row]
            if running.job.is_over:  # a decoder may give several tokens of a row, also beyond its end
                continue
            if isinstance(token, RequestError):
                self._fail([running], token)
                continue
            try:
                if running.add(token, self.served.prompts.end_of_turn_id):
                    self._end(running)
            except BaseException as error:  # a tokenizer written in Rust panics with a BaseException
                self._fail([running], error)
        return True

    def _end(self, running: Running) -> None:
        self._running.remove(running)
        self.decoder.remove(running.row)
        self.pictures.forget(running)

    def _fail(self, jobs: list[Running], error: BaseException) -> None:
        fault = ""
        if not isinstance(error, RequestError):
            logger.error("an answer failed", exc_info=error)
            kind = type(error).__name__
            fault = f"{kind}: {one_line(error)}"
            error = RequestError(f"the model failed ({kind}); see the server's log", status=500)
        for running in jobs:
            running.job.emit(Event(error=error, fault=fault))
            self._end(running)
