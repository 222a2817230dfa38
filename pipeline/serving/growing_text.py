"""The text of token ids that arrive one at a time, up to a stop text, with OpenAI's log-probabilities."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vico.inference.sampling import Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes an incomplete character to."""


class GrowingText:
    """Gives new text as soon as it cannot change any more.

    An incomplete character is held back, and so is what may be the beginning of a stop text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._text = ""
        self._num_given = 0
        self._logprobs: list[tuple[int, Mapping[str, Any]]] = []
        self._is_over = False
        self.num_tokens = 0
        self.is_stopped = False
        """Whether the text reached a stop text, which it does not contain."""

    def add(self, token: Token, is_end: bool) -> str:
        """Add a token and return the new text; the end of turn is a token without text."""
        self.num_tokens += 1
        if is_end:
            return ""
        if token.logprob is not None:
            start = len(self._text.rstrip(_INCOMPLETE))
            self._logprobs.append((start, self._scores(token)))
        self._ids.append(token.id)
        self._text = str(self._tokenizer.decode(self._ids, skip_special_tokens=False))
        self._cut(len(self._text.rstrip(_INCOMPLETE)))
        if self.is_stopped:
            return self.rest()
        return "" if self._text.endswith(_INCOMPLETE) else self._given_up_to(self._num_settled())

    def rest(self) -> str:
        """Return the text that is still held back, at the end of the answer."""
        self._is_over = True
        self._cut(len(self._text))  # what is incomplete now stays so
        return self._given_up_to(len(self._text))

    def logprobs(self) -> tuple[Mapping[str, Any], ...]:
        """Return the entries of the tokens whose text was given since the last call."""
        has_text = self._is_over and not self.is_stopped  # then tokens without text are given too
        given = [entry for start, entry in self._logprobs if has_text or start < self._num_given]
        self._logprobs = [] if self._is_over else self._logprobs[len(given) :]
        return tuple(given)

    def _cut(self, end: int) -> None:
        """Cut the text at the first stop text that ends before `end`."""
        if self.is_stopped:
            return
        places = [self._text.find(stop, self._searched(stop), end) for stop in self._stop]
        if cuts := [place for place in places if place >= 0]:
            self._text, self.is_stopped = self._text[: min(cuts)], True

    def _searched(self, stop: str) -> int:
        return max(0, self._num_given - len(stop) + 1)

    def _num_settled(self) -> int:
        """Return how much of the text cannot become part of a stop text."""
        held = [
            n
            for stop in self._stop
            for n in range(1, min(len(stop), len(self._text) + 1))
            if self._text.endswith(stop[:n])
        ]
        return len(self._text) - max(held, default=0)

    def _given_up_to(self, end: int) -> str:
        new = self._text[self._num_given : end]
        self._num_given = max(end, self._num_given)
        return new

    def _scores(self, token: Token) -> Mapping[str, Any]:
        assert token.logprob is not None
        top = [self._score(token_id, logprob) for token_id, logprob in token.top]
        return {**self._score(token.id, token.logprob), "top_logprobs": top}

    def _score(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = str(self._tokenizer.decode([token_id], skip_special_tokens=False))
        # A token that is a part of a character has no text of its own, and its bytes are not known here.
        encoded = None if _INCOMPLETE in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": encoded}
