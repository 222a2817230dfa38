"""The functions that vico_demo.yaml names; lmms-eval imports this file."""

import io
from typing import Any

from PIL import Image


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """Return the picture of a question."""
    return [Image.open(io.BytesIO(doc["picture"])).convert("RGB")]


def doc_to_text(doc: dict[str, Any]) -> str:
    """Return the question."""
    return doc["question"]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return exact match and ANLS of an answer, as this project's evaluate stage computes them."""
    answer, given = (" ".join(text.split()) for text in (doc["answer"], results[0]))
    return {"exact": float(answer == given), "anls": _anls(answer.casefold(), given.casefold())}


def _anls(a: str, b: str) -> float:
    row = list(range(len(b) + 1))
    for n, letter in enumerate(a, 1):
        previous, row[0] = row[0], n
        for m, other in enumerate(b, 1):
            previous, row[m] = row[m], min(row[m] + 1, row[m - 1] + 1, previous + (letter != other))
    distance = row[-1] / max(len(a), len(b), 1)
    return 1.0 - distance if distance < 0.5 else 0.0
