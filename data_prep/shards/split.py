"""Which side a sample stands on: train, calib or test, by its group, its pictures or its key."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.records.rejection import Rejected

TRAIN, CALIB, TEST = SPLITS = ("train", "calib", "test")
_SALT = b"vico split 1"  # another salt would move samples between the sides of every data set


@dataclass(frozen=True)
class Shares:
    """Shares of groups that go to calib and to test; the rest is train."""

    calib: float
    test: float
    seed: int = 0


def split_of(shares: Shares, *, key: str, group: str, pictures: Sequence[bytes]) -> str:
    """The side of a sample: its group's if it has one, else its pictures', else its key's.

    The same group or picture gives the same side in every set. Raises Rejected(straddles_split) when a sample
    without a group has pictures on two sides.
    """
    if group:
        return side(shares, "group", group.encode())
    if not pictures:
        return side(shares, "key", key.encode())
    sides = {side(shares, "picture", digest) for digest in pictures}
    if len(sides) > 1:
        raise Rejected("straddles_split", f"its pictures fall to {' and '.join(sorted(sides))}")
    return sides.pop()


def side(shares: Shares, what: str, identity: bytes) -> str:
    """The side of a group, picture or key: its hash as a number in [0, 1), test lowest, then calib."""
    text = b"\0".join([_SALT, str(shares.seed).encode(), what.encode(), identity])
    place = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    if place < shares.test:
        return TEST
    return CALIB if place < shares.test + shares.calib else TRAIN
