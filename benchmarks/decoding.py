"""The decoding that all loaders of `benchmarks/loading.py` share; Ray's workers import it."""

import io
import json
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from vico.prompt import PromptFormat, load_prompt_format
from vico.tiling import tile_pixels


@lru_cache(maxsize=1)
def prompt_format(model: str) -> PromptFormat:
    return load_prompt_format(model)


def num_decoded_tiles(jpg: bytes, text: bytes, model: str) -> int:
    """Decode a sample from its bytes and return the number of its tiles."""
    return len(decoded_pixels(jpg, text, model))


def decoded_pixels(jpg: bytes, text: bytes, model: str) -> np.ndarray:
    """Decode a sample from its bytes as the reader does and return its tiles, uint8 [T, 3, S, S]."""
    form = prompt_format(model)
    image = Image.open(io.BytesIO(jpg), formats=("JPEG", "PNG", "WEBP"))
    image.load()
    record = json.loads(text)
    pixels = tile_pixels(image, form.settings.tiling(record["max_tiles"]))
    form.encode(record["conversations"], [len(pixels)])
    return pixels


def sample_tensor(sample: dict[str, Any], model: str) -> torch.Tensor:
    """Return the tiles of a webdataset sample; uses one thread, because other workers run beside it."""
    torch.set_num_threads(1)
    return torch.from_numpy(decoded_pixels(sample["jpg"], sample["json"], model))
