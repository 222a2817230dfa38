"""The plan of an epoch: which samples share a pack, which packs share a step, and the rate of every tile.

A pure function of the index columns, the plan's settings, the seed and the epoch; a position is one number,
the step. Built by the stages that train; nothing here depends on ranks or workers.
"""

# n samples of the split, S samples of a pack, T tiles of a sample; an entry is one coming of a sample

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.bins import best_fit
from data_prep.draws import draw_order
from data_prep.epochs import EpochOrder
from data_prep.index import IndexColumns
from data_prep.rates import RATE_UNITS, tile_rates
from vico.errors import UserError

_CACHED_WINDOWS = 4
# Cost of one tile through the vision tower in tokens of the language model: 1,024 vision tokens at about a
# tenth of the work of an 8B decoder. Only which packs share a step depends on it.
TILE_COST = 100.0


@dataclass(frozen=True, eq=False)
class Pack:
    """Samples for one micro-step: `rows`, `copies` int64 [S] and `compressed`, one bool [T] a sample.

    `copies` counts the times a sample came before in the epoch; `num_tokens` are reference tokens. A pack
    without rows fills up the last step of an epoch.
    """

    number: int
    rows: np.ndarray
    copies: np.ndarray
    compressed: list[np.ndarray]
    num_tokens: int = 0
    num_tiles: int = 0


@dataclass(frozen=True, eq=False)
class _Window:
    """Entry e is copy `copies[e]` of the sample at `positions[e]`; pack p holds entries `members[p]`."""

    positions: np.ndarray
    copies: np.ndarray
    members: list[np.ndarray]


