"""Blank tiles for training and calibrating the router: uniform shades and colours, margins, empty paper.

They show nothing that a question could be about, so their label is compress. Real records have too few of
them to teach the router every shade. A tile is a function of (seed, split, number).

Shapes: N tiles, S tile side in pixels.
"""

from collections.abc import Callable, Sequence

import numpy as np

NUM_SHADES = 256
NUM_BLANK = 512
"""Blank tiles of a split: one of every gray shade first, then colours, margins and paper in turn."""


def blank_tiles(seed: int, split: str, numbers: Sequence[int], size: int) -> np.ndarray:
    """Return the blank tiles of these numbers, uint8 [N, 3, S, S]."""
    tiles = np.empty((len(numbers), 3, size, size), np.uint8)
    for tile, number in zip(tiles, numbers, strict=True):
        if number < NUM_SHADES:
            tile[...] = number
        else:
            random = np.random.default_rng([seed, number, *split.encode()])
            tile[...] = _FORMS[number % len(_FORMS)](random, size)
    return tiles


def _colour(random: np.random.Generator, size: int) -> np.ndarray:
    return random.integers(0, 256, (3, 1, 1))


def _margin(random: np.random.Generator, size: int) -> np.ndarray:
    """Return an area of one shade beside another one: the edge of a page, or padding around a picture."""
    shades = random.integers(0, 256, 2) if random.random() < 0.5 else np.array([255, random.integers(0, 256)])
    position = int(random.integers(1, size))
    line = np.where(np.arange(size) < position, *random.permutation(shades))
    return line[None, :] if random.random() < 0.5 else line[:, None]


def _paper(random: np.random.Generator, size: int) -> np.ndarray:
    """Return paper with faint noise, or a slow gradient between two near shades."""
    level = float(random.choice([255, 250, random.uniform(0, 255)]))
    if random.random() < 0.5:
        noisy = level + random.normal(0, random.uniform(0.5, 4), (size, size))
        return np.clip(noisy, 0, 255)
    end = np.clip(level + random.uniform(-40, 40), 0, 255)
    gradient = np.linspace(level, end, size)
    return gradient[None, :] if random.random() < 0.5 else gradient[:, None]


_FORMS: tuple[Callable[[np.random.Generator, int], np.ndarray], ...] = (_colour, _margin, _paper)
