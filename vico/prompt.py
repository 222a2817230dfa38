"""A conversation as token ids with one slot a tile, and which of its tokens are answers.

ChatML as InternVL writes it; the slot of a tile is widened to its rate's number of tokens in
`vico/packing.py`.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from vico.errors import UserError
from vico.settings import (
    IMAGE_END,
    IMAGE_MARK,
    IMAGE_START,
    IMAGE_TOKEN,
    TURN_END,
    TURN_START,
    ModelSettings,
    check_model_folder,
    load_settings,
)

_KNOWN_TEXTS, _KNOWN_CHARS = 4096, 200  # short questions, whose ids are kept: many data sets repeat theirs
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Skeleton:
    """`ids` int64 [L] with one image token a tile; `answer` bool [L], true on answer tokens and their end of
    turn."""

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
    """Turns conversations into skeletons with one tokenizer; checks at construction that its special tokens
    exist."""

    def __init__(self, tokenizer, settings: ModelSettings, folder: str = ""):
        self.tokenizer, self.settings, self.folder = tokenizer, settings, folder
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in self._special()}
        unknown = tokenizer.unk_token_id
        for token, token_id in ids.items():
            if token_id is None or token_id == unknown:
                raise UserError(f"{folder}: the tokenizer has no token {token}; InternVL prompts need it")
        if ids[IMAGE_TOKEN] != settings.image_token_id:
            raise UserError(
                f"{folder}: config.json says image_token_id={settings.image_token_id} but the tokenizer "
                f"gives {IMAGE_TOKEN} the id {ids[IMAGE_TOKEN]}; use the tokenizer the model was trained with"
            )
        self._ids = ids
        self.end_of_turn_id = ids[TURN_END]
        self._backend = getattr(tokenizer, "backend_tokenizer", None)  # none for a tokenizer in Python
        if self._backend is not None:
            self._backend.no_truncation()  # a tokenizer.json may bring them
            self._backend.no_padding()
            # texts of one conversation are too few to be spread over threads, whose pool a fork would break
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._known: dict[str, list[int]] = {"": []}
        self._newline = self._text("\n")
        self._openings = {role: [ids[TURN_START], *self._text(f"{role}\n")] for role in _ROLES.values()}

    @staticmethod
    def _special() -> tuple[str, ...]:
        return (IMAGE_START, IMAGE_END, IMAGE_TOKEN, TURN_START, TURN_END)

    def _text(self, text: str) -> list[int]:
        return self._texts([text])[0]

    def _texts(self, texts: Sequence[str], repeating: Collection[str] = ()) -> list[list[int]]:
        """Ids of stretches of text; special tokens spelled out in one (`<ref>`) are taken as such. The
        ids of `repeating` ones are kept for the next call.
        """
        found = {text: self._known.get(text) for text in texts}
        new = [text for text, ids in found.items() if ids is None]
        if not new:
            encoded = []
        elif self._backend is None:
            encoded = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in new]
        else:
            # what the call above comes to; it takes some 0.2 ms around it, half of the time to shard a sample
            encoded = [one.ids for one in self._backend.encode_batch_fast(new, add_special_tokens=False)]
        found.update(zip(new, encoded, strict=True))
        if len(self._known) > _KNOWN_TEXTS:
            self._known = {"": []}
        self._known.update(
            (text, found[text]) for text in new if len(text) <= _KNOWN_CHARS and text in repeating
        )
        return [found[text] for text in texts]

    def _stretches(
        self, conversation: Sequence[dict], tiles_per_image: Sequence[int], add_generation_prompt: bool
    ) -> Iterator[tuple[list[int], bool]]:
        """(ids, whether they are an answer) of the stretches of a conversation; errors as in `encode`."""
        roles = [_ROLES.get(turn["from"]) for turn in conversation]
        if None in roles:
            raise ValueError(
                f"from={conversation[roles.index(None)]['from']!r} is none of {', '.join(_ROLES)}"
            )
        parts = [
            [turn["value"]] if role == "assistant" else turn["value"].split(IMAGE_MARK)
            for role, turn in zip(roles, conversation, strict=True)
        ]
        asked = {text for role, part in zip(roles, parts, strict=True) if role == "user" for text in part}
        texts = iter(self._texts(list(chain.from_iterable(parts)), repeating=asked))
        tiles = iter(tiles_per_image)
        for role, part in zip(roles, parts, strict=True):
            yield self._openings[role], False
            if role == "assistant":
                yield [*next(texts), self._ids[TURN_END]], True
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
        """Ids of one `<image>`, which takes the next count of `tiles`."""
        count = next(tiles, None)
        if count is None:
            raise ValueError(f"more {IMAGE_MARK} marks than pictures")
        return [self._ids[IMAGE_START], *[self._ids[IMAGE_TOKEN]] * count, self._ids[IMAGE_END]]

    def encode(
        self,
        conversation: Sequence[dict],
        tiles_per_image: Sequence[int],
        add_generation_prompt: bool = False,
    ) -> Skeleton:
        """The skeleton of a conversation `[{"from": "human" | "gpt" | "system", "value": str}, ...]`.

        Raises ValueError for an unknown speaker and where `<image>` marks and pictures differ in number. With
        `add_generation_prompt` the opening of an assistant turn is appended, for generation.
        """
        ids: list[int] = []
        answer: list[bool] = []
        for new_ids, is_answer in self._stretches(conversation, tiles_per_image, add_generation_prompt):
            ids.extend(new_ids)
            answer.extend([is_answer] * len(new_ids))
        self._check_image_tokens(ids, sum(tiles_per_image))
        return Skeleton(np.asarray(ids, np.int64), np.asarray(answer, bool), sum(tiles_per_image))

    def num_tokens(self, conversation: Sequence[dict], tiles_per_image: Sequence[int]) -> tuple[int, int]:
        """(text tokens, answer tokens) of the skeleton that `encode` gives, with its errors; for the sharder,
        which needs no more of it.
        """
        ids: list[int] = []
        num_answer_tokens = 0
        for new_ids, is_answer in self._stretches(conversation, tiles_per_image, False):
            ids += new_ids
            num_answer_tokens += len(new_ids) * is_answer
        self._check_image_tokens(ids, sum(tiles_per_image))
        return len(ids) - sum(tiles_per_image), num_answer_tokens

    def _check_image_tokens(self, ids: list[int], num_tiles: int) -> None:
        if ids.count(self.settings.image_token_id) != num_tiles:
            raise ValueError(f"the text itself spells the token {IMAGE_TOKEN}")


def load_prompt_format(model_path: str | Path) -> PromptFormat:
    """The prompt format of a model folder: its tokenizer (no remote code) and its settings."""
    from transformers import AutoTokenizer

    settings = load_settings(check_model_folder(model_path))
    tokenizer = AutoTokenizer.from_pretrained(str(model_path), trust_remote_code=False, local_files_only=True)
    return PromptFormat(tokenizer, settings, str(model_path))


def check_same_tokens(policy: PromptFormat, reference: PromptFormat) -> None:
    """UserError where the policy's tokenizer gives other ids than that of the model it starts from: both read
    the same ids, so one of them would read other words."""
    mine, theirs = policy.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    if mine != theirs:
        differing = {token for token, _ in mine.items() ^ theirs.items()}
        token = min(differing, key=lambda token: (mine.get(token, theirs.get(token)), token))
        raise UserError(
            f"the tokenizer of {policy.folder} gives the token {token!r} the id {mine.get(token)}, that of "
            f"{reference.folder} {theirs.get(token)} ({len(differing)} tokens differ); the policy has to be "
            "trained from the model in inputs.model"
        )
