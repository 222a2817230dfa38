"""A synthetic index of any size with the columns that planning reads, written row group by row group.

`benchmarks/planning.py` and `benchmarks/loading.py` use it; the shards of its samples do not exist.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.shards.index import SCHEMA
from data_prep.shards.names import INDEX_FILE

_COLUMNS = ("shard", "split", "repeat", "tiles", "num_tiles", "text_tokens")
_ROWS_PER_GROUP = 16_384
_SAMPLES_PER_SHARD = 1000
MOST_TILES = 13
MOST_TEXT_TOKENS = 400


def write_synthetic_index(folder: Path, num_samples: int, seed: int = 0) -> Path:
    """Write `folder`/index.parquet: shards of 1,000 samples with 0 to 2 pictures, 96 % of them in train."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([SCHEMA.field(name) for name in _COLUMNS]).with_metadata(SCHEMA.metadata)
    path = folder / INDEX_FILE
    partial = path.with_suffix(".partial")
    with pq.ParquetWriter(partial, schema) as writer:
        for number, first in enumerate(range(0, num_samples, _ROWS_PER_GROUP)):
            rng = np.random.default_rng([seed, number])
            writer.write_table(_rows(rng, first, min(_ROWS_PER_GROUP, num_samples - first), schema))
    partial.rename(path)
    return path


def _rows(rng: np.random.Generator, first: int, n: int, schema: pa.Schema) -> pa.Table:
    num_pictures = rng.choice([0, 1, 1, 1, 1, 1, 1, 2], n)
    tiles = rng.choice([1, 1, 1, 3, 5, 6], num_pictures.sum()).astype(np.int16)
    ends = np.concatenate([[0], np.cumsum(num_pictures)])
    num_tiles = np.concatenate([[0], np.cumsum(tiles)])[ends]
    return pa.table(
        {
            "shard": (np.arange(first, first + n) // _SAMPLES_PER_SHARD).astype(np.int32),
            "split": pa.array(rng.choice(["train", "calib", "test"], n, p=[0.96, 0.02, 0.02])),
            "repeat": np.ones(n, np.float32),
            "tiles": pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(tiles)),
            "num_tiles": np.diff(num_tiles).astype(np.int32),
            "text_tokens": rng.integers(20, MOST_TEXT_TOKENS, n).astype(np.int32),
        },
        schema=schema,
    )
