"""The figures of a server in Prometheus' text form."""

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts what a server does. Every server has its own figures."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.responses = Counter("vico_responses", "Responses by HTTP status.", ["status"], registry=registry)
        self._tokens = Counter(
            "vico_tokens",
            "Tokens of finished answers: text and image of prompts, generated.",
            ["kind"],
            registry=registry,
        )
        self._tiles = Counter("vico_tiles", "Tiles of finished answers by rate.", ["rate"], registry=registry)
        self.first_token_s = Histogram(
            "vico_first_token_seconds",
            "Time from a whole request to the first text of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.answer_s = Histogram(
            "vico_answer_seconds",
            "Time from a whole request to the end of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._step_s = Histogram(
            "vico_engine_step_seconds",
            "Time of one step of the decoder.",
            buckets=_SECONDS,
            registry=registry,
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show what a function returns, at the time when the figures are asked for."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def step(self, seconds: float, num_tokens: int) -> None:
        """Count a step of the engine."""
        self._step_s.observe(seconds)

    def answer(self, usage: Mapping[str, Any], routing: Mapping[str, Any]) -> None:
        """Count the tokens and tiles of a finished answer by its usage and its routing report."""
        image = usage["prompt_tokens_details"]["image_tokens"]
        self._tokens.labels("image").inc(image)
        self._tokens.labels("text").inc(usage["prompt_tokens"] - image)
        self._tokens.labels("generated").inc(usage["completion_tokens"])
        compressed = sum(tile["compressed"] for tile in routing["tiles"])
        self._tiles.labels("compressed").inc(compressed)
        self._tiles.labels("full").inc(len(routing["tiles"]) - compressed)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text form."""
        return generate_latest(self._registry)
