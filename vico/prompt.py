"""A conversation as token ids with one slot a tile, and which of its tokens are answers.

ChatML as InternVL writes it; the slot of a tile is widened to its rate's number of tokens in
`vico/packing.py`.
"""

# L tokens of the skeleton (a tile counts one)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vico.errors import UserError
from vico.settings import (
    IMAGE_END,
    IMAGE_START,
    IMAGE_TOKEN,
    TURN_END,
    TURN_START,
    ModelSettings,
    check_model_folder,
    load_settings,
)

IMAGE_MARK = "<image>"
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
        self.tokenizer, self.settings = tokenizer, settings
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
        self._fixed = {text: self._text(text) for text in ("\n", *(f"{role}\n" for role in _ROLES.values()))}

    @staticmethod
    def _special() -> tuple[str, ...]:
        return (IMAGE_START, IMAGE_END, IMAGE_TOKEN, TURN_START, TURN_END)

    def _text(self, text: str) -> list[int]:
        """Ids of a stretch of text; special tokens spelled out in it (`<ref>`, `<box>`) are taken as such."""
        if not text:
            return []
        if self._backend is None:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # what the call above comes to; it takes some 0.2 ms around it, half of the time to shard a sample
        return self._backend.encode(text, add_special_tokens=False).ids

    def _question(self, value: str, tiles: list[int]) -> list[int]:
        """Ids of one turn in which each `<image>` takes the next count from `tiles` (consumed)."""
        first, *rest = value.split(IMAGE_MARK)
        ids = self._text(first)
        for text in rest:
            if not tiles:
                raise ValueError(f"more {IMAGE_MARK} marks than pictures")
            count = tiles.pop(0)
            ids += [self._ids[IMAGE_START], *[self._ids[IMAGE_TOKEN]] * count, self._ids[IMAGE_END]]
            ids += self._text(text)
        return ids

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
        tiles = list(tiles_per_image)
        ids: list[int] = []
        answer: list[bool] = []

        def put(new_ids: list[int], is_answer: bool = False) -> None:
            ids.extend(new_ids)
            answer.extend([is_answer] * len(new_ids))

        for turn in conversation:
            role = _ROLES.get(turn["from"])
            if role is None:
                raise ValueError(f"from={turn['from']!r} is none of {', '.join(_ROLES)}")
            put([self._ids[TURN_START], *self._fixed[f"{role}\n"]])
            if role == "assistant":
                put([*self._text(turn["value"]), self._ids[TURN_END]], is_answer=True)
                put(self._fixed["\n"])
            else:
                put([*self._question(turn["value"], tiles), self._ids[TURN_END], *self._fixed["\n"]])
        if tiles:
            raise ValueError(f"{len(tiles)} more pictures than {IMAGE_MARK} marks")
        if add_generation_prompt:
            put([self._ids[TURN_START], *self._fixed["assistant\n"]])
        skeleton = Skeleton(np.asarray(ids, np.int64), np.asarray(answer, bool), sum(tiles_per_image))
        if int((skeleton.ids == self.settings.image_token_id).sum()) != skeleton.num_tiles:
            raise ValueError(f"the text itself spells the token {IMAGE_TOKEN}")
        return skeleton


def load_prompt_format(model_path: str | Path) -> PromptFormat:
    """The prompt format of a model folder: its tokenizer (no remote code) and its settings."""
    from transformers import AutoTokenizer

    settings = load_settings(check_model_folder(model_path))
    tokenizer = AutoTokenizer.from_pretrained(str(model_path), trust_remote_code=False, local_files_only=True)
    return PromptFormat(tokenizer, settings, str(model_path))
