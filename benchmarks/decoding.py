"""The decode that all loaders of `benchmarks/loading.py` share, importable by workers of Ray."""

import io
import json
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from vico.prompt import load_prompt_format
from vico.tiling import pixel_values


@lru_cache(maxsize=1)
def prompt_format(model: str):
    return load_prompt_format(model)


def decoded(jpg: bytes, text: bytes, model: str) -> int:
    """What the reader makes of a sample, from its bytes; the number of tiles."""
    return len(decoded_pixels(jpg, text, model))


def decoded_pixels(jpg: bytes, text: bytes, model: str) -> np.ndarray:
    """The same; its tiles, float32 [T, 3, S, S]."""
    form = prompt_format(model)
    image = Image.open(io.BytesIO(jpg), formats=("JPEG", "PNG", "WEBP"))
    image.load()
    record = json.loads(text)
    pixels = pixel_values(image, form.settings.tiling(record["max_tiles"]))
    form.encode(record["conversations"], [len(pixels)])
    return pixels


def tensor_of_sample(sample: dict, model: str) -> torch.Tensor:
    """A sample of webdataset's as its tiles; one thread, as beside other workers."""
    torch.set_num_threads(1)
    return torch.from_numpy(decoded_pixels(sample["jpg"], sample["json"], model))
