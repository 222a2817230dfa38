"""`vico serve` decodes requests together: answers of one by one, OpenAI's sampling, fair order."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from data_prep.demo.records import demo_record
from pipeline.serving.answer import ServedModel
from pipeline.serving.conversation import parsed_chat
from pipeline.serving.engine import Engine
from pipeline.serving.job import Event, Job
from pipeline.serving.limits import RequestError
from pipeline.serving.routing import Thresholds
from tests.integration.test_serve import LIMITS, SMALL, body_of, expected_answer
from tests.served import Served, image_part, picture, user
from tests.tiny_model import make_tiny_model
from tests.waiting import PATIENCE_S, wait_until
from vico.checkpoints import load_model
from vico.inference.decoding import Decoder
from vico.prompt import load_prompt_format


@pytest.fixture(scope="module")
def server():
    server = Served(SMALL, "--max-batch", "8").started()
    yield server
    assert server.end() == (0, "")


def demo_questions(number: int) -> list[tuple[list[dict[str, Any]], list[Image.Image]]]:
    """Return demo questions with one picture, in the form of the library, with the picture."""
    import io

    questions, line = [], 0
    while len(questions) < number:
        row, pictures = demo_record(1, line)
        line += 1
        if row["conversations"][0]["value"].startswith("<image>\n") and len(pictures) == 1:
            images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]
            questions.append((row["conversations"][:1], images))
    return questions


def message(turns: list[dict[str, Any]], images: list[Image.Image]) -> dict[str, Any]:
    return user(image_part(images[0]), turns[0]["value"].removeprefix("<image>\n"))


def test_requests_at_once_get_the_answers_of_one_by_one(server):
    questions = demo_questions(12)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda q: server.ask([message(*q)], max_tokens=30, temperature=0), questions))
    texts = []
    for (turns, images), answer in zip(questions, answers, strict=True):
        expected = expected_answer(SMALL, turns, images, 30, False)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == expected.num_prompt
        texts.append(expected.text)
    assert len(set(texts)) > 6


@pytest.fixture(scope="module")
def question(server) -> list[dict[str, Any]]:
    """A question whose answer has several words."""
    for turns, images in demo_questions(40):
        messages = [message(turns, images)]
        if len(server.ask(messages, max_tokens=40).choices[0].message.content.split()) > 3:
            return messages
    raise AssertionError("no answer of the demo has several words")


def test_a_seed_draws_the_same_answer_again(server, question):
    def text(seed: int, **options: Any) -> str:
        options = {"temperature": 1.8, "max_tokens": 40} | options
        return server.ask(question, seed=seed, **options).choices[0].message.content

    alone = [text(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(text, [0, 1, 2, 3, 0, 1, 2, 3]))
    assert together == alone * 2
    assert len(set(alone)) > 1
    greedy = server.ask(question, max_tokens=40).choices[0].message.content
    assert {text(seed, top_p=1e-6) for seed in range(3)} == {greedy}


def test_the_text_ends_before_a_stop_text(server, question):
    whole = server.ask(question, max_tokens=40).choices[0].message.content
    for stop in (whole[5:9], [whole[7:10], "nowhere"], whole[0], [whole[-1], whole[3:6]]):
        texts = [stop] if isinstance(stop, str) else stop
        expected = whole[: min(whole.find(text) for text in texts if text in whole)]
        answer = server.ask(question, max_tokens=40, stop=stop)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(server.ask(question, max_tokens=40, stop=stop, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    beginning = whole + "!"  # held back while it may come, and given when it did not
    assert server.ask(question, max_tokens=40, stop=beginning).choices[0].message.content == whole


def test_logprobs_are_those_of_the_answer(server, question):
    options = {"max_tokens": 40, "logprobs": True, "top_logprobs": 3}
    answer = server.ask(question, **options)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == answer.choices[0].message.content
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token, "greedy"
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
    chunks = list(server.ask(question, stream=True, **options))
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    assert server.ask(question, max_tokens=2).choices[0].logprobs is None
    cut = server.ask(question, stop=answer.choices[0].message.content[4:6], **options).choices[0]
    assert len(cut.logprobs.content) < len(entries)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> ServedModel:
    """A model that never stops by itself."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "m")
    limits = replace(LIMITS, total_tokens=2000, new_tokens=1500, batch=1)
    return ServedModel(load_model(folder), load_prompt_format(folder), limits, Thresholds())


