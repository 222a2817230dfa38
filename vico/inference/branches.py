"""Which tokens of many sequences are computed: each beginning that several rate vectors share only once.

The rate vectors of a sample form a tree. A branch is the end of one vector's sequence, from the first tile
whose rate differs from those of its parent branch. Rows of branches are what the language model computes at
once; keys and values pass from row to row (`vico/model/shared_keys.py`).

Shapes: T tiles of a sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vico.model.shared_keys import SharedKeys
from vico.packing import TiledSequence
from vico.prompt import Skeleton
from vico.settings import ModelSettings


@dataclass(frozen=True)
class RatedSample:
    """A sample whose encoded tiles start at `first_tile`, and rate vectors (compressed, bool [T] each)."""

    skeleton: Skeleton
    first_tile: int
    rates: Sequence[np.ndarray]

    def at_full_rate(self) -> TiledSequence:
        """Return the sample's sequence with all tiles at the full rate."""
        return TiledSequence(self.skeleton, np.zeros(self.skeleton.num_tiles, bool), self.first_tile)


@dataclass(frozen=True)
class Branch:
    """The end of a sequence of sample number `sample`, computed from its `start` on.

    `seen` are the parts of other branches before it: number of the branch -> how many of its first tokens, in
    the order of their positions. `num_tokens` are its own. The first `num_earlier_answers` answer tokens are
    predicted by tokens of `parent`'s sequence.
    """

    sample: int
    sequence: TiledSequence
    num_tokens: int
    parent: int | None
    seen: Mapping[int, int]
    num_earlier_answers: int


@dataclass(frozen=True)
class Plan:
    """The branches of samples, parents first, and the branch of each rate vector of each sample."""

    branches: list[Branch]
    branch_of: list[list[int]]


def plan_of(samples: Sequence[RatedSample], settings: ModelSettings) -> Plan:
    """Return the branches with the smallest number of tokens in total. Equal rate vectors have one branch."""
    branches: list[Branch] = []
    branch_of = []
    for number, sample in enumerate(samples):
        by_rates: dict[tuple[bool, ...], int] = {}
        # Sorted, so that no other vector shares a longer beginning with a vector than the one before it.
        for rates in sorted({tuple(rates.tolist()) for rates in sample.rates}):
            parent = len(branches) - 1 if by_rates else None
            by_rates[rates] = len(branches)
            branches.append(_branch(branches, parent, number, sample, rates, settings))
        branch_of.append([by_rates[tuple(rates.tolist())] for rates in sample.rates])
    return Plan(branches, branch_of)


def _branch(
    branches: Sequence[Branch],
    parent: int | None,
    number: int,
    sample: RatedSample,
    rates: tuple[bool, ...],
    settings: ModelSettings,
) -> Branch:
    sequence = TiledSequence(sample.skeleton, np.array(rates, bool), sample.first_tile)
    bounds = sequence.token_starts(settings)
    answer_starts = bounds[:-1][sample.skeleton.answer]
    if parent is None:
        return Branch(number, sequence, int(bounds[-1]), None, {}, 0)
    before = branches[parent]
    first_change = int(np.argmax(before.sequence.compressed != sequence.compressed))
    start = int(bounds[np.flatnonzero(sample.skeleton.ids == settings.image_token_id)[first_change]])
    seen: dict[int, int] = {}
    position = 0
    for branch, count in {**before.seen, parent: before.num_tokens}.items():
        if position < start:
            seen[branch] = min(count, start - position)
            position += seen[branch]
    num_earlier = int((answer_starts <= start).sum())
    return Branch(number, sequence._replace(start=start), int(bounds[-1]) - start, parent, seen, num_earlier)


@dataclass(frozen=True)
class BranchRow:
    """Branches that are computed in one row; `kept` are the parts of these and earlier ones that later rows
    see: number of the branch -> how many of its first tokens."""

    branches: range
    kept: Mapping[int, int]


def rows_of(branches: Sequence[Branch], row_tokens: int) -> Iterator[BranchRow]:
    """Yield rows of branches, in order, of at most `row_tokens`; a longer branch gets its own row."""
    starts, filled = [0], 0
    for number, branch in enumerate(branches):
        if number > starts[-1] and filled + branch.num_tokens > row_tokens:
            starts.append(number)
            filled = 0
        filled += branch.num_tokens
    rows = [range(first, end) for first, end in zip(starts, [*starts[1:], len(branches)], strict=True)]
    needed: list[dict[int, int]] = [{}]
    for row in reversed(rows[1:]):
        parts = dict(needed[-1])
        for number in row:
            for earlier, count in branches[number].seen.items():
                parts[earlier] = max(parts.get(earlier, 0), count)
        needed.append({earlier: count for earlier, count in sorted(parts.items()) if earlier < row.start})
    yield from (BranchRow(row, kept) for row, kept in zip(rows, reversed(needed), strict=True) if row)


class KeptTokens:
    """The keys and values that pass from row to row, and where the parts of branches are in them."""

    def __init__(self) -> None:
        self._earlier: Mapping[int, int] = {}
        self._keys: SharedKeys | None = None

    def next_row(self, branches: Sequence[Branch], row: BranchRow, device: torch.device) -> SharedKeys | None:
        """Return the shared keys of the next row in order, None if its branches are whole sequences and
        nothing of them is needed later."""
        earlier, is_plain = self._earlier, not row.kept and not any(branches[n].seen for n in row.branches)
        before, self._earlier = self._keys, row.kept
        self._keys = None
        if is_plain:
            return None
        sizes = [*earlier.values(), *(branches[n].num_tokens for n in row.branches)]
        first = dict(zip([*earlier, *row.branches], np.cumsum([0, *sizes]).tolist(), strict=False))

        def tokens(parts: Mapping[int, int]) -> list[np.ndarray]:
            return [np.arange(first[branch], first[branch] + count) for branch, count in parts.items()]

        seen = [np.concatenate(tokens({**branches[n].seen, n: branches[n].num_tokens})) for n in row.branches]
        kept = np.concatenate([np.zeros(0, np.int64), *tokens(row.kept)])
        self._keys = SharedKeys(
            seen=torch.from_numpy(np.concatenate(seen)).to(device),
            seen_lengths=tuple(len(part) for part in seen),
            kept=torch.from_numpy(kept).to(device),
            earlier={} if before is None else before.later,
        )
        return self._keys
