"""The plan of an epoch: which samples share a pack, which packs share a step, and the rate of every tile.

A pure function of the index columns, the plan's settings, the seed and the epoch; a position is one number,
the step. Built by the stages that train; nothing here depends on ranks or workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from data_prep.draws import draw_order
from data_prep.packs.best_fit import best_fit
from data_prep.packs.column_files import ColumnFiles
from data_prep.packs.epochs import EpochOrder
from data_prep.packs.rates import RATE_UNITS, tile_rates
from data_prep.shards.index import IndexColumns
from vico.errors import UserError

_CACHED_WINDOWS = 4
_CHUNK_ROWS = 1 << 20
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
class PlanSummary:
    """What takes a pass over all samples: entries of every shard's copies (`EpochOrder.shard_entries`) and
    packs of every window, int64 [W]. With it a plan is opened at any step at once.
    """

    shard_entries: np.ndarray
    packs_per_window: np.ndarray


@dataclass(frozen=True, eq=False)
class _Window:
    """Entry e is copy `copies[e]` of sample e, of `tokens[e]` tokens; pack p holds entries `members[p]`.

    The rates of its tiles, drawn when the window's packs are asked for, are `compressed[starts[e]:
    starts[e + 1]]`.
    """

    samples: IndexColumns
    tokens: np.ndarray
    copies: np.ndarray
    members: list[np.ndarray]
    compressed: np.ndarray | None = None
    starts: np.ndarray | None = None


class PackPlan:
    """The packs of one epoch over the samples of one split.

    Shards are shuffled, then cut into windows of `window_samples` entries, whose samples are shuffled and
    packed by both budgets (`reference_tokens`, `tiles`). Packs that share a step have similar cost. Windows
    are planned when asked for; only `summary` is kept of all (given, it saves a pass over the samples).
    Rates: a tile is compressed with probability `compress_share`, drawn for each
    tile or for each picture (`rate_unit`); with `full` none is.
    """

    def __init__(
        self,
        index: IndexColumns | ColumnFiles,
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
        summary: PlanSummary | None = None,
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
        self.tokens_full = tokens_full
        if summary is None:
            for first in range(0, len(index), _CHUNK_ROWS):
                samples = index.at(np.arange(first, min(first + _CHUNK_ROWS, len(index))))
                tokens = sample_tokens(samples, tokens_full)
                check_budgets(samples, tokens, reference_tokens=reference_tokens, tiles=tiles)
        self._order = EpochOrder(index, seed, epoch, None if summary is None else summary.shard_entries)
        self.num_windows = -(-self._order.num_entries // window_samples)
        self._windows: dict[int, _Window] = {}
        if summary is None:
            counts = [len(self._packed(w).members) for w in range(self.num_windows)]
            summary = PlanSummary(self._order.shard_entries, np.array(counts, np.int64))
        if len(summary.packs_per_window) != self.num_windows:
            raise ValueError(
                f"the summary is for {len(summary.packs_per_window)} windows, not {self.num_windows}"
            )
        self.summary, packs_per_window = summary, summary.packs_per_window
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
        return Pack(
            number=number,
            rows=window.samples.rows[members],
            copies=window.copies[members],
            compressed=[window.compressed[window.starts[e] : window.starts[e + 1]] for e in members],
            num_tokens=int(window.tokens[members].sum()),
            num_tiles=int(window.samples.num_tiles[members].sum()),
        )

    def _window(self, w: int) -> _Window:
        """Window w with its packs in the order of the epoch."""
        window = self._windows.get(w)
        if window is None:
            packed = self._packed(w)
            order = self._pack_order(w, packed)
            compressed, starts = tile_rates(
                self.rate_unit,
                self.compress_share,
                seed=self.seed,
                epoch=self.epoch,
                rows=packed.samples.rows,
                copies=packed.copies,
                image_starts=packed.samples.image_starts,
                image_tiles=packed.samples.image_tiles,
            )
            members = [packed.members[p] for p in order]
            window = replace(packed, members=members, compressed=compressed, starts=starts)
            kept = list(self._windows.items())[-(_CACHED_WINDOWS - 1) :]
            self._windows = dict([*kept, (w, window)])  # a new dict: other threads may be reading the old one
        return window

    def _packed(self, w: int) -> _Window:
        """Window w with its packs in the order in which they were opened."""
        first = w * self.window_samples
        positions, copies = self._order.entries(first, min(first + self.window_samples, self.num_entries))
        samples = self.index.at(positions)
        shuffled = draw_order("entry order", self.seed, self.epoch, samples.rows, copies)
        samples, copies = samples.at(shuffled), copies[shuffled]
        tokens = sample_tokens(samples, self.tokens_full)
        packs, num_packs = best_fit(tokens, samples.num_tiles, self.reference_tokens, self.tiles)
        by_pack = np.argsort(packs, kind="stable")
        members = np.split(by_pack, np.searchsorted(packs[by_pack], np.arange(1, num_packs)))
        return _Window(samples, tokens, copies, members)

    def _pack_order(self, w: int, window: _Window) -> np.ndarray:
        """Packs sorted by cost, cut into the window's shares of its steps, the shares shuffled.

        The window's first and last step may be shared with its neighbours; they take packs of middle cost, so
        that they match whatever the neighbour gives.
        """
        costs = [
            TILE_COST * float(window.samples.num_tiles[m].sum()) + float(window.tokens[m].sum())
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
