"""The model behind `vico serve`: one thread that answers one conversation after another, token by token.

Requests hand a Job in and hear of it through callbacks; nothing here knows of HTTP.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.serving.requests import Chat, Limits, Picture, RequestError
from vico.inference.generation import streamed_answer
from vico.inference.routing import absolute_rule, published_rule
from vico.inference.tile_losses import EncodedTiles, num_tokens
from vico.model.internvl import VicoModel
from vico.prompt import PromptFormat, Skeleton
from vico.tiling import Tiling, num_tiles, pixel_values

logger = logging.getLogger(__name__)
_BATCH_TILES = 16


@dataclass(frozen=True)
class Event:
    """A piece of an answer. The last one has `finish_reason`, or `error`, and the usage so far."""

    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    routing: Mapping[str, Any] | None = None
    error: RequestError | None = None


@dataclass
class Job:
    """A conversation to answer; `tell` is called from the engine's thread. `cancel` ends it early."""

    chat: Chat
    tell: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Engine:
    """Answers jobs in their order in a thread of its own, at the most likely token each time."""

    def __init__(
        self,
        model: VicoModel,
        prompts: PromptFormat,
        limits: Limits,
        threshold: float | None,
        relative_threshold: float = 0.0,
    ):
        self.model, self.prompts, self.limits = model, prompts, limits
        self.threshold, self.relative_threshold = threshold, relative_threshold
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        if self._stopping.is_set():
            job.tell(Event(error=_stopping_error()))
        else:
            self._jobs.put(job)

    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping.is_set()

    def stop(self) -> None:
        """Ends the answer under way at its next token and refuses those that wait."""
        self._stopping.set()
        self._jobs.put(None)

    def join(self) -> None:
        """Returns when the thread has ended: torch must not be at work while the interpreter goes down."""
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._answer(job)
            except RequestError as error:
                job.tell(Event(error=error))
            except Exception as error:  # the border of the engine: the client hears of it, the next job runs
                logger.exception("an answer failed")
                kind = type(error).__name__
                job.tell(Event(error=RequestError(f"the model failed ({kind}); see the log", status=500)))

    def _check_goes_on(self, job: Job) -> None:
        if self._stopping.is_set():
            raise _stopping_error()
        if job.cancelled.is_set():
            raise RequestError("the client went away", status=499)

    @torch.no_grad()
    def _answer(self, job: Job) -> None:
        self._check_goes_on(job)
        chat = job.chat
        tilings = [self.model.settings.tiling(one.max_tiles) for one in chat.pictures]
        skeleton, counts = self._skeleton(chat, tilings)
        tiles, p_compress_N = self._encoded(job, tilings)
        compressed_N, routing = self._routed(chat, p_compress_N, counts)
        prompt = (skeleton, compressed_N, 0)
        num_prompt = num_tokens(prompt, self.model.settings)
        room = self.limits.total_tokens - num_prompt
        wanted = chat.max_new_tokens or max(min(self.limits.new_tokens, room), 1)
        if wanted > room:
            raise _too_long(f"{num_prompt} prompt tokens and max_tokens={wanted}", self.limits)
        text = _GrowingText(self.prompts.tokenizer)
        last_id: list[int] = []

        def on_token(token_id: int) -> bool:
            self._check_goes_on(job)
            last_id[:] = [token_id]
            piece = text.piece(None if token_id == self.prompts.end_of_turn_id else token_id)
            if piece:
                job.tell(Event(piece))
            return False

        streamed_answer(
            tiles,
            prompt,
            end_of_turn_id=self.prompts.end_of_turn_id,
            max_new_tokens=wanted,
            on_token=on_token,
        )
        visual = num_prompt - skeleton.num_text_tokens
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": text.num_tokens,
            "total_tokens": num_prompt + text.num_tokens,
            "prompt_tokens_details": {"image_tokens": visual},
        }
        reason = "stop" if last_id == [self.prompts.end_of_turn_id] else "length"
        job.tell(Event(text.rest(), reason, usage, routing))

    def _skeleton(self, chat: Chat, tilings: Sequence[Tiling]) -> tuple[Skeleton, list[int]]:
        """The prompt's skeleton and the tiles of each picture, from the pictures' sizes alone."""
        settings = self.model.settings
        counts = [
            num_tiles(one.width, one.height, tiling)
            for one, tiling in zip(chat.pictures, tilings, strict=True)
        ]
        skeleton = self.prompts.encode(chat.turns, counts, add_generation_prompt=True)
        fewest = settings.tokens_compressed if self.model.router is not None else settings.tokens_full
        least = skeleton.num_text_tokens + sum(counts) * fewest
        if least >= self.limits.total_tokens:  # before any picture costs time
            raise _too_long(f"at least {least} prompt tokens", self.limits)
        return skeleton, counts

    def _encoded(self, job: Job, tilings: Sequence[Tiling]) -> tuple[EncodedTiles, torch.Tensor | None]:
        """Visual tokens of all tiles, and P(compress) float32 [N] where there is a router. One picture at a
        time is decoded.
        """
        model, weight = self.model, self.model.lm_head.weight
        routed = model.router is not None and model.compressed_connector is not None
        full = [weight.new_zeros(0, model.settings.tokens_full, model.language_width)]
        compressed = [weight.new_zeros(0, model.settings.tokens_compressed, model.language_width)]
        p_compress = [torch.zeros(0)]
        for picture, tiling in zip(job.chat.pictures, tilings, strict=True):
            self._check_goes_on(job)
            pixels = _pixels(picture, tiling)
            for start in range(0, len(pixels), _BATCH_TILES):
                self._check_goes_on(job)
                batch = torch.from_numpy(pixels[start : start + _BATCH_TILES]).to(weight.device)
                features_NPv = model.vision_features(batch)
                full.append(model.full_tokens(features_NPv))
                if routed:
                    compressed.append(model.compressed_tokens(features_NPv))
                    p_compress.append(model.router.compress_probability(features_NPv).cpu())
        tiles = EncodedTiles(model, torch.cat(full), torch.cat(compressed) if routed else None)
        return tiles, torch.cat(p_compress) if routed else None

    def _routed(
        self, chat: Chat, p_compress_N: torch.Tensor | None, counts: list[int]
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Which tiles are compressed, bool [N], and the report on it."""
        asked = chat.request.vico
        rule = asked.rule or ("full" if p_compress_N is None else "absolute")
        threshold = self.threshold if asked.threshold is None else asked.threshold
        if rule != "full" and p_compress_N is None:
            raise RequestError(
                f"vico.rule={rule}: this model has no router; leave vico.rule out", "vico.rule"
            )
        if rule == "full":
            compressed_N = torch.zeros(sum(counts), dtype=torch.bool)
            threshold = None
        elif rule == "absolute":
            compressed_N = absolute_rule(p_compress_N, threshold)
        else:
            compressed_N = published_rule(p_compress_N, self.relative_threshold, threshold)
        settings = self.model.settings
        owners = [(picture, tile) for picture, count in enumerate(counts) for tile in range(count)]
        tiles = [
            {
                "image": picture,
                "tile": tile,
                "p_compress": None if p_compress_N is None else p_compress_N[n].item(),
                "compressed": bool(compressed_N[n]),
                "tokens": settings.tokens_compressed if compressed_N[n] else settings.tokens_full,
            }
            for n, (picture, tile) in enumerate(owners)
        ]
        visual, full = sum(tile["tokens"] for tile in tiles), len(tiles) * settings.tokens_full
        report = {"rule": rule, "threshold": threshold, "visual_tokens": visual, "visual_tokens_full": full}
        return compressed_N.numpy(), {**report, "tiles": tiles}


def _pixels(picture: Picture, tiling: Tiling) -> np.ndarray:
    """A picture's tiles, float32 [N, 3, S, S]; the decoded picture is let go."""
    return pixel_values(picture.decoded(), tiling)


def _stopping_error() -> RequestError:
    return RequestError("the server is stopping", status=503, code="stopping")


def _too_long(what: str, limits: Limits) -> RequestError:
    message = (
        f"{what} are more than the {limits.total_tokens} tokens that prompt and answer may have together"
    )
    return RequestError(message, "messages", code="context_length_exceeded")


class _GrowingText:
    """The text of ids that arrive one by one; what may still change (half a character) is held back."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = ""
        self.num_tokens = 0

    def piece(self, token_id: int | None) -> str:
        """The new text after one more id; None counts as a token without text."""
        self.num_tokens += 1
        if token_id is None:
            return ""
        self._ids.append(token_id)
        text = self._text()
        return "" if text.endswith("\ufffd") else self._new(text)

    def rest(self) -> str:
        """What is still held back."""
        return self._new(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)

    def _new(self, text: str) -> str:
        new = text[len(self._told) :]
        self._told = text
        return new
