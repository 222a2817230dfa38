"""Which samples get losses, by shard: those of the config's splits, sources and kinds, up to its budget."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.draws import chosen_rows, limited
from data_prep.shards.index import load_index
from stages.ratio.config import RatioConfig
from vico.errors import UserError
from vico.shown_text import printable

_MOST_NAMES = 20


@dataclass(frozen=True)
class ShardRows:
    """The chosen rows of one shard."""

    shard: int
    rows: tuple[int, ...]


def shards_of(
    config: RatioConfig, shard_folder: Path, note: Callable[[str], None] = lambda message: None
) -> list[ShardRows]:
    """Return the chosen rows by shard: samples of the config's splits with a tile and an answer token.

    `note` hears of each split from which only some are taken.

    Raises UserError if the config names a source or kind of which train has no such sample.
    """
    index = load_index(shard_folder)
    rows, shards = [], []
    for split in config.splits:
        names = {"source": config.sources, "kind": config.kinds} if split == "train" else {}
        wanted = [column for column, values in names.items() if values]
        table = index.table(["shard", "num_tiles", "answer_tokens", *wanted], split)
        usable = pc.and_(pc.greater(table["num_tiles"], 0), pc.greater(table["answer_tokens"], 0))
        table = table.filter(usable)
        for column in wanted:
            table = _named(table, column, names[column])
        candidates = table["row"].to_numpy()
        field, most = config.budget(split)
        chosen = chosen_rows(candidates, most, config.seed)
        if len(chosen) < len(candidates):
            note(limited(len(chosen), len(candidates), split, field))
        rows.append(chosen)
        shards.append(table["shard"].to_numpy()[np.searchsorted(candidates, chosen)])
    row, shard = np.concatenate(rows), np.concatenate(shards)
    return [
        ShardRows(number, tuple(np.sort(row[positions]).tolist()))
        for number, positions in positions_by_value(shard)
    ]


def _named(table: pa.Table, column: str, names: Sequence[str]) -> pa.Table:
    """Return the rows with one of the names. Raises UserError for a name that no row has."""
    known = set(pc.unique(table[column]).to_pylist())
    for name in names:
        if name not in known:
            listed = ", ".join(printable(value) for value in sorted(known)[:_MOST_NAMES])
            more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
            raise UserError(
                f"ratio.{column}s names {printable(name)}, and no train sample with a picture and an answer "
                f"has that {column}; name some of: {listed or 'none'}{more}"
            )
    return table.filter(pc.is_in(table[column], pa.array(names, pa.string())))


def positions_by_value(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each distinct value, rising, with its positions, rising. One sort serves all values."""
    order = np.argsort(values, kind="stable")
    distinct, first = np.unique(values[order], return_index=True)
    return zip(distinct.tolist(), np.split(order, first)[1:], strict=True)
