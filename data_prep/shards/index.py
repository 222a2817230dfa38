"""The index of the shards: one row per sample, in shard order, with byte offsets, split, tiles and tokens.

`load_index` opens the index that the shard stage wrote. Planning gets columns as numpy arrays; single rows
are read by row group, so that a large index is never in memory as a whole.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.remote_files import Location, as_location
from data_prep.shards.names import INDEX_FILE
from vico.errors import UserError, one_line

INDEX_SCHEMA = 2
_OLDER = {"image_sha256": pa.list_(pa.binary(32))}
"""Types of columns that earlier versions wrote, which are read, too."""
_META_KEY = b"vico.schema"
_CACHED_ROW_GROUPS = 8
_COLUMNS = (
    ("shard", pa.int32()),
    ("key", pa.string()),
    ("source", pa.string()),
    ("line", pa.int64()),
    ("split", pa.string()),
    ("group", pa.string()),
    ("kind", pa.string()),
    ("license", pa.string()),
    ("origin", pa.string()),
    ("repeat", pa.float32()),
    ("json_offset", pa.int64()),
    ("json_bytes", pa.int32()),
    ("image_offsets", pa.list_(pa.int64())),
    ("image_bytes", pa.list_(pa.int32())),
    ("image_sha256", pa.list_(pa.binary())),  # pandas cannot read lists of binary(32)
    ("widths", pa.list_(pa.int32())),
    ("heights", pa.list_(pa.int32())),
    ("tiles", pa.list_(pa.int16())),
    ("num_tiles", pa.int32()),
    ("max_tiles", pa.int16()),
    ("text_tokens", pa.int32()),
    ("answer_tokens", pa.int32()),
)
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS]).with_metadata(
    {_META_KEY: str(INDEX_SCHEMA).encode()}
)


@dataclass(frozen=True, eq=False)
class IndexColumns:
    """The planning columns of n samples, those of one split or all, in index order.

    `rows` int64 [n] are row numbers of the index; `shard` int32 [n]; `text_tokens`, `num_tiles` int32 [n];
    `repeat` float32 [n]; picture k of sample i has `image_tiles[image_starts[i] + k]` tiles (`image_starts`
    int64 [n + 1]). `index` is used to name samples in messages; None names them by row number.
    """

    rows: np.ndarray
    shard: np.ndarray
    text_tokens: np.ndarray
    num_tiles: np.ndarray
    repeat: np.ndarray
    image_starts: np.ndarray
    image_tiles: np.ndarray
    index: "ShardIndex | None" = None

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, positions: np.ndarray) -> "IndexColumns":
        """Return the samples at these positions, int64 [any], in that order."""
        return columns_at(self, positions)

    def take(self, chosen: np.ndarray) -> "IndexColumns":
        """Return the samples for which `chosen` (bool [n]) is true, in index order."""
        return self.at(np.flatnonzero(chosen))

    def shard_runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (numbers of the K shards, starts of their samples and end of the last, int64 [K + 1])."""
        starts = np.flatnonzero(np.r_[True, self.shard[1:] != self.shard[:-1]][: len(self)])
        return self.shard[starts], np.r_[starts, len(self)].astype(np.int64)

    def name(self, i: int) -> str:
        """Return the key of sample i for messages, or its row number when there is no index."""
        if self.index is None:
            return f"row {self.rows[i]}"
        key: str = self.index.row(int(self.rows[i]), ("key",))["key"]
        return key


def columns_at(columns: Any, positions: np.ndarray) -> IndexColumns:
    """Return the samples at `positions` of any object with the columns of IndexColumns, in memory."""
    starts = columns.image_starts
    first = np.asarray(starts[positions])
    counts = np.asarray(starts[positions + 1]) - first
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    images = np.repeat(first - ends[:-1], counts) + np.arange(ends[-1])
    return IndexColumns(
        rows=np.asarray(columns.rows[positions]),
        shard=np.asarray(columns.shard[positions]),
        text_tokens=np.asarray(columns.text_tokens[positions]),
        num_tiles=np.asarray(columns.num_tiles[positions]),
        repeat=np.asarray(columns.repeat[positions]),
        image_starts=ends,
        image_tiles=np.asarray(columns.image_tiles[images]),
        index=columns.index,
    )


