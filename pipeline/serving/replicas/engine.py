"""The engine of a server whose answers come from replicas: it passes jobs on and their events back."""

import asyncio
import logging
import math
import threading
from concurrent.futures import Future

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from pipeline.serving.answer import ServedModel
from pipeline.serving.job import Event, Job
from pipeline.serving.limits import RequestError, server_error, stopping_error
from pipeline.serving.replicas.application import Application
from pipeline.serving.replicas.watch import ReplicaWatch
from vico.errors import last_line, one_line

logger = logging.getLogger(__name__)

_MOST_REPLICAS = 2
"""How many replicas may die on one job before its client gets the error: one that kills its replica must not
kill all of them."""
_PAUSE_S, _LONGEST_S = 0.5, 60.0
"""Between two tries, and for all of them: a replica that died takes jobs until Ray Serve has noticed it."""
_END_S = 10.0


class _Unanswered(Exception):
    """A replica ended a job without an answer, for a reason that another replica may not have."""


class ReplicatedEngine:
    """Answers jobs through replicas, from one event loop in a thread of its own.

    A job whose replica dies or stops goes to another one, if its client has received nothing yet. Therefore
    answers that are not streamed are held until they are whole.
    """

    num_reserved = math.nan
    """Rows are in the replicas, each of which has its own figure."""

    def __init__(self, served: ServedModel, application: Application):
        self.served, self.limits = served, served.limits
        self._application = application
        self._watch = ReplicaWatch(application)
        self._jobs: dict[Job, Future[None]] = {}
        self._started: set[Job] = set()
        self._sent: set[Job] = set()
        self._lock = threading.Lock()
        self._draining = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._lock:
            is_taken = not self._draining.is_set()
            if is_taken:
                future = self._jobs[job] = asyncio.run_coroutine_threadsafe(self._answer(job), self._loop)
        if is_taken:
            future.add_done_callback(lambda _: self._end(job))  # also of one that was never begun
        else:
            job.emit(Event(error=stopping_error()))

    def cancel(self, job: Job) -> None:
        """End a job that nobody waits for, in its replica too."""
        job.cancelled.set()
        with self._lock:
            running = self._jobs.get(job)
        if running is not None:
            running.cancel()

    @property
    def status(self) -> str:
        """`ok`, `stopping`, or `starting` while no replica runs."""
        if self._draining.is_set():
            return "stopping"
        return "ok" if self._watch.num_running else "starting"

    @property
    def num_replicas(self) -> int:
        """The number of replicas that run."""
        return self._watch.num_running

    @property
    def num_waiting(self) -> int:
        with self._lock:
            return len(self._jobs) - len(self._started)

    @property
    def num_running(self) -> int:
        """The number of jobs of which the server has received a part."""
        return len(self._started)

    def drain(self) -> None:
        """Refuse the jobs without a part of their answer and all new ones; the others go on."""
        self._draining.set()
        with self._lock:
            waiting = [job for job in self._jobs if job not in self._started]
        for job in waiting:
            job.emit(Event(error=stopping_error()))
            self.cancel(job)

    def stop(self) -> None:
        """End all jobs. Their clients get the error at once."""
        self.drain()
        self._watch.stop()
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.emit(Event(error=stopping_error()))
            self.cancel(job)

    def join(self) -> None:
        """Wait until the jobs have ended, in the replicas too."""
        asyncio.run_coroutine_threadsafe(self._ended(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._watch.join()

    async def _answer(self, job: Job) -> None:
        failed: set[object] = set()
        until = self._loop.time() + _LONGEST_S
        while len(failed) < _MOST_REPLICAS and self._loop.time() < until:
            try:
                await self._forward(job)
                return
            except RayTaskError as error:  # its code failed, as that of another replica would
                logger.error("a replica failed: %s", last_line(str(error)))
                job.emit(Event(error=server_error(error)))
                return
            except (_Unanswered, RayError, RayServeException) as error:
                replica = getattr(error, "actor_id", None) or object()
                if replica not in failed:
                    logger.error("a replica did not finish an answer: %s", one_line(error))
                failed.add(replica)
                if job in self._sent:
                    return
                self._started.discard(job)
            except Exception as error:
                logger.error("an answer failed", exc_info=error)
                job.emit(Event(error=server_error(error)))
                return
            await asyncio.sleep(_PAUSE_S)

    def _end(self, job: Job) -> None:
        """Forget a job. A client that still waits gets an error, whatever ended the job."""
        with self._lock:
            self._jobs.pop(job, None)
            self._started.discard(job)
            self._sent.discard(job)
        if not job.is_over:
            job.emit(Event(error=_lost()))

    async def _ended(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=_END_S)

    async def _forward(self, job: Job) -> None:
        """Pass on the events of an answer; cancel it in the replica if this task is cancelled.

        Raises _Unanswered if the replica, or the vLLM of it, stops before the client has received anything.
        """
        held: list[Event] = []
        response = self._application.handle.answer.remote(job.chat, job.prompt, job.client)
        try:
            async for event in response:
                if event.error is not None and event.error.status >= 500:
                    if event.error.status == 503 and job not in self._sent:
                        raise _Unanswered(event.fault)
                    logger.error("an answer failed in a replica: %s", event.fault)
                self._started.add(job)
                held.append(event)
                if event.is_last or job.chat.request.stream:
                    self._sent.add(job)
                    for piece in held:
                        job.emit(piece)
                    held.clear()
        except asyncio.CancelledError as error:
            if not job.cancelled.is_set():  # Ray cancels the jobs of a replica that it ends
                raise _Unanswered("it was cancelled") from error
            # `cancel` waits for the replica's process, so it must not run in this loop
            await asyncio.shield(self._loop.run_in_executor(None, response.cancel))
            raise


def _lost() -> RequestError:
    """Return the error of an answer whose replica died after a part of it was sent, or again and again."""
    message = "the replica that computed the answer ended; try again"
    return RequestError(message, status=503, code="engine_failed", retry_after_s=5)
