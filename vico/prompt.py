"""Turn a conversation into token ids with one slot per tile, and mark which tokens are answers.

The prompt is ChatML as InternVL writes it. `vico/packing.py` widens the slot of a tile to the number of
tokens of its rate.

Shapes: L tokens of a skeleton.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vico.errors import UserError
from vico.model_files import check_model_folder
from vico.settings import ModelSettings, load_settings
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
"""One turn of a conversation: `from` (human, gpt or system), `value`, its text, and `loss`: false for an answer
that is in the prompt and not learned."""
# Ids of short questions are cached, as many data sets repeat theirs.
_MAX_CACHED_TURNS, _MAX_CACHED_CHARS = 4096, 200
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_ANSWER_OPENING = f"{TURN_START}assistant\n"
_IMAGE = f"{IMAGE_START}{IMAGE_TOKEN}{IMAGE_END}"
_NO_ANSWER = slice(0, 0)
_CONTROL_FORM = re.compile(r"<\|.+\|>")


@dataclass(frozen=True)
class Skeleton:
    """A conversation as ids: `ids` int64 [L] with one image token per tile, `answer` bool [L].

    `answer` is true on the tokens of learned answers and on the end-of-turn token after each.
    """

    ids: np.ndarray
    answer: np.ndarray
    num_tiles: int

    @property
    def num_text_tokens(self) -> int:
        return len(self.ids) - self.num_tiles

    @property
    def num_answer_tokens(self) -> int:
        return int(self.answer.sum())


class SpelledToken(ValueError):
    """A text spells a token that only the prompt may write, with which it could end its own turn."""


class PromptFormat:
    """Turns conversations into skeletons with one tokenizer.

    `control_tokens` are the tokens that only the prompt may write; a conversation that spells one is refused.
    Raises UserError at construction if the tokenizer lacks InternVL's special tokens, or gives the image
    token another id than config.json.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: ModelSettings, folder: str = ""):
        self.tokenizer, self.settings, self.folder = tokenizer, settings, folder
        ids: dict[str, int] = {}
        for token in PROMPT_TOKENS:
            token_id = tokenizer.convert_tokens_to_ids(token)
            if not isinstance(token_id, int) or token_id == tokenizer.unk_token_id:
                raise UserError(f"{folder}: the tokenizer has no token {token}; InternVL prompts need it")
            ids[token] = token_id
        if ids[IMAGE_TOKEN] != settings.image_token_id:
            raise UserError(
                f"{folder}: config.json says image_token_id={settings.image_token_id} but the tokenizer "
                f"gives {IMAGE_TOKEN} the id {ids[IMAGE_TOKEN]}; use the tokenizer the model was trained with"
            )
        self._ids = ids
        self.end_of_turn_id = ids[TURN_END]
        self._control = {token_id: token for token, token_id in ids.items()} | _other_control_tokens(
            tokenizer
        )
        self.control_tokens = tuple(self._control.values())
        self._is_plain = frozenset(self._control).isdisjoint
        # a tokenizer written in Python has no backend
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()  # a tokenizer.json may turn these on
            self._backend.no_padding()
            self._backend.encode_special_tokens = False  # `split_special_tokens` turns it on
            # The texts of one conversation are too few for several threads, and a fork would break their
            # pool.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._image_ids = [ids[token] for token in (IMAGE_START, IMAGE_TOKEN, IMAGE_END)]
        self._cached_ids: dict[str, list[int]] = {}
        self._answer_opening, turn_ids = self._texts_ids([_ANSWER_OPENING, _turn_text("human", IMAGE_MARK)])
        if self._spelled_token("human", IMAGE_MARK, turn_ids):
            raise UserError(
                f"{folder}: the tokenizer splits {', '.join(PROMPT_TOKENS)} when they are in a text; "
                "list them in the added_tokens of tokenizer.json"
            )

    def _texts_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; tokens spelled out in it are encoded as such."""
        if self._backend is None:
            return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        # What the call above ends in. The call adds about 0.2 ms, half of the time to shard a sample.
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _turns_ids(self, conversation: Sequence[Turn]) -> list[list[int]]:
        """Return the ids of each turn with one image token per picture; cache those of short questions.

        A turn is encoded as one text, because a token may span its parts: Qwen's tokenizer merges the line
        break after the role with line breaks that begin the value.
        """
        cached = [
            self._cached_ids.get(turn["value"]) if turn["from"] == "human" else None for turn in conversation
        ]
        new = [turn for turn, ids in zip(conversation, cached, strict=True) if ids is None]
        encoded = iter(self._texts_ids([_turn_text(turn["from"], turn["value"]) for turn in new]))
        turns_ids: list[list[int]] = []
        for turn, ids in zip(conversation, cached, strict=True):
            speaker, value = turn["from"], turn["value"]
            if ids is None:
                ids = next(encoded)
                if spelled := self._spelled_token(speaker, value, ids):
                    raise SpelledToken(f"turn {len(turns_ids)}: the text spells the token {spelled}")
                if speaker == "human" and len(value) <= _MAX_CACHED_CHARS:
                    if len(self._cached_ids) >= _MAX_CACHED_TURNS:
                        self._cached_ids = {}
                    self._cached_ids[value] = ids
            turns_ids.append(ids)
        return turns_ids

    def _spelled_token(self, speaker: str, value: str, ids: Sequence[int]) -> str:
        """Return the control token that the value of a turn spells, or "" if `ids` has only the prompt's."""
        num_images = 0 if speaker == "gpt" else value.count(IMAGE_MARK)
        if not num_images and self.end_of_turn_id in ids:  # quicker than the rule below, for long answers
            end = ids.index(self.end_of_turn_id)
            inside, after = ids[1:end], ids[end + 1 :]
            if ids[0] == self._ids[TURN_START] and self._is_plain(inside) and self._is_plain(after):
                return ""
        control = [token_id for token_id in ids if token_id in self._control]
        if control == [self._ids[TURN_START], *self._image_ids * num_images, self._ids[TURN_END]]:
            return ""
        texts = self._texts_ids([value] if speaker == "gpt" else value.split(IMAGE_MARK))
        spelled = (self._control[n] for n in chain.from_iterable(texts) if n in self._control)
        return next(spelled, TURN_END)  # else the value changes how the token after it is encoded

    def _parts(
        self, conversation: Sequence[Turn], tiles_per_image: Sequence[int], add_generation_prompt: bool
    ) -> Iterator[tuple[list[int], slice]]:
        """Yield the ids of each turn and which of them are an answer; raise as `encode` does."""
        for turn in conversation:
            if turn["from"] not in _ROLES:
                raise ValueError(f"from={turn['from']!r} is not one of {', '.join(_ROLES)}")
        tiles = iter(tiles_per_image)
        for turn, ids in zip(conversation, self._turns_ids(conversation), strict=True):
            if turn["from"] == "gpt":
                answer = slice(self._answer_start(turn["value"], ids), ids.index(self.end_of_turn_id) + 1)
                yield ids, answer if is_learned(turn) else _NO_ANSWER
            else:
                yield self._with_tiles(ids, tiles), _NO_ANSWER
        if left := len(list(tiles)):
            raise ValueError(f"{left} more pictures than {IMAGE_MARK} marks")
        if add_generation_prompt:
            yield self._answer_opening, _NO_ANSWER

    def _answer_start(self, value: str, ids: list[int]) -> int:
        """Return the position of the first answer token in the ids of an answer's turn.

        It is the first token that begins in the value. A token that begins in the role line and reaches into
        the value is not an answer token: a model that answers finds the role line written.
        """
        num_tokens = len(self._answer_opening)
        if self._backend is None or ids[:num_tokens] == self._answer_opening:
            return num_tokens
        offsets = self._backend.encode(_turn_text("gpt", value), add_special_tokens=False).offsets
        return next(n for n, (begin, _) in enumerate(offsets) if begin >= len(_ANSWER_OPENING))

    def _with_tiles(self, ids: list[int], tiles: Iterator[int]) -> list[int]:
        """Return the ids of a turn with one image token per tile; each picture takes the next of `tiles`."""
        image, start = self.settings.image_token_id, 0
        expanded: list[int] = []
        for _ in range(ids.count(image)):
            count = next(tiles, None)
            if count is None:
                raise ValueError(f"more {IMAGE_MARK} marks than pictures")
            place = ids.index(image, start)
            expanded += ids[start:place] + [image] * count
            start = place + 1
        return expanded + ids[start:] if start else ids

    def encode(
        self,
        conversation: Sequence[Turn],
        tiles_per_image: Sequence[int],
        add_generation_prompt: bool = False,
    ) -> Skeleton:
        """Return the skeleton of a conversation `[{"from": "human" | "gpt" | "system", "value": str}, ...]`.

        With `add_generation_prompt` it ends with the opening of an assistant turn. Raises ValueError if a
        speaker is unknown or if `<image>` marks and pictures differ in number, and SpelledToken if a text
        spells one of `control_tokens`.
        """
        ids: list[int] = []
        answer: list[bool] = []
        for new_ids, answered in self._parts(conversation, tiles_per_image, add_generation_prompt):
            ids += new_ids
            answer += [False] * answered.start + [True] * (answered.stop - answered.start)
            answer += [False] * (len(new_ids) - answered.stop)
        return Skeleton(np.asarray(ids, np.int64), np.asarray(answer, bool), sum(tiles_per_image))

    def num_tokens(self, conversation: Sequence[Turn], tiles_per_image: Sequence[int]) -> tuple[int, int]:
        """Return (text tokens, answer tokens) of the skeleton of `encode`, without building it.

        Raises as `encode` does.
        """
        num_tokens = num_answer_tokens = 0
        for ids, answered in self._parts(conversation, tiles_per_image, False):
            num_tokens += len(ids)
            num_answer_tokens += answered.stop - answered.start
        return num_tokens - sum(tiles_per_image), num_answer_tokens


