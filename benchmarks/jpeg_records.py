"""JPEG records for the benchmarks: crops of the demo's photographs and drawn pages, written once."""

import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.demo.pages import prose_picture
from data_prep.demo.photographs import photograph_crop
from data_prep.demo.sources import NUM_GROUPS, photo_groups
from data_prep.records.config import RecordsConfig

LONG_SIDE = 640
_NUM_PAGES = 40  # drawing a page takes longer than encoding many crops of it


def write_jpeg_records(folder: Path, num_samples: int) -> RecordsConfig:
    """Write a meta file, its JSONL and `images/`, unless an earlier call with this number has done so."""
    folder = folder / f"records-{num_samples}"
    meta = folder / "meta.json"
    if not meta.is_file():
        (folder / "images").mkdir(parents=True, exist_ok=True)
        rng = random.Random("benchmark records")
        pages = [prose_picture(rng, rng.randrange(NUM_GROUPS)).canvas.image for _ in range(_NUM_PAGES)]
        groups = photo_groups()
        with open(folder / "set.jsonl", "w", encoding="utf-8") as file:
            for n in range(num_samples):
                picture = (
                    _crop(rng, rng.choice(pages))
                    if n % 4 == 0
                    else photograph_crop(rng, rng.choice(groups), rng.uniform(0.6, 1.7))
                )
                picture = picture.convert("RGB")
                picture.thumbnail((LONG_SIDE, LONG_SIDE))
                name = f"{n:06d}.jpg"
                (folder / "images" / name).write_bytes(jpeg(picture))
                file.write(json.dumps(record(n, name)) + "\n")
        meta.write_text(json.dumps({"jpegs": {"root": "images", "annotation": "set.jsonl"}}))
    return RecordsConfig(format="internvl", path=meta)


def record(n: int, name: str) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "<image>\nWhat does the picture show? Answer in a few words."},
        {
            "from": "gpt",
            "value": f"Picture {n} shows a scene with several things in it, seen from the front.",
        },
    ]
    return {"id": n, "image": name, "conversations": turns}


def jpeg(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=90)
    return data.getvalue()


def _crop(rng: random.Random, page: Image.Image) -> Image.Image:
    left, top = rng.randrange(max(1, page.width // 4)), rng.randrange(max(1, page.height // 4))
    return page.crop((left, top, left + page.width * 3 // 4, top + page.height * 3 // 4))
