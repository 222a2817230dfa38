"""ViCO's processor for plain transformers: an exported folder opens with it, given `trust_remote_code=True`.

`vico export --layout hf` copies this file and `tiling.py` into the folder. So it imports only numpy, torch,
transformers and `tiling.py`, and makes the prompts that `vico/prompt.py` makes.
"""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from os.path import isfile
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import load_image
from transformers.processing_utils import ProcessorMixin

from .tiling import Tiling, pixel_values

_IMAGE = "<IMG_CONTEXT>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}" + _IMAGE + "\n{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The prompt that the model was trained with."""


class VicoProcessor(ProcessorMixin):
    """Turns texts with `<IMG_CONTEXT>` per picture, and the pictures, into ids and tiles.

    Every picture becomes its tiles, each with as many image tokens as the full rate has; the model drops
    those that the routing does not need. `image_settings` has `tile_size`, `tokens_full`, `min_tiles`,
    `max_tiles` and `use_thumbnail`.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        image_settings: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(tokenizer, chat_template=CHAT_TEMPLATE)
        self.image_settings = dict(image_settings or {})

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        max_tiles: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return `input_ids` and `attention_mask`, left-padded int64 [B, L], and `pixel_values` float32 [N,
        3, S, S].

        `images` is one picture, a list, or a list of lists, in the order of the texts. A picture is a PIL
        picture, an array uint8 [H, W, 3] or [H, W], or a text that transformers reads: a path, a URL, or
        base64. `max_tiles` lowers the number of tiles of a picture. Raises ValueError if pictures and places
        differ in number, and for a picture of another kind.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        pictures = _flat(images)
        num_places = sum(part.count(_IMAGE) for part in texts)
        if num_places != len(pictures):
            raise ValueError(f"{len(pictures)} pictures for {num_places} {_IMAGE} in the texts")
        settings = self.image_settings
        most = min(max_tiles or settings["max_tiles"], settings["max_tiles"])
        tiling = Tiling(
            settings["tile_size"],
            max(most, settings["min_tiles"]),
            settings["min_tiles"],
            settings["use_thumbnail"],
        )
        tiles = [pixel_values(picture, tiling) for picture in pictures]
        counts = iter([len(picture_tiles) * settings["tokens_full"] for picture_tiles in tiles])
        expanded = []
        beginning = _beginning(self.tokenizer)
        for part in texts:
            before, *after = part.removeprefix(beginning).split(_IMAGE)
            expanded.append(
                beginning + before + "".join(f"<img>{_IMAGE * next(counts)}</img>{rest}" for rest in after)
            )
        encoded = self.tokenizer(
            expanded, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        data = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if tiles:
            data["pixel_values"] = torch.from_numpy(np.concatenate(tiles))
        return BatchFeature(data)


def _beginning(tokenizer: Any) -> str:
    """Return the BOS token if the tokenizer puts it before every text, else an empty text."""
    bos = tokenizer.bos_token_id
    with_bos, without = (list(tokenizer("a", add_special_tokens=add)["input_ids"]) for add in (True, False))
    return tokenizer.bos_token if bos is not None and with_bos[:1] == [bos] != without[:1] else ""


def _flat(images: Any) -> list[Image.Image]:
    if images is None:
        return []
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, str | PathLike):
        path = fspath(images)
        return [Image.open(path).convert("RGB") if isfile(path) else load_image(path)]
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim in (2, 3):
        return [Image.fromarray(images).convert("RGB")]
    if isinstance(images, list | tuple):
        return [picture for entry in images for picture in _flat(entry)]
    raise ValueError(
        f"a picture of type {type(images).__name__} is not supported; give a PIL picture, a path, a URL, or "
        "an array uint8 [H, W, 3]"
    )
