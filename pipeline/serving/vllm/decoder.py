"""A decoder whose steps vLLM computes: the engine uses it like `vico.inference.decoding.Decoder`.

Each row is one streamed request to vLLM's completions, with the prompt as embeddings.
"""

import base64
import http.client
import io
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.serving.limits import RequestError
from pipeline.serving.vllm.process import MODEL_NAME, VllmProcess
from vico.inference.sampling import GREEDY, Sampling, Token

_TIMEOUT_S = 600
_TOKEN_ID = "token_id:"


@dataclass(eq=False)
class VllmRow:
    """Room for a prompt and its answer, and the request to vLLM once the prompt is there."""

    capacity: int
    decoder: "VllmDecoder"
    num_unread: int = 0
    is_removed: bool = False
    connection: http.client.HTTPConnection | None = field(default=None, repr=False)

    def start(self, embeds_LD: torch.Tensor, max_new_tokens: int, sampling: Sampling = GREEDY) -> None:
        """Send the prompt to vLLM, from a thread."""
        num_tokens = len(embeds_LD) + max_new_tokens
        if num_tokens > self.capacity:
            raise ValueError(f"{num_tokens} tokens do not fit in a row of {self.capacity}")
        self.capacity = num_tokens
        self.decoder.ask(self, embeds_LD.cpu(), max_new_tokens, sampling)


class VllmDecoder:
    """Rows that vLLM decodes. A row whose request fails gets the error in place of a token."""

    def __init__(
        self,
        process: VllmProcess,
        cache_tokens: int,
        max_rows: int,
        end_of_turn_id: int,
        wake: Callable[[], object] = lambda: None,
    ):
        self.process, self.cache_tokens, self.max_rows = process, cache_tokens, max_rows
        self.end_of_turn_id, self.wake = end_of_turn_id, wake
        self.rows: list[VllmRow] = []
        self._tokens: queue.SimpleQueue[tuple[VllmRow, Token | RequestError]] = queue.SimpleQueue()
        # a removed row may take a moment to notice, while its successor already asks
        self._pool = ThreadPoolExecutor(2 * max_rows, thread_name_prefix="vllm")
        self._lock = threading.Lock()

    @property
    def num_reserved(self) -> int:
        return sum(row.capacity for row in self.rows)

    def fits(self, num_tokens: int) -> bool:
        """Return whether another row can be added now; while vLLM starts again, none can."""
        has_room = len(self.rows) < self.max_rows and self.num_reserved + num_tokens <= self.cache_tokens
        return has_room and self.process.is_ready

    def reserve(self, num_tokens: int) -> VllmRow:
        row = VllmRow(num_tokens, self)
        self.rows.append(row)
        return row

    def remove(self, row: VllmRow) -> None:
        """Forget a row; vLLM drops its request when the connection ends."""
        self.rows.remove(row)
        with self._lock:
            row.is_removed = True
            if row.connection is not None and row.connection.sock is not None:
                with suppress(OSError):
                    row.connection.sock.shutdown(socket.SHUT_RDWR)

    def step(self) -> list[tuple[VllmRow, Token | RequestError]]:
        """Return the tokens that came since the last call."""
        tokens: list[tuple[VllmRow, Token | RequestError]] = []
        while True:
            try:
                row, token = self._tokens.get_nowait()
            except queue.Empty:
                return tokens
            if not row.is_removed:
                tokens.append((row, token))

    def close(self) -> None:
        self.process.stop()
        self._pool.shutdown(cancel_futures=True)

    def ask(self, row: VllmRow, embeds_LD: torch.Tensor, max_new_tokens: int, sampling: Sampling) -> None:
        """Ask for a row's tokens, from a thread; `step` gives them."""
        self._pool.submit(self._work, row, embeds_LD, max_new_tokens, sampling)

    def _work(self, row: VllmRow, embeds_LD: torch.Tensor, max_new_tokens: int, sampling: Sampling) -> None:
        try:
            for token in self._answer(row, embeds_LD, max_new_tokens, sampling):
                self._put(row, token)
        except RequestError as error:
            self._put(row, error)
        except Exception as error:
            self._put(row, _failed(type(error).__name__))

    def _put(self, row: VllmRow, token: Token | RequestError) -> None:
        self._tokens.put((row, token))
        self.wake()

    def _answer(
        self, row: VllmRow, embeds_LD: torch.Tensor, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[Token]:
        """Yield the tokens of an answer; its end of turn, which vLLM leaves out, included."""
        body = self._body(embeds_LD, max_new_tokens, sampling)
        connection = http.client.HTTPConnection("127.0.0.1", self.process.port, timeout=_TIMEOUT_S)
        with closing(connection):
            with self._lock:
                if row.is_removed:
                    return
                connection.connect()
                row.connection = connection
            headers = {"Authorization": f"Bearer {self.process.key}", "Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", body, headers)
            response = connection.getresponse()
            if response.status != 200:
                reason = response.read(2000).decode(errors="replace")[:300]
                if response.status >= 500:
                    raise _failed(reason)
                raise RequestError(f"vLLM refused the prompt: {reason}", status=500)
            num_tokens, finish_reason, last_id = 0, None, None
            for choice in _choices(response):
                for token in _tokens(choice, sampling):
                    num_tokens, last_id = num_tokens + 1, token.id
                    yield token
                finish_reason = choice.get("finish_reason") or finish_reason
            if finish_reason is None:
                raise RuntimeError("vLLM's stream ended early")
            if finish_reason == "stop" and last_id != self.end_of_turn_id:
                yield Token(self.end_of_turn_id)

    def _body(self, embeds_LD: torch.Tensor, max_new_tokens: int, sampling: Sampling) -> bytes:
        file = io.BytesIO()
        torch.save(embeds_LD.contiguous().clone(), file)
        fields: dict[str, Any] = {
            "model": MODEL_NAME,
            "prompt_embeds": base64.b64encode(file.getbuffer()).decode(),
            "max_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": [self.end_of_turn_id],
            "ignore_eos": True,  # at other tokens of generation_config.json the built-in engine goes on, too
            "stream": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }
        if sampling.seed is not None:
            fields["seed"] = sampling.seed % 2**63  # vLLM takes -1 as no seed
        if sampling.top_logprobs is not None:
            fields["logprobs"] = sampling.top_logprobs
        return json.dumps(fields).encode()


def _failed(reason: str) -> RequestError:
    """Return the error of an answer that vLLM began or should have begun; it is started again if it died."""
    message = f"vLLM did not finish the answer ({reason}); try again"
    return RequestError(message, status=503, code="engine_failed", retry_after_s=10)


def _choices(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the choice of each event of a stream; raise RequestError for an error in it."""
    for line in response:
        text = line.decode().strip()
        if not text.startswith("data:") or text == "data: [DONE]":
            continue
        event = json.loads(text.removeprefix("data:"))
        if "error" in event:
            raise _failed(str(event["error"])[:300])
        yield from event.get("choices", ())


def _tokens(choice: dict[str, Any], sampling: Sampling) -> Iterator[Token]:
    ids = choice.get("token_ids") or []
    logprobs = choice.get("logprobs") if sampling.top_logprobs is not None else None
    for n, token_id in enumerate(ids):
        if logprobs is None:
            yield Token(token_id)
            continue
        likeliest = sorted((logprobs["top_logprobs"][n] or {}).items(), key=lambda entry: -entry[1])
        top = tuple((int(name.removeprefix(_TOKEN_ID)), value) for name, value in likeliest)
        yield Token(token_id, logprobs["token_logprobs"][n], top[: sampling.top_logprobs])