def is_learned(turn: Turn) -> bool:
    """Return whether a turn is an answer to learn; a turn with `loss: false` is only context."""
    return turn["from"] == "gpt" and turn.get("loss") is not False


def _turn_text(speaker: str, value: str) -> str:
    """Return a turn as text, one image token for each picture; an answer shows no pictures."""
    shown = value if speaker == "gpt" else value.replace(IMAGE_MARK, _IMAGE)
    return f"{TURN_START}{_ROLES[speaker]}\n{shown}{TURN_END}\n"


def _other_control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """Return the tokenizer's own control tokens, id -> text: those it calls special, and those written <|..|>.

    InternVL's tokens for content (`<ref>`) are none. The unknown token is none either, because any strange
    character may become it.
    """
    return {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if (token.special or _CONTROL_FORM.fullmatch(token.content))
        and token.content not in CONTENT_TOKENS
        and token_id != tokenizer.unk_token_id
    }


def load_prompt_format(model_path: str | Path) -> PromptFormat:
    """Return the prompt format of a model folder: its tokenizer (without remote code) and its settings."""
    from transformers import AutoTokenizer

    settings = load_settings(check_model_folder(model_path))
    tokenizer = AutoTokenizer.from_pretrained(str(model_path), trust_remote_code=False, local_files_only=True)
    return PromptFormat(tokenizer, settings, str(model_path))


def check_same_tokens(policy: PromptFormat, reference: PromptFormat) -> None:
    """Raise UserError if the tokenizers of policy and reference give a token different ids.

    Both models read the same ids, so one of them would read other words.
    """
    policy_ids, reference_ids = policy.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    if policy_ids != reference_ids:
        differing = {token for token, _ in policy_ids.items() ^ reference_ids.items()}
        token = min(differing, key=lambda token: (policy_ids.get(token, reference_ids.get(token)), token))
        raise UserError(
            f"the tokenizer of {policy.folder} gives the token {token!r} the id {policy_ids.get(token)}, the "
            f"tokenizer of {reference.folder} {reference_ids.get(token)} ({len(differing)} tokens differ); "
            "give a policy that was trained from the model in inputs.model"
        )
