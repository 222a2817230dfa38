"""The same requests at given shares of compressed tiles, through the engine of `vico serve`, timed.

A request has one picture of `tiles` tiles and a question. Its threshold is put between the router's
probabilities of its own tiles, so that the wanted number of them is compressed: router, rule and connectors
work as in any request, and the share is exact. Pictures are not cached.
"""

import base64
import io
import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.serving.answer import Prompt, ServedModel
from pipeline.serving.conversation import Chat, parsed_chat
from pipeline.serving.engine import Engine
from pipeline.serving.job import Event, Job
from pipeline.serving.limits import Limits
from vico.packing import TiledSequence

SHARES = {"0": 0.0, "1/3": 1 / 3, "1/2": 1 / 2, "2/3": 2 / 3}
LIMITS = Limits(
    body_bytes=2**26,
    picture_pixels=10**8,
    request_pixels=10**8,
    pictures=1,
    new_tokens=1024,
    total_tokens=0,
    waiting=64,
    picture_cache_bytes=0,
)
NUM_PICTURES = 2
_SMALLEST_GAP, _LARGEST_LOGIT, _MOST_PICTURES = 0.5, 12.0, 60
"""Between the logits of two tiles of a picture, as batches of other sizes round differently; above the other,
probabilities are 1."""
QUESTION = "What is in this picture? Name the colours and what is written on it."


@dataclass
class Timed:
    """Sums over groups of requests; those of a group are sent at once, groups one after another."""

    first_s: list[float] = field(default_factory=list)
    """Time to the first token of each request."""
    prefill_s: float = 0.0
    """Time to the last first token of each group."""
    seconds: float = 0.0
    num_tokens: int = 0
    decoded: int = 0
    """Tokens between the last first token and the first end of a group, when all of it decodes."""
    decode_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, watch: "_Watch", started: float, ends: list[float]) -> None:
        """Add a group, from the times of its tokens and ends."""
        firsts: dict[Any, float] = {}
        for row, moment in watch.tokens:
            firsts.setdefault(row, moment - started)
        last_first, first_end = started + max(firsts.values()), min(ends)
        both = [moment for _, moment in watch.tokens if last_first < moment <= first_end]
        self.first_s += list(firsts.values())
        self.prefill_s += max(firsts.values())
        self.seconds += max(ends) - started
        self.num_tokens += len(watch.tokens)
        self.decoded += len(both)
        self.decode_s += max(both) - last_first if both else 0.0
        for part, part_s in watch.parts_s.items():
            self.parts_s[part] += part_s

    @property
    def measures(self) -> dict[str, float]:
        """Return rates per second, and the shares of router and connectors in the time to the last first
        token."""
        number = len(self.first_s)
        measured = {
            "first_token_s": float(np.median(self.first_s)),
            "first_tokens_per_s": number / self.prefill_s,
            "requests_per_s": number / self.seconds,
            "tokens_per_s": self.num_tokens / self.seconds,
        }
        if self.decode_s:
            measured["decoded_tokens_per_s"] = self.decoded / self.decode_s
        return measured | {f"{part}_share": part_s / self.prefill_s for part, part_s in self.parts_s.items()}


