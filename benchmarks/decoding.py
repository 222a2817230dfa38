"""The decode that all loaders of `benchmarks/loading.py` share, importable by workers of Ray."""

import io
import json
from functools import lru_cache

from PIL import Image

from vico.prompt import load_prompt_format
from vico.tiling import pixel_values


@lru_cache(maxsize=1)
def prompt_format(model: str):
    return load_prompt_format(model)


def decoded(jpg: bytes, text: bytes, model: str) -> int:
    """What the reader makes of a sample, from its bytes; the number of tiles."""
    form = prompt_format(model)
    image = Image.open(io.BytesIO(jpg), formats=("JPEG", "PNG", "WEBP"))
    image.load()
    record = json.loads(text)
    pixels = pixel_values(image, form.settings.tiling(record["max_tiles"]))
    form.encode(record["conversations"], [len(pixels)])
    return len(pixels)
