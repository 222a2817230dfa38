"""The same requests at given shares of compressed tiles, through the engine of `vico serve`, timed.

A request has one picture of `tiles` tiles and a question. The router runs, but its probabilities are replaced
by the same falling ones for the tiles of every picture, and the threshold of a request says how many of them
are compressed: so the shares are exact. Pictures are not cached.
"""

import base64
import io
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.serving.answer import Prompt
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


def _fixed(router: Any, num_tiles: int) -> None:
    """Replace the probabilities of a router by falling ones, picture by picture; it runs all the same."""
    own = router.compress_probability

    def compress_probability(features_NPv: torch.Tensor) -> torch.Tensor:
        probability_N = own(features_NPv)
        assert len(probability_N) % num_tiles == 0, "a pass of the vision tower has whole pictures"
        falling = 1 - (torch.arange(len(probability_N)) % num_tiles + 0.5) / num_tiles
        return falling.to(probability_N)

    router.compress_probability = compress_probability


@contextmanager
def _watched(engine: Engine, device: str) -> Iterator[_Watch]:
    """Watch the parts of an engine until the end of the block; nothing runs in it at both times."""
    model, decoder, watch = engine.served.model, engine.decoder, _Watch(device)
    places: list[tuple[Any, str, str]] = [
        (model.router, "compress_probability", "router"),
        (model, "full_tokens", "connectors"),
        (model, "compressed_tokens", "connectors"),
    ]
    own = [getattr(owner, name) for owner, name, _ in places]
    for (owner, name, part), function in zip(places, own, strict=True):
        setattr(owner, name, watch.timed(part, function))
    step = decoder.step
    object.__setattr__(decoder, "step", watch.stepped(step))
    try:
        yield watch
    finally:
        for (owner, name, _), function in zip(places, own, strict=True):
            setattr(owner, name, function)
        object.__setattr__(decoder, "step", step)


class Requests:
    """Requests to one engine; the first ones, in the constructor, warm it up."""

    def __init__(self, engine: Engine, num_tiles: int, new_tokens: int, device: str):
        self.engine, self.num_tiles, self.new_tokens, self.device = engine, num_tiles, new_tokens, device
        self.picture = _picture(engine.served.model.settings.tile_size, num_tiles)
        _fixed(engine.served.model.router, num_tiles)
        for share in (0.0, 1.0):
            self.ask(1, True, share, Timed())

    def job(self, number: int, share: float) -> dict[str, Any]:
        """Return the body of a request, of whose tiles a share is compressed."""
        part = {"type": "image_url", "image_url": {"url": self.picture}}
        text = {"type": "text", "text": f"{QUESTION} {number}"}
        count = self.num_compressed(number, share)
        threshold = 1 - count / self.num_tiles
        vico = {"rule": "absolute", "threshold": threshold} if count else {"rule": "full"}
        message = {"role": "user", "content": [part, text]}
        return {"model": "m", "messages": [message], "vico": vico, "max_tokens": self.new_tokens}

    def prompts(self, share: float) -> list[TiledSequence]:
        """Return the prompts of four neighbouring requests at a share, whose mean is exactly the share."""
        sequences = []
        for number in range(4):
            skeleton = self._prompt(self.job(number, share)).skeleton
            compressed = np.zeros(skeleton.num_tiles, bool)
            compressed[: self.num_compressed(number, share)] = True
            sequences.append(TiledSequence(skeleton, compressed, 0))
        return sequences

    def num_compressed(self, number: int, share: float) -> int:
        """Return how many tiles of a request are compressed.

        If the share is not a whole number of tiles, half of the requests have one more.
        """
        exact = round(share * self.num_tiles, 6)
        return int(exact) + (exact % 1 > 0 and number % 4 >= 2)

    def ask(self, count: int, at_once: bool, share: float, timed: Timed) -> None:
        """Answer `count` requests, all at once or one after another, and add what they took."""
        jobs = [self.job(number, share) for number in range(count)]
        groups = [jobs] if at_once else [[job] for job in jobs]
        compressed = 0
        for group in groups:
            with _watched(self.engine, self.device) as watch:
                started = time.perf_counter()
                answers = self.answered(group)
            timed.add(watch, started, [end for end, _ in answers])
            tiles = [tile for _, last in answers for tile in (last.routing or {})["tiles"]]
            assert len(tiles) == self.num_tiles * len(group), f"{len(tiles)} tiles"
            compressed += sum(tile["compressed"] for tile in tiles)
        wanted = sum(self.num_compressed(number, share) for number in range(count))
        assert compressed == wanted, f"{compressed} tiles are compressed, not {wanted}"

    def _chat(self, body: dict[str, Any]) -> Chat:
        served = self.engine.served
        return parsed_chat(json.dumps(body).encode(), served.limits, served.prompts.control_tokens)

    def _prompt(self, body: dict[str, Any]) -> Prompt:
        return self.engine.served.prompt(self._chat(body))

    def answered(self, bodies: list[dict[str, Any]]) -> list[tuple[float, Event]]:
        """Return for each request the time of its last event, and this event."""
        over = threading.Semaphore(0)
        last: dict[int, tuple[float, Event]] = {}

        def send(number: int, event: Event) -> None:
            if event.is_last:
                last[number] = time.perf_counter(), event
                over.release()

        for number, body in enumerate(bodies):
            chat = self._chat(body)
            prompt = self.engine.served.prompt(chat)
            self.engine.submit(Job(chat, prompt, partial(send, number), str(number)))
        for _ in bodies:
            over.acquire()
        for _, event in last.values():
            if event.error is not None:
                raise SystemExit(f"a request failed: {event.error}")
        return [last[number] for number in range(len(bodies))]


def _picture(size: int, num_tiles: int) -> str:
    """Return noise as a data URL. One tile less: its thumbnail is a tile too."""
    shape = (size, size * max(num_tiles - 1, 1), 3)
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
