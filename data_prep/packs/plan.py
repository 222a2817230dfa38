"""The plan of an epoch: which samples share a pack, which packs share a step, and the rate of every tile.

It is a pure function of the index columns and the plan's settings; a position is one number, the step. The
stages that train build it. Nothing here depends on ranks or workers.
"""

from dataclasses import dataclass, field

import numpy as np

from data_prep.draws import draw_order
from data_prep.packs.column_files import ColumnFiles
from data_prep.packs.epoch_order import EpochOrder
from data_prep.packs.even_fit import even_fit
from data_prep.packs.pack import Pack, PackBudget
from data_prep.packs.rates import RateDraw, tile_rates
from data_prep.shards.index import IndexColumns
from vico.errors import UserError

_CACHED_WINDOWS = 4
_CHUNK_ROWS = 1 << 20
# Cost of one tile in the vision tower, in tokens of the language model: 1,024 vision tokens at about a
# tenth of the work of an 8B decoder. It decides only which samples share a pack, and
# which packs of a step a micro-step.
TILE_COST = 100


@dataclass(frozen=True)
class PlanSettings:
    """What decides the plan of an epoch besides the samples.

    The entries of the epoch are cut into windows of `window_samples`; samples share packs, and packs share
    steps, within a window.
    """

    budget: PackBudget
    packs_per_step: int
    seed: int
    epoch: int
    window_samples: int = 1024
    rates: RateDraw = field(default_factory=RateDraw)


@dataclass(frozen=True, eq=False)
class PlanSummary:
    """What needs a pass over all samples; with it, a plan opens at any step without that pass.

    `shard_entries` counts the entries of every shard's copies (see `EpochOrder`), `packs_per_window` int64
    [W] the packs of every window.
    """

    shard_entries: np.ndarray
    packs_per_window: np.ndarray


@dataclass(frozen=True, eq=False)
class _Entries:
    """The packed entries of a window: entry e is copy `copies[e]` of sample e, of `tokens[e]` tokens.

    Pack p holds the entries `members[p]`.
    """

    samples: IndexColumns
    tokens: np.ndarray
    copies: np.ndarray
    members: list[np.ndarray]


@dataclass(frozen=True, eq=False)
class _Window:
    """Entries with packs in epoch order; entry e has the rates `compressed[starts[e] : starts[e + 1]]`."""

    entries: _Entries
    members: list[np.ndarray]
    compressed: np.ndarray
    starts: np.ndarray


