"""Turn a conversation into token ids with one slot per tile, and mark which tokens are answers.

The prompt is ChatML as InternVL writes it. `vico/packing.py` widens the slot of a tile to the number of
tokens of its rate.

Shapes: L tokens of a skeleton.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vico.errors import UserError
from vico.model_files import check_model_folder
from vico.settings import ModelSettings, load_settings
from vico.special_tokens import IMAGE_END, IMAGE_MARK, IMAGE_START, IMAGE_TOKEN, TURN_END, TURN_START

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Turn: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: `from` (human, gpt or system), `value`, its text, and `loss`: false for an answer
that is in the prompt and not learned."""
# Ids of short questions are cached, as many data sets repeat theirs.
_MAX_CACHED_TEXTS, _MAX_CACHED_CHARS = 4096, 200
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


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


class PromptFormat:
    """Turns conversations into skeletons with one tokenizer.

    Raises UserError at construction if the tokenizer lacks InternVL's special tokens, or gives the image
    token another id than config.json.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: ModelSettings, folder: str = ""):
        self.tokenizer, self.settings, self.folder = tokenizer, settings, folder
        special_tokens = (IMAGE_START, IMAGE_END, IMAGE_TOKEN, TURN_START, TURN_END)
        ids: dict[str, int] = {}
        for token in special_tokens:
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
        # a tokenizer written in Python has no backend
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()  # a tokenizer.json may turn these on
            self._backend.no_padding()
            # The texts of one conversation are too few for several threads, and a fork would break their
            # pool.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._cached_ids: dict[str, list[int]] = {"": []}
        self._newline = self._text_ids("\n")
        self._openings = {role: [ids[TURN_START], *self._text_ids(f"{role}\n")] for role in _ROLES.values()}

    def _text_ids(self, text: str) -> list[int]:
        return self._texts_ids([text])[0]

    def _texts_ids(self, texts: Sequence[str], cached: Collection[str] = ()) -> list[list[int]]:
        """Return the ids of each text, and cache those of texts in `cached` for later calls.

        Special tokens spelled out in a text (`<ref>`) are encoded as such.
        """
        ids = {text: self._cached_ids[text] for text in texts if text in self._cached_ids}
        new = [text for text in dict.fromkeys(texts) if text not in ids]
        if not new:
            encoded = []
        elif self._backend is None:
            encoded = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in new]
        else:
            # What the call above ends in. The call adds about 0.2 ms, half of the time to shard a sample.
            encodings = self._backend.encode_batch_fast(new, add_special_tokens=False)
            encoded = [encoding.ids for encoding in encodings]
        ids.update(zip(new, encoded, strict=True))
        if len(self._cached_ids) > _MAX_CACHED_TEXTS:
            self._cached_ids = {"": []}
        self._cached_ids.update(
            (text, ids[text]) for text in new if len(text) <= _MAX_CACHED_CHARS and text in cached
        )
        return [ids[text] for text in texts]

    def _parts(
        self, conversation: Sequence[Turn], tiles_per_image: Sequence[int], add_generation_prompt: bool
    ) -> Iterator[tuple[list[int], bool]]:
        """Yield (ids, whether they are an answer) of the conversation's parts; raise as `encode` does."""
        roles = _roles(conversation)
        parts = [
            [turn["value"]] if role == "assistant" else turn["value"].split(IMAGE_MARK)
            for role, turn in zip(roles, conversation, strict=True)
        ]
        questions = {text for role, part in zip(roles, parts, strict=True) if role == "user" for text in part}
        texts = iter(self._texts_ids(list(chain.from_iterable(parts)), cached=questions))
        tiles = iter(tiles_per_image)
        for turn, role, part in zip(conversation, roles, parts, strict=True):
            yield self._openings[role], False
            if role == "assistant":
                yield [*next(texts), self._ids[TURN_END]], is_learned(turn)
                yield self._newline, False
                continue
            yield next(texts), False
            for _ in part[1:]:
                yield [*self._image(tiles), *next(texts)], False
            yield [self._ids[TURN_END], *self._newline], False
        if left := len(list(tiles)):
            raise ValueError(f"{left} more pictures than {IMAGE_MARK} marks")
        if add_generation_prompt:
            yield self._openings["assistant"], False

    def _image(self, tiles: Iterator[int]) -> list[int]:
        """Return the ids of one `<image>`, which takes the next count of `tiles`."""
        count = next(tiles, None)
        if count is None:
            raise ValueError(f"more {IMAGE_MARK} marks than pictures")
        return [self._ids[IMAGE_START], *[self._ids[IMAGE_TOKEN]] * count, self._ids[IMAGE_END]]

    def encode(
        self,
        conversation: Sequence[Turn],
        tiles_per_image: Sequence[int],
        add_generation_prompt: bool = False,
    ) -> Skeleton:
        """Return the skeleton of a conversation `[{"from": "human" | "gpt" | "system", "value": str}, ...]`.

        With `add_generation_prompt` it ends with the opening of an assistant turn. Raises ValueError if a
        speaker is unknown, if `<image>` marks and pictures differ in number, or if the text contains the
        image token itself.
        """
        ids: list[int] = []
        answer: list[bool] = []
        for new_ids, is_answer in self._parts(conversation, tiles_per_image, add_generation_prompt):
            ids.extend(new_ids)
            answer.extend([is_answer] * len(new_ids))
        self._check_image_tokens(ids, sum(tiles_per_image))
        return Skeleton(np.asarray(ids, np.int64), np.asarray(answer, bool), sum(tiles_per_image))

    def num_tokens(self, conversation: Sequence[Turn], tiles_per_image: Sequence[int]) -> tuple[int, int]:
        """Return (text tokens, answer tokens) of the skeleton of `encode`, without building it.

        Raises as `encode` does.
        """
        ids: list[int] = []
        num_answer_tokens = 0
        for new_ids, is_answer in self._parts(conversation, tiles_per_image, False):
            ids += new_ids
            num_answer_tokens += len(new_ids) * is_answer
        self._check_image_tokens(ids, sum(tiles_per_image))
        return len(ids) - sum(tiles_per_image), num_answer_tokens

    def _check_image_tokens(self, ids: list[int], num_tiles: int) -> None:
        if ids.count(self.settings.image_token_id) != num_tiles:
            raise ValueError(f"the text itself spells the token {IMAGE_TOKEN}")


def is_learned(turn: Turn) -> bool:
    """Return whether a turn is an answer to learn; a turn with `loss: false` is only context."""
    return turn["from"] == "gpt" and turn.get("loss") is not False


def _roles(conversation: Sequence[Turn]) -> list[str]:
    for turn in conversation:
        if turn["from"] not in _ROLES:
            raise ValueError(f"from={turn['from']!r} is not one of {', '.join(_ROLES)}")
    return [_ROLES[turn["from"]] for turn in conversation]


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
