"""What clients get when replicas die, stop, fail or are cancelled: always a last event, and the right one.

The handle is a stand-in, since Ray's own failures come only by chance; `tests/integration/
test_serve_replicas.py` kills real replicas.
"""

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from pipeline.serving.answer import Prompt, ServedModel
from pipeline.serving.conversation import Chat
from pipeline.serving.job import Event, Job
from pipeline.serving.limits import RequestError, stopping_error
from pipeline.serving.replicas.application import Application, State
from pipeline.serving.replicas.engine import ReplicatedEngine
from pipeline.serving.replicas.replica import REFUSAL
from tests.waiting import PATIENCE_S

PIECE, LAST = Event("a piece"), Event("the end", "stop", {}, {})
Script = list[Event | BaseException]


class Response:
    """The events of one call, and at their end an error."""

    def __init__(self, script: Script):
        self._script, self.is_cancelled = script, False

    async def __aiter__(self) -> AsyncIterator[Event]:
        for entry in self._script:
            await asyncio.sleep(0)
            if isinstance(entry, BaseException):
                raise entry
            yield entry
        if not self._script:
            await asyncio.sleep(3600)

    def cancel(self) -> None:
        self.is_cancelled = True


class Replicas(Application):
    """An application whose calls answer by scripts, one after the other."""

    def __init__(self, scripts: list[Script]):
        super().__init__("stand-in", None, 2)
        self.responses = [Response(script) for script in scripts]
        self.calls: list[Response] = []
        self.handle = SimpleNamespace(answer=SimpleNamespace(remote=self._call))

    def state(self) -> State:
        return State(2, True)

    def _call(self, *arguments: object) -> Response:
        self.calls.append(self.responses[len(self.calls)])
        return self.calls[-1]


@pytest.fixture
def engine_of() -> Iterator[Callable[[list[Script]], tuple[ReplicatedEngine, Replicas]]]:
    engines = []

    def make(scripts: list[Script]) -> tuple[ReplicatedEngine, Replicas]:
        replicas = Replicas(scripts)
        engines.append(ReplicatedEngine(cast(ServedModel, SimpleNamespace(limits=None)), replicas))
        return engines[-1], replicas

    yield make
    for engine in engines:
        engine.stop()
        engine.join()


def submitted(engine: ReplicatedEngine, *, stream: bool = True) -> tuple[Job, "queue.SimpleQueue[Event]"]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    chat = cast(Chat, SimpleNamespace(request=SimpleNamespace(stream=stream)))
    job = Job(chat, cast(Prompt, None), events.put, "client")
    engine.submit(job)
    return job, events


def events_of(engine: ReplicatedEngine, *, stream: bool = True) -> list[Event]:
    _, events = submitted(engine, stream=stream)
    got = [events.get(timeout=PATIENCE_S)]
    while not got[-1].is_last:
        got.append(events.get(timeout=PATIENCE_S))
    return got


def died() -> ActorDiedError:
    return ActorDiedError()


def unavailable(actor: bytes) -> ActorUnavailableError:
    return ActorUnavailableError("connection lost", actor)


def failed() -> RayTaskError:
    return RayTaskError("answer", "Traceback\nValueError: a fault of the code", ValueError("a fault"))


@pytest.mark.parametrize(
    "first",
    [
        [died()],
        [DeploymentUnavailableError(cast(Any, "replica"))],
        [asyncio.CancelledError()],
        [Event(error=stopping_error(), fault="host a, process 1: the server is stopping")],
        [Event(error=RequestError("vLLM did not finish", status=503), fault="host a, process 1: vLLM")],
    ],
    ids=["died", "unavailable", "cancelled by Ray", "stopping", "vLLM died"],
)
def test_a_job_that_its_replica_does_not_answer_goes_to_another(engine_of, first):
    engine, replicas = engine_of([first, [PIECE, LAST]])
    assert events_of(engine) == [PIECE, LAST]
    assert len(replicas.calls) == 2


