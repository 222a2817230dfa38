"""Turn a conversation into token ids with one slot per tile, and mark which tokens are answers.

The prompt is ChatML as InternVL writes it. `vico/packing.py` widens the slot of a tile to the number of
tokens of its rate.

Shapes: L tokens of a skeleton.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vico.errors import UserError, one_line
from vico.model_files import check_model_folder, read_json, tokenizer_files
from vico.settings import ModelSettings, load_settings
from vico.special_tokens import IMAGE_MARK, IMAGE_TOKEN, TURN_END
from vico.turn_tokenizer import NO_ANSWER, ROLES, EncodedTurn, Turn, TurnTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ids of short questions are cached, as many data sets repeat theirs.
_MAX_CACHED_TURNS, _MAX_CACHED_CHARS = 4096, 200
_NOT_ENCODED = EncodedTurn([], 0, NO_ANSWER)


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

    `control_tokens` are the tokens that only the prompt may write; a conversation that spells one is refused.
    Raises UserError at construction if the tokenizer lacks InternVL's special tokens, or gives the image
    token another id than config.json.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: ModelSettings, folder: str = ""):
        self.tokenizer, self.settings, self.folder = tokenizer, settings, folder
        self._turn_tokenizer = TurnTokenizer(tokenizer, folder)
        ids = self._turn_tokenizer.ids
        if ids[IMAGE_TOKEN] != settings.image_token_id:
            raise UserError(
                f"{folder}: config.json says image_token_id={settings.image_token_id} but the tokenizer "
                f"gives {IMAGE_TOKEN} the id {ids[IMAGE_TOKEN]}; use the tokenizer the model was trained with"
            )
        self.end_of_turn_id = ids[TURN_END]
        self.control_tokens = self._turn_tokenizer.control_tokens
        self._cached_turns: dict[str, EncodedTurn] = {}

    def _turns(self, conversation: Sequence[Turn], num_pictures: int) -> list[EncodedTurn]:
        """Return the turns, those of short questions from a cache. Raises as `encode` does."""
        turns: list[EncodedTurn] = []
        new: list[int] = []
        for number, turn in enumerate(conversation):
            speaker = turn["from"]
            if speaker not in ROLES:
                raise ValueError(f"from={speaker!r} is not one of {', '.join(ROLES)}")
            cached = self._cached_turns.get(turn["value"]) if speaker == "human" else None
            if cached is None:
                new.append(number)
            turns.append(cached or _NOT_ENCODED)
        for number, encoded in zip(new, self._turn_tokenizer.encoded(conversation, new), strict=True):
            turns[number] = encoded
            turn = conversation[number]
            if turn["from"] == "human":
                self._cache(turn["value"], encoded)
            elif not is_learned(turn):
                turns[number] = encoded._replace(answer=NO_ANSWER)
        num_marks = sum([turn.num_images for turn in turns])
        if num_marks > num_pictures:
            raise ValueError(f"more {IMAGE_MARK} marks than pictures")
        if num_marks < num_pictures:
            raise ValueError(f"{num_pictures - num_marks} more pictures than {IMAGE_MARK} marks")
        return turns

    def _cache(self, question: str, turn: EncodedTurn) -> None:
        if len(question) <= _MAX_CACHED_CHARS:
            if len(self._cached_turns) >= _MAX_CACHED_TURNS:
                self._cached_turns = {}
            self._cached_turns[question] = turn

    def _with_tiles(self, turn: EncodedTurn, tiles: Iterator[int]) -> list[int]:
        """Return the ids of a turn with one image token per tile; each picture takes the next of `tiles`."""
        image, start = self.settings.image_token_id, 0
        ids: list[int] = []
        for _ in range(turn.num_images):
            place = turn.ids.index(image, start)
            ids += turn.ids[start:place] + [image] * next(tiles)
            start = place + 1
        return ids + turn.ids[start:]

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
        ids = list(self._turn_tokenizer.beginning)
        answers: list[slice] = []
        tiles = iter(tiles_per_image)
        for turn in self._turns(conversation, len(tiles_per_image)):
            if turn.answer is not NO_ANSWER:
                begin = len(ids)
                answers.append(slice(begin + turn.answer.start, begin + turn.answer.stop))
            ids += self._with_tiles(turn, tiles) if turn.num_images else turn.ids
        if add_generation_prompt:
            ids += self._turn_tokenizer.opening
        answer = np.zeros(len(ids), bool)
        for tokens in answers:
            answer[tokens] = True
        return Skeleton(np.asarray(ids, np.int64), answer, sum(tiles_per_image))

    def num_tokens(self, conversation: Sequence[Turn], tiles_per_image: Sequence[int]) -> tuple[int, int]:
        """Return (text tokens, answer tokens) of the skeleton of `encode`, without building it.

        Raises as `encode` does.
        """
        num_tokens, num_answer_tokens = len(self._turn_tokenizer.beginning), 0
        for ids, num_images, answer in self._turns(conversation, len(tiles_per_image)):
            num_tokens += len(ids) - num_images
            num_answer_tokens += answer.stop - answer.start
        return num_tokens, num_answer_tokens


def is_learned(turn: Turn) -> bool:
    """Return whether a turn is an answer to learn; a turn with `loss: false` is only context."""
    return turn["from"] == "gpt" and turn.get("loss") is not False


def load_prompt_format(model_path: str | Path) -> PromptFormat:
    """Return the prompt format of a model folder: its tokenizer (without remote code) and its settings."""
    from transformers import AutoTokenizer

    settings = load_settings(check_model_folder(model_path))
    tokenizer_files(model_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_path), trust_remote_code=False, local_files_only=True
        )
        return PromptFormat(tokenizer, settings, str(model_path))
    except UserError:
        raise
    except Exception as error:  # of many kinds: transformers and its tokenizers check little
        if code := _tokenizer_code(Path(model_path)):
            raise UserError(
                f"model={model_path}: its tokenizer {code} is Python code of the checkpoint, which is "
                "never run; copy tokenizer.json and tokenizer_config.json of the same model's Hugging Face "
                "conversion there"
            ) from error
        raise UserError(
            f"model={model_path}: its tokenizer cannot be read ({one_line(error)}); copy the "
            "tokenizer's files again"
        ) from error


def _tokenizer_code(folder: Path) -> str | None:
    """Return the class in a checkpoint's own code that its tokenizer_config.json names, if it names one."""
    path = folder / "tokenizer_config.json"
    named = read_json(path).get("auto_map") if path.is_file() else None
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    named = [name for name in named if name] if isinstance(named, list) else [named]
    return one_line(named[0]) if named and isinstance(named[0], str) else None


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
