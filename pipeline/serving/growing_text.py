"""The text of token ids that arrive one at a time."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes an incomplete character to."""


class GrowingText:
    """Gives new text as soon as it cannot change any more; an incomplete character is held back."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""
        self.num_tokens = 0

    def add(self, token_id: int | None) -> str:
        """Add one id and return the new text; None counts as a token without text."""
        self.num_tokens += 1
        if token_id is None:
            return ""
        self._ids.append(token_id)
        text = self._text()
        return "" if text.endswith(_INCOMPLETE) else self._new(text)

    def rest(self) -> str:
        """Return the text that is still held back."""
        return self._new(self._text())

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=False))

    def _new(self, text: str) -> str:
        new = text[len(self._given) :]
        self._given = text
        return new