@pytest.mark.parametrize("end", [died(), asyncio.CancelledError()], ids=["died", "cancelled by Ray"])
def test_after_a_piece_the_client_gets_an_error_and_no_second_answer(engine_of, end):
    engine, replicas = engine_of([[PIECE, end], [PIECE, LAST]])
    [piece, last] = events_of(engine)
    assert piece == PIECE and last.error is not None
    assert (last.error.status, last.error.retry_after_s) == (503, 5)
    assert len(replicas.calls) == 1


@pytest.mark.parametrize("end", [died(), Event(error=stopping_error())], ids=["died", "stopping"])
def test_an_answer_that_is_not_streamed_is_computed_again(engine_of, end):
    other = Event("another piece")
    engine, _ = engine_of([[PIECE, end], [other, LAST]])
    assert events_of(engine, stream=False) == [other, LAST]
    wait_until(lambda: engine.num_running == 0)


def test_a_job_does_not_kill_all_replicas(engine_of):
    engine, replicas = engine_of([[died()], [died()], [PIECE, LAST]])
    [last] = events_of(engine)
    assert last.error is not None and last.error.status == 503
    assert len(replicas.calls) == 2


def test_a_dead_replica_that_takes_the_job_again_is_not_another(engine_of):
    dead = [unavailable(bytes(16))]
    engine, replicas = engine_of([dead, dead, dead, [PIECE, LAST]])
    assert events_of(engine) == [PIECE, LAST]
    engine, replicas = engine_of([dead, dead, [unavailable(b"1" * 16)], [PIECE, LAST]])
    assert events_of(engine)[-1].error is not None and len(replicas.calls) == 3


def test_a_fault_of_the_code_is_a_500_and_in_the_log(engine_of, caplog):
    engine, replicas = engine_of([[failed()], [PIECE, LAST]])
    [last] = events_of(engine)
    assert last.error is not None and last.error.status == 500
    assert len(replicas.calls) == 1
    assert "ValueError: a fault of the code" in caplog.text


def test_a_model_that_fails_in_a_replica_is_in_the_log_of_the_server(engine_of, caplog):
    error = RequestError("the model failed (OutOfMemoryError); see the server's log", status=500)
    engine, _ = engine_of([[Event(error=error, fault="host b, process 7: OutOfMemoryError: 3 GiB")]])
    [last] = events_of(engine)
    assert last.error is error
    assert "host b, process 7: OutOfMemoryError: 3 GiB" in caplog.text


def test_an_answer_that_ends_without_its_last_event_is_an_error(engine_of):
    engine, _ = engine_of([[PIECE]])
    assert events_of(engine)[-1].error is not None


def test_a_client_that_leaves_ends_the_call(engine_of):
    engine, replicas = engine_of([[]])
    job, events = submitted(engine)
    wait_until(lambda: replicas.calls)
    engine.cancel(job)
    wait_until(lambda: replicas.calls[0].is_cancelled and engine.num_waiting == 0)
    assert events.empty()


def test_drain_refuses_at_once_what_has_no_piece(engine_of):
    engine, replicas = engine_of([[]])
    _, events = submitted(engine)
    wait_until(lambda: replicas.calls)
    engine.drain()
    refused = events.get(timeout=PATIENCE_S).error
    assert refused is not None and refused.body["error"]["code"] == "stopping"
    [late] = events_of(engine)
    assert late.error is not None and late.error.status == 503


def test_the_reason_of_a_start_that_fails_is_what_the_replica_says():
    traceback = f"""A replica failed to start with exception. Retrying 2 more time(s). Error:
ray::ServeReplica.initialize() (pid=1)
  File "replica.py", line 1, in __init__
ValueError: /models/m is not a folder
RuntimeError: {REFUSAL} host gpu-3: /models/m is not a folder; give the folder of a checkpoint
"""
    assert State(1, message=traceback).reason == (
        "host gpu-3: /models/m is not a folder; give the folder of a checkpoint"
    )
    other = "The deployment failed to start 3 times in a row. Error:\nTraceback\nOSError: no space left"
    assert State(0, message=other).reason == "OSError: no space left"
    waiting = "Deployment 'replica' has 1 replicas that have taken\nmore than 30s to be scheduled."
    assert State(1, message=waiting).reason == " ".join(waiting.split())


def wait_until(condition: Callable[[], Any]) -> None:
    async def poll() -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.01)

    asyncio.run(poll())