@dataclass
class _Watch:
    """Times of tokens and seconds of parts, as the engine's thread computes them."""

    device: str
    tokens: list[tuple[Any, float]] = field(default_factory=list)
    parts_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def wait(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, part: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            started = self.wait()
            result = function(*arguments)
            self.parts_s[part] += self.wait() - started
            return result

        return call

    def stepped(self, step: Any) -> Any:
        def call() -> Any:
            tokens = step()
            now = time.perf_counter()
            self.tokens += [(row, now) for row, _ in tokens]
            return tokens

        return call


@contextmanager
def _watched(engine: Engine, device: str) -> Iterator[_Watch]:
    """Watch the parts of an engine until the end of the block; nothing runs in it at both times."""
    model, decoder, watch = engine.served.model, engine.decoder, _Watch(device)
    places: list[tuple[Any, str, str]] = [
        (model.router, "compress_probability", "router"),
        (model, "full_tokens", "connectors"),
        (model, "compressed_tokens", "connectors"),
    ]
    for owner, name, part in places:
        setattr(owner, name, watch.timed(part, getattr(owner, name)))
    object.__setattr__(decoder, "step", watch.stepped(decoder.step))
    try:
        yield watch
    finally:
        for owner, name, _ in places:
            delattr(owner, name)
        object.__delattr__(decoder, "step")


class Requests:
    """Requests to one engine. The first ones, in the constructor, warm it up and give the probabilities."""

    def __init__(self, engine: Engine, num_tiles: int, new_tokens: int, device: str):
        self.engine, self.num_tiles, self.new_tokens, self.device = engine, num_tiles, new_tokens, device
        self.pictures: list[str] = []
        self.logits: list[list[float]] = []
        """Of each picture's tiles, the highest first."""
        for seed in range(_MOST_PICTURES):
            logits = self._logits(seed)
            gaps = [a - b for a, b in zip(logits, logits[1:], strict=False)]
            if max(map(abs, logits)) > _LARGEST_LOGIT or min(gaps, default=1) < _SMALLEST_GAP:
                self.pictures.pop()
                continue
            self.logits.append(logits)
            if len(self.pictures) == NUM_PICTURES:
                return
        raise SystemExit(f"of {_MOST_PICTURES} pictures, the router tells the tiles of too few apart")

    def _logits(self, seed: int) -> list[float]:
        """Add the picture of a seed, and return the logits of its tiles."""
        size = self.engine.served.model.settings.tile_size
        self.pictures.append(_data_url(_picture(seed, size, self.num_tiles)))
        routing = {"rule": "full", "report": True}
        [(_, event)] = self.answered([self.job(len(self.pictures) - 1, routing)])
        assert event.routing is not None
        p = np.array([tile["p_compress"] for tile in event.routing["tiles"]])
        assert len(p) == self.num_tiles, f"{len(p)} tiles, not {self.num_tiles}"
        with np.errstate(divide="ignore"):
            return sorted(np.log(p / (1 - p)).tolist(), reverse=True)

    def job(self, number: int, vico: dict[str, Any]) -> tuple[dict[str, Any], int]:
        picture = self.pictures[number % NUM_PICTURES]
        part = {"type": "image_url", "image_url": {"url": picture}}
        content = [part, {"type": "text", "text": f"{QUESTION} {number}"}]
        body = {"model": "m", "messages": [{"role": "user", "content": content}], "vico": vico}
        return body | {"max_tokens": self.new_tokens}, number

    def routing(self, number: int, share: float) -> dict[str, Any]:
        """Return the routing by which a share of a request's tiles is compressed."""
        count = self.num_compressed(number, share)
        if not count:
            return {"rule": "full"}
        logits = [*self.logits[number % NUM_PICTURES], -2 * _LARGEST_LOGIT]
        threshold = 1 / (1 + math.exp(-(logits[count - 1] + logits[count]) / 2))
        return {"rule": "absolute", "threshold": threshold, "report": True}

    def prompts(self, share: float) -> list[TiledSequence]:
        """Return the prompts of four neighbouring requests at a share, whose mean is exactly the share."""
        sequences = []
        for number in range(4):
            body, _ = self.job(number, {})
            skeleton = self._prompt(body).skeleton
            compressed = np.zeros(skeleton.num_tiles, bool)
            compressed[: self.num_compressed(number, share)] = True
            sequences.append(TiledSequence(skeleton, compressed, 0))
        return sequences

    def num_compressed(self, number: int, share: float) -> int:
        """Return how many tiles of a request are compressed.

        If the share is no whole number of tiles, half of the requests have one more.
        """
        exact = round(share * self.num_tiles, 6)
        return int(exact) + (exact % 1 > 0 and number % 4 >= 2)

    def timed(self, count: int, at_once: bool, share: float) -> Timed:
        """Answer `count` requests, all at once or one after another."""
        jobs = [self.job(number, self.routing(number, share)) for number in range(count)]
        groups = [jobs] if at_once else [[job] for job in jobs]
        timed = Timed()
        compressed = 0
        for group in groups:
            with _watched(self.engine, self.device) as watch:
                started = time.perf_counter()
                answers = self.answered(group)
            timed.add(watch, started, [end for end, _ in answers])
            compressed += sum(tile["compressed"] for _, last in answers for tile in last.routing["tiles"])
        wanted = round(share * self.num_tiles * count)
        assert compressed == wanted, f"{compressed} tiles are compressed, not {wanted}"
        return timed

    def _chat(self, body: dict[str, Any]) -> Chat:
        served = self.engine.served
        return parsed_chat(json.dumps(body).encode(), served.limits, served.prompts.control_tokens)

    def _prompt(self, body: dict[str, Any]) -> Prompt:
        return self.engine.served.prompt(self._chat(body))

    def answered(self, jobs: list[tuple[dict[str, Any], int]]) -> list[tuple[float, Event]]:
        """Return for each request the time of its last event, and this event."""
        served: ServedModel = self.engine.served
        over = threading.Semaphore(0)
        last: dict[int, tuple[float, Event]] = {}

        def send(number: int, event: Event) -> None:
            if event.is_last:
                last[number] = time.perf_counter(), event
                over.release()

        for body, number in jobs:
            chat = self._chat(body)
            job = Job(
                chat, served.prompt(chat), lambda event, number=number: send(number, event), str(number)
            )
            self.engine.submit(job)
        for _ in jobs:
            over.acquire()
        for _, event in last.values():
            if event.error is not None:
                raise SystemExit(f"a request failed: {event.error}")
        return [last[number] for _, number in jobs]


def _picture(seed: int, size: int, num_tiles: int) -> np.ndarray:
    """Return a picture of large blocks and noise. One tile less: its thumbnail is a tile too."""
    random = np.random.default_rng(seed)
    columns = max(num_tiles - 1, 1)
    blocks = random.integers(0, 255, (4, 4 * columns, 3)).repeat(size // 4, 0).repeat(size // 4, 1)
    noise = random.integers(-40, 40, blocks.shape) * random.integers(0, 2, (1, blocks.shape[1], 1))
    return np.clip(blocks + noise, 0, 255).astype(np.uint8)


def _data_url(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
