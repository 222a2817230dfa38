"""A job that the engine works on: its pictures, its row in the decoder, the events of its answer."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.serving.answer import RoutedPrompt, ServedModel
from pipeline.serving.growing_text import GrowingText
from pipeline.serving.job import Event, Job
from pipeline.serving.limits import Limits, RequestError
from vico.inference.picture_encoding import EncodedPicture
from vico.inference.sampling import Token


class AnswerDecoder(Protocol):
    """What the engine asks of a decoder: `vico.inference.decoding.Decoder`, or one whose steps vLLM computes.

    The rows are its own. `step` may give a row an error in place of a token.
    """

    @property
    def num_reserved(self) -> int: ...
    def fits(self, num_tokens: int) -> bool: ...
    def reserve(self, num_tokens: int) -> Any: ...
    def remove(self, row: Any) -> None: ...
    def step(self) -> Sequence[tuple[Any, Token | RequestError]]: ...


class AnswerEngine(Protocol):
    """What the HTTP side asks of an engine: `pipeline.serving.engine.Engine`, or one that passes jobs on to
    replicas."""

    served: ServedModel
    limits: Limits

    @property
    def status(self) -> str: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_reserved(self) -> float: ...
    @property
    def num_replicas(self) -> int: ...
    def submit(self, job: Job) -> None: ...
    def cancel(self, job: Job) -> None: ...
    def drain(self) -> None: ...
    def stop(self) -> None: ...


@dataclass(eq=False)
class Running:
    """A job with a row in the decoder. `pictures` has None for those that are not encoded yet."""

    job: Job
    row: Any
    text: GrowingText
    pictures: list[EncodedPicture | None] = field(default_factory=list)
    prompt: RoutedPrompt | None = None

    @property
    def encoded(self) -> list[EncodedPicture] | None:
        """Return all pictures, or None if one is not encoded yet."""
        encoded = [picture for picture in self.pictures if picture is not None]
        return encoded if len(encoded) == len(self.pictures) else None

    def picture_key(self, number: int) -> Hashable:
        """Return what the encoded tiles of a picture depend on."""
        return self.job.chat.pictures[number].digest, self.job.prompt.tilings[number]

    def add(self, token: Token, end_of_turn_id: int) -> bool:
        """Send what a token adds to the answer, and return whether it ends there."""
        assert self.prompt is not None
        is_end = token.id == end_of_turn_id
        new_text = self.text.add(token, is_end)
        is_stopped = is_end or self.text.is_stopped
        if is_stopped or self.text.num_tokens >= self.prompt.max_new_tokens:
            self._finish(new_text, "stop" if is_stopped else "length")
            return True
        if new_text:
            self.job.emit(Event(new_text, logprobs=self.text.logprobs()))
        return False

    def _finish(self, new_text: str, reason: str) -> None:
        assert self.prompt is not None
        num_prompt = self.job.prompt.skeleton.num_text_tokens + self.prompt.num_visual_tokens
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.text.num_tokens,
            "total_tokens": num_prompt + self.text.num_tokens,
            "prompt_tokens_details": {"image_tokens": self.prompt.num_visual_tokens},
        }
        text = new_text + self.text.rest()
        report = self.prompt.routed.report
        self.job.emit(Event(text, reason, usage, report, logprobs=self.text.logprobs()))