class PackPlan:
    """The packs of one epoch over the samples of one split.

    Shards are shuffled, then cut into windows of entries, whose samples are shuffled and packed within both
    budgets. Packs have similar costs and similar mixtures of large and small samples. A window is planned
    when one of its packs is needed; of all windows only `summary` is kept (passing it saves a pass over the
    samples).
    """

    def __init__(
        self, index: IndexColumns | ColumnFiles, settings: PlanSettings, summary: PlanSummary | None = None
    ):
        """Raise UserError if there are no samples, or if one does not fit into an empty pack."""
        if len(index) == 0:
            raise UserError(
                "the split has no samples to pack; raise its share (shard.calib_share, shard.test_share)"
            )
        self.index, self.settings = index, settings
        if summary is None:
            for first in range(0, len(index), _CHUNK_ROWS):
                settings.budget.check(index.at(np.arange(first, min(first + _CHUNK_ROWS, len(index)))))
        shard_entries = None if summary is None else summary.shard_entries
        self._order = EpochOrder(index, settings.seed, settings.epoch, shard_entries)
        self.num_windows = -(-self._order.num_entries // settings.window_samples)
        self._windows: dict[int, _Window] = {}
        if summary is None:
            num_packs = [len(self._packed(w).members) for w in range(self.num_windows)]
            summary = PlanSummary(self._order.shard_entries, np.array(num_packs, np.int64))
        if len(summary.packs_per_window) != self.num_windows:
            raise ValueError(
                f"the summary is for {len(summary.packs_per_window)} windows, not {self.num_windows}"
            )
        self.summary = summary
        self._window_starts = np.concatenate([[0], np.cumsum(summary.packs_per_window)]).astype(np.int64)

    @property
    def num_entries(self) -> int:
        """The number of samples of the epoch, with repeats."""
        return self._order.num_entries

    @property
    def num_packs(self) -> int:
        """The number of packs of the epoch, without the empty ones that fill its last step."""
        return int(self._window_starts[-1])

    @property
    def num_steps(self) -> int:
        """The number of steps of the epoch."""
        return -(-self.num_packs // self.settings.packs_per_step)

    def step(self, n: int) -> list[Pack]:
        """Return the `packs_per_step` packs of step n; those past the last pack are empty."""
        if not 0 <= n < self.num_steps:
            raise IndexError(f"step {n} of {self.num_steps}")
        first = n * self.settings.packs_per_step
        return [self.pack(number) for number in range(first, first + self.settings.packs_per_step)]

    def pack(self, number: int) -> Pack:
        """Return pack `number` of the epoch; an empty pack past the end."""
        if number >= self.num_packs:
            none = np.zeros(0, np.int64)
            return Pack(number, none, none, [])
        w = int(np.searchsorted(self._window_starts, number, side="right")) - 1
        window = self._window(w)
        entries, members = window.entries, window.members[number - int(self._window_starts[w])]
        return Pack(
            number=number,
            rows=entries.samples.rows[members],
            copies=entries.copies[members],
            compressed=[window.compressed[window.starts[e] : window.starts[e + 1]] for e in members],
            num_tokens=int(entries.tokens[members].sum()),
            num_tiles=int(entries.samples.num_tiles[members].sum()),
        )

    def _window(self, w: int) -> _Window:
        """Return window w with its packs in the order of the epoch."""
        window = self._windows.get(w)
        if window is None:
            settings, entries = self.settings, self._packed(w)
            order = self._pack_order(w, entries)
            compressed, starts = tile_rates(
                settings.rates, entries.samples, entries.copies, seed=settings.seed, epoch=settings.epoch
            )
            window = _Window(entries, [entries.members[p] for p in order], compressed, starts)
            kept = list(self._windows.items())[-(_CACHED_WINDOWS - 1) :]
            self._windows = dict([*kept, (w, window)])  # a new dict: other threads may be reading the old one
        return window

    def _packed(self, w: int) -> _Entries:
        """Return the entries of window w, with packs in the order in which they were opened."""
        settings, budget = self.settings, self.settings.budget
        first = w * settings.window_samples
        positions, copies = self._order.entries(first, min(first + settings.window_samples, self.num_entries))
        samples = self.index.at(positions)
        shuffled = draw_order("entry order", settings.seed, settings.epoch, samples.rows, copies)
        samples, copies = samples.at(shuffled), copies[shuffled]
        tokens = budget.sample_tokens(samples)
        packs, num_packs = even_fit(
            tokens, samples.num_tiles, budget.reference_tokens, budget.tiles, TILE_COST
        )
        by_pack = np.argsort(packs, kind="stable")
        members = np.split(by_pack, np.searchsorted(packs[by_pack], np.arange(1, num_packs)))
        return _Entries(samples, tokens, copies, members)

    def _pack_order(self, w: int, entries: _Entries) -> np.ndarray:
        """Return the packs of the window in random order, and those within each step by cost.

        Steps are random, because a step's loss is divided by its own weight: in a step of few large samples
        each would count more than others do. On any number of ranks, packs that share a micro-step then are
        neighbours in cost.
        """
        settings, samples = self.settings, entries.samples
        costs = np.array([_cost(entries.tokens[m], samples.num_tiles[m]) for m in entries.members])
        shuffled = draw_order("step order", settings.seed, settings.epoch, w, np.arange(len(costs)))
        steps = (self._window_starts[w] + np.arange(len(costs))) // settings.packs_per_step
        return shuffled[np.lexsort((costs[shuffled], steps))]


def _cost(tokens: np.ndarray, tiles: np.ndarray) -> int:
    return int(tokens.sum()) + TILE_COST * int(tiles.sum())
