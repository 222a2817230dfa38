"""A model folder as a Python object that answers questions about pictures: `vico.load(folder)`.

Shapes: N tiles of all pictures of a question.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image

from vico.checkpoints.hub import model_folder
from vico.checkpoints.load import load_model
from vico.errors import UserError, one_line
from vico.inference.devices import usable_device
from vico.inference.encoded_pictures import encoded_pictures
from vico.inference.generation import greedy_answers
from vico.inference.routing import absolute_rule
from vico.inference.tile_losses import num_tokens
from vico.model.internvl import VicoModel
from vico.model_files import check_model_folder, stored_threshold, total_tokens_limit
from vico.packing import TiledSequence
from vico.picture_files import open_picture
from vico.prompt import PromptFormat, load_prompt_format
from vico.special_tokens import IMAGE_MARK
from vico.tiling import tile_boxes
from vico.turn_tokenizer import SpelledToken, Turn

Picture: TypeAlias = str | Path | Image.Image
"""A picture file, or an open picture."""


@dataclass(frozen=True)
class AnswerTile:
    """One tile of an answer's pictures; of each picture with several tiles, the last is the thumbnail.

    `picture` counts the pictures from 0. `box` is (left, top, right, bottom) in pixels of the picture.
    `p_compress` is None for a model without a router.
    """

    picture: int
    box: tuple[float, float, float, float]
    p_compress: float | None
    compressed: bool
    visual_tokens: int


@dataclass(frozen=True)
class PictureAnswer:
    """An answer with its cost in tokens. `truncated`: it reached `max_new_tokens` before its end of turn."""

    text: str
    tiles: tuple[AnswerTile, ...]
    prompt_tokens: int
    """Text and visual tokens of the prompt."""
    visual_tokens: int
    visual_tokens_full: int
    """The visual tokens of the same pictures with every tile at the full rate."""
    new_tokens: int
    """Tokens of the answer, without its end of turn."""
    truncated: bool

    @property
    def tokens_saved(self) -> float:
        """The share of the visual tokens that routing saved; 0 without pictures."""
        return 1 - self.visual_tokens / self.visual_tokens_full if self.visual_tokens_full else 0.0

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class AnsweringModel:
    """A model with its prompt format and the threshold of its router; None for a model without a router."""

    model: VicoModel
    prompts: PromptFormat
    threshold: float | None
    max_total_tokens: int
    """Most tokens that prompt and answer may have together."""

    def answer(
        self,
        picture: Picture | Sequence[Picture],
        question: str,
        *,
        max_new_tokens: int = 256,
        threshold: float | None = None,
        system_message: str | None = None,
    ) -> PictureAnswer:
        """Answer a question about one picture, several, or none (an empty list), with greedy decoding.

        A tile is compressed if P(compress) is at least `threshold` (None: the model's own; a value above 1
        compresses no tile). Without `<image>` marks in the question, the pictures come before it.
        `system_message` is the one that the model was trained with, if any. Raises UserError for a picture
        that cannot be opened, marks that do not fit the pictures, a question that spells a control token, a
        threshold for a model without a router, and more tokens than the model takes.
        """
        if threshold is not None and self.threshold is None:
            raise UserError(f"threshold={threshold}: the model has no router; leave it out")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} is not positive; give at least 1")
        for name, text in (("question", question), ("system_message", system_message or "")):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(
                    f"{name} has half of a surrogate pair, which no UTF-8 text can hold; correct it"
                )
        pictures = list(picture) if isinstance(picture, list | tuple) else [picture]
        images = [_opened(each) for each in pictures]
        tiling = self.model.settings.tiling()
        boxes = [tile_boxes(*image.size, tiling) for image in images]
        skeleton = self.prompts.encode(
            self._turns(question, len(images), system_message), list(map(len, boxes)), True
        )
        tiles, p_compress_N = encoded_pictures(self.model, [(image, tiling) for image in images])
        limit = self.threshold if threshold is None else threshold
        compressed_N = np.zeros(skeleton.num_tiles, bool)
        if p_compress_N is not None and limit is not None:
            compressed_N = absolute_rule(p_compress_N, limit).numpy()
        prompt = TiledSequence(skeleton, compressed_N, 0)
        num_prompt = num_tokens(prompt, self.model.settings)
        if num_prompt + max_new_tokens > self.max_total_tokens:
            raise UserError(
                f"{num_prompt} prompt tokens and max_new_tokens={max_new_tokens} are more than the model's "
                f"{self.max_total_tokens}; ask about fewer pictures or lower max_new_tokens"
            )
        [answer] = greedy_answers(
            tiles,
            [prompt],
            end_of_turn_id=self.prompts.end_of_turn_id,
            max_new_tokens=max_new_tokens,
            batch_tokens=1,
        )
        return PictureAnswer(
            text=str(self.prompts.tokenizer.decode(answer.ids, skip_special_tokens=False)),
            tiles=self._tiles(boxes, p_compress_N, compressed_N),
            prompt_tokens=num_prompt,
            visual_tokens=num_prompt - skeleton.num_text_tokens,
            visual_tokens_full=skeleton.num_tiles * self.model.settings.tokens_full,
            new_tokens=len(answer.ids),
            truncated=answer.truncated,
        )

    def _turns(self, question: str, num_pictures: int, system_message: str | None) -> list[Turn]:
        """Return the conversation; raise UserError if the question cannot be asked."""
        if system_message is not None and IMAGE_MARK in system_message:
            raise UserError(f"system_message has {IMAGE_MARK} marks; only the question can place pictures")
        marks = question.count(IMAGE_MARK)
        if marks not in (0, num_pictures):
            raise UserError(
                f"question has {marks} {IMAGE_MARK} marks for {num_pictures} pictures; write one for each, "
                "or none to put the pictures first"
            )
        value = question if marks else f"{IMAGE_MARK}\n" * num_pictures + question
        turns: list[Turn] = [] if system_message is None else [{"from": "system", "value": system_message}]
        turns.append({"from": "human", "value": value})
        try:
            self.prompts.num_tokens(turns, [1] * num_pictures)
        except SpelledToken as error:
            name = "question" if error.turn == len(turns) - 1 else "system_message"
            raise UserError(
                f"{name}: the text spells the token {error.token}; write it another way"
            ) from error
        return turns

    def _tiles(
        self,
        boxes: Sequence[Sequence[tuple[float, float, float, float]]],
        p_compress_N: torch.Tensor | None,
        compressed_N: np.ndarray,
    ) -> tuple[AnswerTile, ...]:
        settings = self.model.settings
        positions = [(number, box) for number, picture in enumerate(boxes) for box in picture]
        return tuple(
            AnswerTile(
                picture=number,
                box=box,
                p_compress=None if p_compress_N is None else p_compress_N[n].item(),
                compressed=bool(compressed_N[n]),
                visual_tokens=settings.tokens_compressed if compressed_N[n] else settings.tokens_full,
            )
            for n, (number, box) in enumerate(positions)
        )


def load(
    path: str | Path, *, device: str = "cpu", dtype: Literal["float32", "bfloat16"] = "float32"
) -> AnsweringModel:
    """Open a model folder in any layout, or a Hub id, for questions: `model.answer(picture, question)`.

    Raises UserError for a device that is not here, a folder that is not a model's, a tokenizer without
    InternVL's tokens, and a router without a stored threshold.
    """
    usable_device(device)
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype={dtype} is not supported; give float32 or bfloat16")
    folder = check_model_folder(model_folder(path))
    model = load_model(folder, getattr(torch, dtype), device)
    return AnsweringModel(
        model,
        load_prompt_format(folder),
        threshold=None if model.router is None else stored_threshold(folder),
        max_total_tokens=total_tokens_limit(folder),
    )


def _opened(picture: object) -> Image.Image:
    """Return the picture as RGB; raise UserError if it is missing or does not decode."""
    if isinstance(picture, Image.Image):
        return _as_rgb(picture, f"{picture.format or picture.mode} picture")
    if not isinstance(picture, str | Path):
        raise UserError(
            f"picture: {type(picture).__name__} is not supported; give a path or a PIL picture "
            "(Image.fromarray makes one of an array)"
        )
    try:
        data = Path(picture).read_bytes()
    except OSError as error:
        raise UserError(f"picture={picture} is not readable ({error.strerror}); give another path") from error
    try:
        with open_picture(data) as image:
            return _as_rgb(image, picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"picture={picture} does not decode ({one_line(error)}); give another") from error


def _as_rgb(image: Image.Image, name: Path | str) -> Image.Image:
    """Return the pixels; a picture that Pillow has opened decodes only now."""
    try:
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"picture={name} does not decode ({one_line(error)}); give another") from error
