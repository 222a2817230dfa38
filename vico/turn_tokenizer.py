"""Encoding of single turns in InternVL's ChatML; texts that spell the prompt's own tokens are refused.

`vico/prompt.py` joins the turns of a conversation.
"""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from vico.errors import UserError
from vico.special_tokens import (
    CONTENT_TOKENS,
    IMAGE_END,
    IMAGE_MARK,
    IMAGE_START,
    IMAGE_TOKEN,
    PROMPT_TOKENS,
    TURN_END,
    TURN_START,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Turn: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: `from` (human, gpt or system), `value`, its text, and `loss`, false for an
answer that is in the prompt and not learned."""
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
NO_ANSWER = slice(0, 0)
_ANSWER_OPENING = f"{TURN_START}assistant\n"
_IMAGE = f"{IMAGE_START}{IMAGE_TOKEN}{IMAGE_END}"
_CONTROL_FORM = re.compile(r"<\|.+\|>")


class SpelledToken(ValueError):
    """The text of a turn spells a token that only the prompt may write: it could end its own turn with it.

    `turn` counts from 0, the system message included.
    """

    def __init__(self, turn: int, token: str):
        super().__init__(f"turn {turn}: the text spells the token {token}")
        self.turn, self.token = turn, token


class EncodedTurn(NamedTuple):
    """A turn as ids with one image token per picture, and the place of its answer among them.

    The answer of a gpt turn includes its end-of-turn token; other turns have none.
    """

    ids: list[int]
    num_images: int
    answer: slice


class TurnTokenizer:
    """Encodes turns with one tokenizer. `ids` are those of the prompt's tokens, `beginning` those before the
    first turn (the BOS token, if the tokenizer begins its texts with one), `opening` those that begin an
    answer, and `control_tokens` the tokens that only the prompt may write.

    Raises UserError at construction if the tokenizer lacks InternVL's special tokens; `folder` is named.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", folder: str):
        self._tokenizer = tokenizer
        self.ids: dict[str, int] = {}
        for token in PROMPT_TOKENS:
            token_id = tokenizer.convert_tokens_to_ids(token)
            if not isinstance(token_id, int) or token_id == tokenizer.unk_token_id:
                raise UserError(f"{folder}: the tokenizer has no token {token}; InternVL prompts need it")
            self.ids[token] = token_id
        self.beginning = _beginning(tokenizer)
        self._control = {token_id: token for token, token_id in self.ids.items()}
        self._control |= _own_control_tokens(tokenizer)
        self.control_tokens = tuple(self._control.values())
        # a tokenizer written in Python has no backend
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()  # a tokenizer.json may turn these on
            self._backend.no_padding()
            self._backend.encode_special_tokens = False  # `split_special_tokens` turns it on
            # The texts of one conversation are too few for several threads, and a fork would break their
            # pool.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._image_ids = [self.ids[token] for token in (IMAGE_START, IMAGE_TOKEN, IMAGE_END)]
        self.opening, turn_ids = self.texts_ids([_ANSWER_OPENING, _turn_text("human", IMAGE_MARK)])
        if self._spelled_token("human", IMAGE_MARK, turn_ids):
            raise UserError(
                f"{folder}: the tokenizer splits {', '.join(PROMPT_TOKENS)} when they are in a text; "
                "list them in the added_tokens of tokenizer.json"
            )
        self._start_id, self._end_ids = turn_ids[0], turn_ids[turn_ids.index(self.ids[TURN_END]) :]
        # quick to look for; "" is in every text
        self._first = "<" if all(token.startswith("<") for token in self.control_tokens) else ""
        self._search = _text_search(self._backend, self._control) if self._can_cut() else None

    def texts_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; tokens spelled out in it are encoded as such."""
        if self._backend is None:
            return [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        # What the call above ends in. The call adds about 0.2 ms, half of the time to shard a sample.
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encoded(self, conversation: Sequence[Turn], numbers: Sequence[int]) -> list[EncodedTurn]:
        """Return the turns with these numbers. Raises SpelledToken if one spells a control token.

        A turn is encoded as one text, because a token may span its parts: Qwen's tokenizer merges the line
        break after the role with line breaks that begin the value.
        """
        turns = [(conversation[number]["from"], conversation[number]["value"]) for number in numbers]
        turns_ids = (
            self._whole_turns(turns, numbers)
            if self._search is None
            else self._cut_turns(turns, numbers, self._search)
        )
        return [
            EncodedTurn(ids, 0, slice(self._answer_start(value, ids), len(ids) - len(self._end_ids) + 1))
            if speaker == "gpt"
            else EncodedTurn(ids, value.count(IMAGE_MARK), NO_ANSWER)
            for (speaker, value), ids in zip(turns, turns_ids, strict=True)
        ]

    def _whole_turns(self, turns: Sequence[tuple[str, str]], numbers: Sequence[int]) -> list[list[int]]:
        """Return the ids of the turns, in which control tokens are looked for."""
        turns_ids = self.texts_ids([_turn_text(*turn) for turn in turns])
        for number, turn, ids in zip(numbers, turns, turns_ids, strict=True):
            if token := self._spelled_token(*turn, ids):
                raise SpelledToken(number, token)
        return turns_ids

    def _cut_turns(
        self, turns: Sequence[tuple[str, str]], numbers: Sequence[int], search: re.Pattern[str]
    ) -> list[list[int]]:
        """Return the same ids in less time, where control tokens can be looked for in the texts."""
        texts = []
        for number, (speaker, value) in zip(numbers, turns, strict=True):
            if self._first in value and (spelled := search.search(_shown(speaker, value, "\n"))):
                raise SpelledToken(number, spelled.group())
            texts.append(f"{ROLES[speaker]}\n{_shown(speaker, value, _IMAGE)}")
        return [[self._start_id, *ids, *self._end_ids] for ids in self.texts_ids(texts)]

    def _can_cut(self) -> bool:
        """Return whether the ids of a turn stay the same when its first and last tokens are cut off its text.

        They do not if the tokenizer treats the first word of a text in another way.
        """
        texts = [f"assistant\n{value}" for value in ("a", " a", "\na")]
        whole = self.texts_ids([f"{TURN_START}{text}{TURN_END}\n" for text in texts])
        return whole == [[self._start_id, *ids, *self._end_ids] for ids in self.texts_ids(texts)]

    def _spelled_token(self, speaker: str, value: str, ids: Sequence[int]) -> str:
        """Return the control token that the value of a turn spells, or "" if `ids` has only the prompt's."""
        num_images = 0 if speaker == "gpt" else value.count(IMAGE_MARK)
        control = [token_id for token_id in ids if token_id in self._control]
        if control == [self.ids[TURN_START], *self._image_ids * num_images, self.ids[TURN_END]]:
            return ""
        texts = self.texts_ids([value] if speaker == "gpt" else value.split(IMAGE_MARK))
        spelled = (self._control[n] for n in chain.from_iterable(texts) if n in self._control)
        return next(spelled, TURN_END)  # else the value changes how the token after it is encoded

    def _answer_start(self, value: str, ids: list[int]) -> int:
        """Return the position of the first answer token in the ids of an answer's turn.

        It is the first token that begins in the value. A token that begins in the role line and reaches into
        the value is not an answer token: a model that answers finds the role line written.
        """
        num_tokens = len(self.opening)
        if self._backend is None or ids[:num_tokens] == self.opening:
            return num_tokens
        offsets = self._backend.encode(_turn_text("gpt", value), add_special_tokens=False).offsets
        begun = (n for n, (begin, _) in enumerate(offsets) if begin >= len(_ANSWER_OPENING))
        return next(begun, len(ids) - len(self._end_ids))  # the end token may take in all spaces before it


def _beginning(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the BOS token if the tokenizer puts it before every text, as those of Llama and InternLM do."""
    bos = tokenizer.bos_token_id
    with_bos, without = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (True, False))
    return [bos] if bos is not None and with_bos[:1] == [bos] and without[:1] != [bos] else []


def _turn_text(speaker: str, value: str) -> str:
    """Return a turn as text, one image token for each picture; an answer shows no pictures."""
    return f"{TURN_START}{ROLES[speaker]}\n{_shown(speaker, value, _IMAGE)}{TURN_END}\n"


def _shown(speaker: str, value: str, image: str) -> str:
    return value if speaker == "gpt" else value.replace(IMAGE_MARK, image)


def _own_control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Return the tokenizer's own control tokens, id -> text: those it calls special, those written `<|..|>`.

    InternVL's tokens for content (`<ref>`) are not among them. Neither is the unknown token, because any
    strange character may become it.
    """
    return {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if (token.special or _CONTROL_FORM.fullmatch(token.content))
        and token.content not in CONTENT_TOKENS
        and token_id != tokenizer.unk_token_id
    }


def _never_made(model: Any, token_id: int, text: str) -> bool:
    """Return whether the model of a tokenizer has a token that it makes of no text.

    Trainers put the special tokens into the vocabulary of a BPE model, without merges that lead to them. A
    token that merges make within a text is also made of its own characters alone.
    """
    from tokenizers.models import BPE

    if not isinstance(model, BPE) or len(text) == 1 or text == model.unk_token:
        return False
    if model.dropout or model.byte_fallback or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    return all(token.id != token_id for token in model.tokenize(text))


def _text_search(backend: "Tokenizer | None", control: Mapping[int, str]) -> re.Pattern[str] | None:
    """Return a pattern that matches a text exactly when its ids have one of the `control` tokens, or None.

    None means that only the ids tell. The pattern is exact under two conditions. The tokenizer cuts control
    tokens out of the text by their characters alone, and its model, which sees the text after normalisation,
    cannot make one. No added token can begin in the prompt, which has a line break or `>` before a value, or
    reach from the value into the `<` after it.
    """
    if backend is None:  # a tokenizer written in Python
        return None
    added = backend.get_added_tokens_decoder()
    for token_id, text in control.items():
        token = added.get(token_id)
        if token is None or token.content != text:
            return None
        if token.lstrip or token.rstrip or token.single_word or (token.normalized and backend.normalizer):
            return None
        if backend.model.token_to_id(text) is not None and not _never_made(backend.model, token_id, text):
            return None
    texts = [token.content for token in added.values()]
    if any("<" in text[1:] or ">" in text[:-1] or "\n" in text for text in texts):
        return None
    return re.compile("|".join(map(re.escape, sorted(control.values(), key=len, reverse=True))))
