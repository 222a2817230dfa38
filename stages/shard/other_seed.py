"""The search for a `shard.split_seed` that leaves no needed split without a picture and an answer.

`pipeline/planning/shard_contents.py` names it when the split of a small set of records came out too uneven.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.shards.leaks import SPLIT_COLUMNS, leaked_lines
from data_prep.shards.picture_sides import picture_sides
from data_prep.shards.split import Shares, split_of

INDEX_COLUMNS = ("key", "num_tiles", "answer_tokens", *SPLIT_COLUMNS)
_NUM_SEEDS = 300


def split_seed_with(
    index: pa.Table, shares: Shares, heldout: frozenset[str], needed: Collection[str]
) -> int | None:
    """Return the smallest seed with a sample with picture and answer in each `needed` split, or None.

    `index` has INDEX_COLUMNS. Each seed is tried as the shard stage would use it.
    """
    is_usable = pc.and_(pc.greater(index["num_tiles"], 0), pc.greater(index["answer_tokens"], 0))
    usable = np.flatnonzero(is_usable.to_numpy())
    for seed in range(_NUM_SEEDS):
        table = _split_again(index, replace(shares, seed=seed), heldout)
        leaked = leaked_lines(partial(list, [table])).get(0, frozenset())
        splits = table["split"].to_pylist()
        if set(needed) <= {splits[row] for row in usable.tolist() if row not in leaked}:
            return seed
    return None


def _split_again(index: pa.Table, shares: Shares, heldout: frozenset[str]) -> pa.Table:
    """Return the columns of the split as another seed draws them; lines are the numbers of the rows."""
    columns = (index[name].to_pylist() for name in ("key", "group", "source", "image_sha256"))
    splits = [
        "test" if source in heldout else split_of(shares, key=key, group=group, pictures=pictures)
        for key, group, source, pictures in zip(*columns, strict=True)
    ]
    table = index.select([*SPLIT_COLUMNS])
    for name, values in (("line", range(len(index))), ("split", splits)):
        position = table.schema.get_field_index(name)
        table = table.set_column(position, table.schema.field(name), pa.array(values, table[name].type))
    return picture_sides(lambda: [table], heldout).settled(table)
