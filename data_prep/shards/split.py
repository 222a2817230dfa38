"""The split of a sample (train, calib or test), drawn from its group, its pictures or its key.

The draw of one row by itself; `picture_sides.py` brings rows that share pictures to one side.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

TRAIN, CALIB, TEST = SPLITS = ("train", "calib", "test")
_SALT = b"vico split 1"  # another salt would move samples between the splits of every data set


@dataclass(frozen=True)
class Shares:
    """Shares of groups that go to calib and to test, and the seed that draws them; the rest is train."""

    calib: float
    test: float
    seed: int = 0


def split_of(shares: Shares, *, key: str, group: str, pictures: Sequence[bytes]) -> str:
    """Return the split of a sample: its group's if it has one, else its smallest picture's (by digest), else
    its key's.

    The same group, or picture alone in its row, has the same split in every set.
    """
    if group:
        return side(shares, "group", group.encode())
    if not pictures:
        return side(shares, "key", key.encode())
    return side(shares, "picture", min(pictures))


def side(shares: Shares, kind: str, identity: bytes) -> str:
    """Return the split of a "group", "picture" or "key".

    Its hash is a number in [0, 1): the lowest numbers are test, then calib, then train.
    """
    text = b"\0".join([_SALT, str(shares.seed).encode(), kind.encode(), identity])
    position = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    if position < shares.test:
        return TEST
    return CALIB if position < shares.test + shares.calib else TRAIN