class Asked:
    """A job of an engine in this process, with its events."""

    def __init__(
        self, engine: Engine, max_tokens: int, client: str = "", order: list[str] | None = None, **image: int
    ):
        self.events: queue.Queue[Event] = queue.Queue()
        self.order = [] if order is None else order
        self.client = client
        parts = image_part(picture(1), **image), "what"
        chat = parsed_chat(body_of(user(*parts), max_tokens=max_tokens), engine.limits, ())
        self.job = Job(chat, engine.served.prompt(chat), self._event, client)
        engine.submit(self.job)

    def _event(self, event: Event) -> None:
        if event.is_last:
            self.order.append(self.client)
        self.events.put(event)

    def last(self) -> Event:
        while not (event := self.events.get(timeout=PATIENCE_S)).is_last:
            pass
        return event


@pytest.fixture
def engine(served):
    engine = Engine(served)
    yield engine
    engine.stop()
    engine.join()


def test_the_same_picture_is_encoded_once(engine, served, monkeypatch):
    encoded: list[int] = []
    features = served.model.vision_features
    monkeypatch.setattr(
        type(served.model),
        "vision_features",
        lambda self, pixels: encoded.append(len(pixels)) or features(pixels),
    )
    texts = ["".join(text_of(Asked(engine, 9))) for _ in range(3)]
    assert len(set(texts)) == 1 and len(encoded) == 1 and encoded[0] > 1
    assert Asked(engine, 9, max_dynamic_patch=1).last().error is None
    assert encoded[1:] == [1], "another tiling is another picture"


def text_of(asked: "Asked") -> Iterator[str]:
    while not (event := asked.events.get(timeout=PATIENCE_S)).is_last:
        yield event.text
    yield event.text


def test_clients_take_turns(engine):
    order: list[str] = []
    first = Asked(engine, 200, "greedy", order)
    jobs = [Asked(engine, 2, "greedy", order) for _ in range(5)]
    jobs += [Asked(engine, 2, "modest", order) for _ in range(2)]
    for job in (first, *jobs):
        assert job.last().error is None
    assert order[:5] == ["greedy", "greedy", "modest", "greedy", "modest"] and len(order) == 8


def test_a_cancelled_job_frees_its_row_and_its_place(engine):
    running, waiting, last = (Asked(engine, 1000) for _ in range(3))
    running.events.get(timeout=PATIENCE_S)
    engine.cancel(waiting.job)
    assert engine.num_waiting == 1, "forgotten at once, with its pictures"
    engine.cancel(running.job)
    assert last.last().usage["completion_tokens"] == 1000
    assert waiting.events.empty(), "it never got a row"
    wait_until(lambda: engine.num_running == engine.num_waiting == engine.decoder.num_reserved == 0)


def test_clients_get_the_error_of_a_stopping_server_at_once(engine, monkeypatch):
    """Also while the engine's thread is in a step that does not end."""
    goes_on, entered = threading.Event(), threading.Event()

    def step(self: Decoder) -> list[Any]:
        entered.set()
        goes_on.wait(PATIENCE_S)
        return []

    monkeypatch.setattr(Decoder, "step", step)
    running, waiting = Asked(engine, 10), Asked(engine, 10)
    assert entered.wait(PATIENCE_S)
    engine.stop()
    for job in (running, waiting, Asked(engine, 10)):
        error = job.last().error
        assert error.status == 503 and error.retry_after_s > 0
    goes_on.set()


class Panic(BaseException):
    """Like pyo3's PanicException, with which a tokenizer written in Rust fails."""


def test_a_tokenizer_that_panics_fails_one_request_only(engine, served, monkeypatch):
    tokenizer = type(served.prompts.tokenizer)
    with monkeypatch.context() as broken:
        broken.setattr(
            tokenizer, "decode", lambda *_, **__: (_ for _ in ()).throw(Panic("index out of range"))
        )
        assert Asked(engine, 3).last().error.status == 500
    with monkeypatch.context() as broken:
        broken.setattr(
            served.prompts._turn_tokenizer,
            "encoded",
            lambda *_, **__: (_ for _ in ()).throw(Panic("a panic")),
        )
        with pytest.raises(RequestError, match="a panic") as caught:
            Asked(engine, 3)
        assert caught.value.status == 400
    assert Asked(engine, 3).last().error is None


def test_a_step_that_fails_ends_its_answers_and_not_the_engine(engine, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(
            Decoder, "step", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
        )
        error = Asked(engine, 3).last().error
        assert error.status == 500 and "OutOfMemoryError" in str(error)
    assert Asked(engine, 3).last().error is None
    assert engine.decoder.num_reserved == 0 or engine.num_running