class ShardIndex:
    """An opened index; safe to use from several threads."""

    def __init__(self, folder: Location) -> None:
        self.folder, self.path = folder, _index_path(folder)
        if not self.path.is_file():
            raise UserError(f"{self.path} does not exist; run the shard stage to its end")
        with self._reading():
            self._file = pq.ParquetFile(self.path)
            columns = self._file.schema_arrow
        schema = (columns.metadata or {}).get(_META_KEY, b"?").decode("utf-8", "replace")
        if schema != str(INDEX_SCHEMA):
            raise UserError(
                f"{self.path} has schema {schema}, this version reads {INDEX_SCHEMA}; "
                "run the shard stage again"
            )
        for name, kind in _COLUMNS:
            if name not in columns.names or columns.field(name).type not in (kind, _OLDER.get(name)):
                raise self._damaged(f"its column {name} is missing or not {kind}")
        metadata = self._file.metadata
        sizes = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
        self._group_starts = [0, *accumulate(sizes)]
        self._groups: OrderedDict[int, dict[str, Callable[[int], Any]]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._group_starts[-1]

    def __reduce__(self) -> tuple[type["ShardIndex"], tuple[Location]]:
        return ShardIndex, (self.folder,)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn errors of Arrow about the content of the file into UserError."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # from the file system; errors of Arrow have none
            raise self._damaged(one_line(error)) from error

    def _damaged(self, problem: str) -> UserError:
        return UserError(f"{self.path} is damaged ({problem}); copy it again, or run with --force shard")

    def row(self, row: int, columns: Collection[str] = SCHEMA.names) -> dict[str, Any]:
        """Return the named columns of one row as plain Python values. Raises IndexError past the end."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        group = bisect_right(self._group_starts, row) - 1
        position = row - self._group_starts[group]
        values = self._row_group(group)
        return {name: values[name](position) for name in columns}

    def table(self, columns: Sequence[str] | None = None, split: str | None = None) -> pa.Table:
        """Return the named columns (None: all) and `row`, the row number; of all samples or of one split."""
        names = [name for name, _ in _COLUMNS] if columns is None else list(columns)
        with self._lock, self._reading():
            table = self._file.read(list({*names, "split"}))
            table.validate(full=True)
        selected = table.select(names).append_column("row", pa.array(np.arange(len(table))))
        return selected if split is None else selected.filter(pc.equal(table["split"], split))

    def columns(self, split: str | None = None) -> IndexColumns:
        """Return the planning columns of one split: train, calib or test; None: of all samples."""
        table = self.table(["shard", "text_tokens", "num_tiles", "repeat", "tiles"], split)
        tiles = table["tiles"].combine_chunks()
        lengths = pc.list_value_length(tiles).to_numpy(zero_copy_only=False).astype(np.int64)
        return IndexColumns(
            rows=table["row"].to_numpy(),
            shard=table["shard"].to_numpy(),
            text_tokens=table["text_tokens"].to_numpy(),
            num_tiles=table["num_tiles"].to_numpy(),
            repeat=table["repeat"].to_numpy(),
            image_starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            image_tiles=tiles.flatten().to_numpy(),
            index=self,
        )

    def _row_group(self, group: int) -> dict[str, Callable[[int], Any]]:
        """Return the columns of a row group, each as a function from a position in it to the value."""
        with self._lock:
            columns = self._groups.pop(group, None)
            if columns is None:
                with self._reading():
                    table = self._file.read_row_group(group)
                    table.validate(full=True)  # texts of a damaged file may not be UTF-8
                columns = {name: _values(table[name].combine_chunks()) for name in table.column_names}
            self._groups[group] = columns
            if len(self._groups) > _CACHED_ROW_GROUPS:
                self._groups.popitem(last=False)
            return columns


def _values(array: pa.Array) -> Callable[[int], Any]:
    """Return a function from a position in a column without nulls to its plain Python value.

    Numbers come through numpy: a scalar of Arrow takes several times as long, a slice of its table a hundred
    times.
    """
    if pa.types.is_list(array.type):
        start, values = array.offsets.to_numpy().item, array.values
        if pa.types.is_primitive(values.type):
            numbers = values.to_numpy()
            return lambda position: numbers[start(position) : start(position + 1)].tolist()
        return lambda position: [values[k].as_py() for k in range(start(position), start(position + 1))]
    if pa.types.is_primitive(array.type):
        return array.to_numpy().item
    return lambda position: array[position].as_py()


def load_index(folder: Path | str) -> ShardIndex:
    """Return the index of a shard stage's output folder, local or remote.

    Raises UserError when it is missing, damaged or has another schema.
    """
    return ShardIndex(as_location(str(folder)))


def _index_path(folder: Location) -> Path:
    if isinstance(folder, Path):
        return folder / INDEX_FILE
    from data_prep.shards.cache import ShardCache

    return ShardCache(folder).index(INDEX_FILE)
