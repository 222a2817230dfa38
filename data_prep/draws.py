"""Random numbers that depend only on a purpose, a seed and further numbers, such as a step or a row.

They do not depend on worker, rank or time, nor on the generator of a library, which may change between
versions.
"""

import hashlib

import numpy as np

_STEP, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def draw_bits(purpose: str, *words: int | np.ndarray) -> np.ndarray:
    """Return uint64 hashes of purpose and words, in the shape of the broadcast words (at least [1])."""
    start = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    state = np.array([start], np.uint64)
    for word in words:
        state = _mixed(state ^ _as_uint64(word))
    return state


def draw_uniform(purpose: str, *words: int | np.ndarray) -> np.ndarray:
    """Return float64 in [0, 1), with the arguments and the shape of `draw_bits`."""
    return (draw_bits(purpose, *words) >> np.uint64(11)) * 2.0**-53


def draw_order(purpose: str, *words: int | np.ndarray) -> np.ndarray:
    """Return the int64 permutation that sorts the draws of `words`; equal draws keep their order."""
    return np.argsort(draw_bits(purpose, *words), kind="stable")


def _as_uint64(word: int | np.ndarray) -> np.ndarray:
    if isinstance(word, np.ndarray):
        return word.astype(np.uint64)
    return np.array([word & 0xFFFFFFFFFFFFFFFF], np.uint64)


def _mixed(state: np.ndarray) -> np.ndarray:
    """Apply one step of splitmix64 (Steele, Lea, Flood 2014); arithmetic modulo 2**64 is intended."""
    state = state + _STEP
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


def chosen_rows(rows: np.ndarray, max_samples: int, seed: int) -> np.ndarray:
    """Draw at most `max_samples` of the row numbers (0: all); return them in ascending order.

    A smaller choice is part of a larger one of the same seed, so stages with different limits use the same
    samples. Rows that one of the stages cannot use do not change the choice of the others.
    """
    if not max_samples or len(rows) <= max_samples:
        return np.sort(rows)
    return np.sort(rows[draw_order("choice of samples", seed, rows)[:max_samples]])


def limited(num_chosen: int, num_all: int, split: str, field: str = "max_samples") -> str:
    """Return what a stage says when `chosen_rows` left some of its samples out; `field` is the limit's."""
    return f"takes {num_chosen:,} of {num_all:,} {split} samples ({field}={num_chosen}; 0 takes all)"