class PackPlan:
    """The packs of one epoch over the samples of one split.

    Shards are shuffled, then cut into windows of `window_samples` entries, whose samples are shuffled and
    packed by both budgets (`reference_tokens`, `tiles`). Packs that share a step have similar cost. Windows
    are planned when asked for; only the number of packs of each is kept (`packs_per_window`, which may be
    given to save that pass). Rates: a tile is compressed with probability `compress_share`, drawn for each
    tile or for each picture (`rate_unit`); with `full` none is.
    """

    def __init__(
        self,
        index: IndexColumns,
        *,
        reference_tokens: int,
        tiles: int,
        packs_per_step: int,
        seed: int,
        epoch: int,
        tokens_full: int,
        window_samples: int = 1024,
        rate_unit: str = "tile",
        compress_share: float = 0.5,
        packs_per_window: np.ndarray | None = None,
    ):
        if rate_unit not in RATE_UNITS:
            raise UserError(f"rate_unit={rate_unit!r} is none of {', '.join(RATE_UNITS)}")
        if len(index) == 0:
            raise UserError(
                "the split has no samples to pack; raise its share (shard.calib_share, shard.test_share)"
            )
        self.index, self.seed, self.epoch = index, seed, epoch
        self.reference_tokens, self.tiles, self.packs_per_step = reference_tokens, tiles, packs_per_step
        self.window_samples, self.rate_unit, self.compress_share = window_samples, rate_unit, compress_share
        self._sample_tokens = sample_tokens(index, tokens_full)
        check_budgets(index, self._sample_tokens, reference_tokens=reference_tokens, tiles=tiles)
        self._order = EpochOrder(index, seed, epoch)
        self.num_windows = -(-self._order.num_entries // window_samples)
        self._windows: dict[int, _Window] = {}
        if packs_per_window is None:
            packs_per_window = np.array(
                [len(self._packed(w).members) for w in range(self.num_windows)], np.int64
            )
        if len(packs_per_window) != self.num_windows:
            raise ValueError(
                f"packs_per_window is for {len(packs_per_window)} windows, not {self.num_windows}"
            )
        self.packs_per_window = packs_per_window
        self._window_starts = np.concatenate([[0], np.cumsum(packs_per_window)]).astype(np.int64)

    @property
    def num_entries(self) -> int:
        """Samples of the epoch, repeats counted."""
        return self._order.num_entries

    @property
    def num_packs(self) -> int:
        return int(self._window_starts[-1])

    @property
    def num_steps(self) -> int:
        return -(-self.num_packs // self.packs_per_step)

    def step(self, n: int) -> list[Pack]:
        """The `packs_per_step` packs of step n; those past the last one are empty."""
        if not 0 <= n < self.num_steps:
            raise IndexError(f"step {n} of {self.num_steps}")
        first = n * self.packs_per_step
        return [self.pack(number) for number in range(first, first + self.packs_per_step)]

    def pack(self, number: int) -> Pack:
        """Pack `number` of the epoch; an empty one past the end."""
        if number >= self.num_packs:
            none = np.zeros(0, np.int64)
            return Pack(number, none, none, [])
        w = int(np.searchsorted(self._window_starts, number, side="right")) - 1
        window = self._window(w)
        members = window.members[number - int(self._window_starts[w])]
        positions, copies = window.positions[members], window.copies[members]
        return Pack(
            number=number,
            rows=self.index.rows[positions],
            copies=copies,
            compressed=self._compressed(positions, copies),
            num_tokens=int(self._sample_tokens[positions].sum()),
            num_tiles=int(self.index.num_tiles[positions].sum()),
        )

    def _window(self, w: int) -> _Window:
        """Window w with its packs in the order of the epoch."""
        window = self._windows.get(w)
        if window is None:
            packed = self._packed(w)
            order = self._pack_order(w, packed)
            window = _Window(packed.positions, packed.copies, [packed.members[p] for p in order])
            kept = list(self._windows.items())[-(_CACHED_WINDOWS - 1) :]
            self._windows = dict([*kept, (w, window)])  # a new dict: other threads may be reading the old one
        return window

    def _packed(self, w: int) -> _Window:
        """Window w with its packs in the order in which they were opened."""
        first = w * self.window_samples
        positions, copies = self._order.entries(first, min(first + self.window_samples, self.num_entries))
        shuffled = draw_order("entry order", self.seed, self.epoch, self.index.rows[positions], copies)
        positions, copies = positions[shuffled], copies[shuffled]
        packs, num_packs = best_fit(
            self._sample_tokens[positions], self.index.num_tiles[positions], self.reference_tokens, self.tiles
        )
        by_pack = np.argsort(packs, kind="stable")
        members = np.split(by_pack, np.searchsorted(packs[by_pack], np.arange(1, num_packs)))
        return _Window(positions, copies, members)

    def _pack_order(self, w: int, window: _Window) -> np.ndarray:
        """Packs sorted by cost, cut into the window's shares of its steps, the shares shuffled.

        The window's first and last step may be shared with its neighbours; they take packs of middle cost, so
        that they match whatever the neighbour gives.
        """
        costs = [
            TILE_COST * float(self.index.num_tiles[window.positions[m]].sum())
            + float(self._sample_tokens[window.positions[m]].sum())
            for m in window.members
        ]
        by_cost = np.argsort(costs, kind="stable")
        num_packs, per_step = len(by_cost), self.packs_per_step
        first = min(-int(self._window_starts[w]) % per_step, num_packs)
        last = (num_packs - first) % per_step
        num_whole = (num_packs - first - last) // per_step
        middle = num_whole // 2
        runs = _runs(by_cost, [per_step] * middle + [first, last] + [per_step] * (num_whole - middle))
        head, tail = runs.pop(middle), runs.pop(middle)
        shuffled = draw_order("step order", self.seed, self.epoch, w, np.arange(num_whole))
        return np.concatenate([head, *(runs[n] for n in shuffled), tail])

    def _compressed(self, positions: np.ndarray, copies: np.ndarray) -> list[np.ndarray]:
        """The rates of samples, a bool [T] each; true = compressed."""
        rates = []
        for position, copy in zip(positions.tolist(), copies.tolist(), strict=True):
            start, end = self.index.image_starts[position : position + 2]
            rates.append(
                tile_rates(
                    self.rate_unit,
                    self.compress_share,
                    seed=self.seed,
                    epoch=self.epoch,
                    row=int(self.index.rows[position]),
                    copy=copy,
                    tiles_per_image=self.index.image_tiles[start:end],
                )
            )
        return rates


def _runs(values: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1])


def fixed_packs(
    index: IndexColumns, *, reference_tokens: int, tiles: int, tokens_full: int, compressed: bool
) -> Iterator[Pack]:
    """Every sample once, in index order, in packs of neighbours within both budgets, all tiles at one rate.

    For validation and measuring; `repeat` plays no part.
    """
    tokens = sample_tokens(index, tokens_full)
    check_budgets(index, tokens, reference_tokens=reference_tokens, tiles=tiles)
    for number, (start, end) in enumerate(_neighbours(tokens, index.num_tiles, reference_tokens, tiles)):
        yield Pack(
            number=number,
            rows=index.rows[start:end],
            copies=np.zeros(end - start, np.int64),
            compressed=[np.full(int(num_tiles), compressed) for num_tiles in index.num_tiles[start:end]],
            num_tokens=int(tokens[start:end].sum()),
            num_tiles=int(index.num_tiles[start:end].sum()),
        )


def _neighbours(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int
) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of samples that fit a pack together, in order."""
    start = sum_tokens = sum_tiles = 0
    for i, (more_tokens, more_tiles) in enumerate(zip(tokens.tolist(), tiles.tolist(), strict=True)):
        if i > start and (sum_tokens + more_tokens > max_tokens or sum_tiles + more_tiles > max_tiles):
            yield start, i
            start, sum_tokens, sum_tiles = i, 0, 0
        sum_tokens, sum_tiles = sum_tokens + more_tokens, sum_tiles + more_tiles
    if start < len(tokens):
        yield start, len(tokens)


def sample_tokens(index: IndexColumns, tokens_full: int) -> np.ndarray:
    """int64 [n]: reference tokens of every sample, all tiles at the full rate."""
    return index.text_tokens.astype(np.int64) + index.num_tiles.astype(np.int64) * tokens_full


def check_budgets(index: IndexColumns, tokens: np.ndarray, *, reference_tokens: int, tiles: int) -> None:
    """Raise UserError when a sample does not fit an empty pack, naming the largest."""
    for field, budget, sizes in (
        ("reference_tokens_per_pack", reference_tokens, tokens),
        ("tiles_per_pack", tiles, index.num_tiles),
    ):
        largest = int(np.argmax(sizes)) if len(sizes) else None
        if largest is not None and sizes[largest] > budget:
            raise UserError(
                f"{field}={budget} is too small a pack for {index.name(largest)} ({int(tokens[largest])} "
                f"reference tokens, {int(index.num_tiles[largest])} tiles); raise {field} to at least "
                f"{int(sizes[largest])}, or lower shard.max_tokens or shard.max_tiles"
            )
