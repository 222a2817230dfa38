"""The planning columns of one split as flat files, written once from the index and read window by window.

So a plan over any number of samples needs the memory of one window. `data_prep/packs/plan_cache.py` opens
them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.shards.index import IndexColumns, ShardIndex, columns_at

_DTYPES = {
    "rows": np.int64,
    "shard": np.int32,
    "text_tokens": np.int32,
    "num_tiles": np.int32,
    "repeat": np.float32,
    "image_starts": np.int64,
    "image_tiles": np.int16,
}
_SCHEMA = 1


class ColumnFiles:
    """The columns of IndexColumns over n samples, in files.

    Each access maps a file, and the mapping ends with the array, so that pages that were read do not
    accumulate in the process.
    """

    def __init__(self, folder: Path, index: ShardIndex | None = None):
        self.folder, self.index = folder, index
        about = json.loads((folder / "about.json").read_text())
        self._length, self._num_images = about["num_samples"], about["num_images"]

    def __len__(self) -> int:
        return self._length

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in _DTYPES:
            raise AttributeError(name)
        lengths = {"image_starts": self._length + 1, "image_tiles": self._num_images}
        length = lengths.get(name, self._length)
        if not length:
            return np.zeros(0, _DTYPES[name])
        return np.memmap(self.folder / name, _DTYPES[name], mode="r", shape=(length,))

    def at(self, positions: np.ndarray) -> IndexColumns:
        """Return the samples at these positions, int64 [any], in that order."""
        return columns_at(self, positions)

    def shard_runs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what `IndexColumns.shard_runs` returns."""
        runs = np.load(self.folder / "runs.npy")
        return runs[0, :-1], runs[1]

    def name(self, i: int) -> str:
        """Return the key of sample i for messages, or its row number without an index."""
        row = int(self.rows[i])
        return f"row {row}" if self.index is None else self.index.row(row)["key"]


def index_digest(path: Path) -> str:
    """Return 16 hex digits that identify the state of an index file: footer, size and modification time.

    A digest of the whole file would read gigabytes at every start. A copy has another time, so it is read
    again.
    """
    status = path.stat()
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        footer_bytes = int.from_bytes(file.read(4), "little")
        file.seek(-8 - footer_bytes, os.SEEK_END)
        digest = hashlib.sha256(file.read())
    digest.update(f"{status.st_size} {status.st_mtime_ns} {_SCHEMA}".encode())
    return digest.hexdigest()[:16]


def column_files(path: Path, split: str, cache: Path, index: ShardIndex | None = None) -> ColumnFiles:
    """Return the columns of a split of the index at `path`; write them to `cache` if they are missing.

    Several processes may call this: each writes its own partial folder, and the first to rename wins.
    """
    folder = cache / f"columns-{split}-{index_digest(path)}"
    if not (folder / "about.json").is_file():
        partial = cache / f".{folder.name}.partial-{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_columns(path, split, partial)
        try:
            partial.rename(folder)
        except OSError:
            shutil.rmtree(partial)
            if not (folder / "about.json").is_file():
                raise
    return ColumnFiles(folder, index)


def _write_columns(path: Path, split: str, folder: Path) -> None:
    """Write the files in one pass over the index, one row group at a time."""
    files = {name: open(folder / name, "wb") for name in _DTYPES}  # noqa: SIM115 - closed below
    try:
        runs, about = _copy_row_groups(pq.ParquetFile(path), split, files)
    finally:
        for file in files.values():
            file.close()
    np.save(folder / "runs.npy", runs)
    (folder / "about.json").write_text(json.dumps(about))


def _copy_row_groups(
    parquet: pq.ParquetFile, split: str, files: Mapping[str, BinaryIO]
) -> tuple[np.ndarray, dict[str, int]]:
    """Append the split's columns to their files; return the shard runs, int64 [2, K + 1], and the counts.

    Row 0 of the runs holds shard numbers and -1, row 1 the position of each shard's first sample and the end.
    """
    names = ["shard", "text_tokens", "num_tiles", "repeat", "tiles", "split"]
    num_rows = num_samples = num_images = 0
    last_shard, numbers, starts = -1, [], []
    np.zeros(1, np.int64).tofile(files["image_starts"])
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, names)
        in_split = pc.equal(table["split"], split)
        rows = num_rows + np.flatnonzero(in_split.to_numpy())
        num_rows += len(table)
        columns = _group_columns(table.filter(in_split), rows, num_images)
        for name, values in columns.items():
            np.ascontiguousarray(values, _DTYPES[name]).tofile(files[name])
        shard = columns["shard"]
        before = np.r_[last_shard, shard[:-1]]
        new = np.flatnonzero(shard != before[: len(shard)])
        numbers.append(shard[new].astype(np.int64))
        starts.append(num_samples + new)
        num_samples += len(rows)
        if len(rows):
            num_images, last_shard = int(columns["image_starts"][-1]), shard[-1]
    none = np.zeros(0, np.int64)
    runs = np.stack([np.r_[none, *numbers, -1], np.r_[none, *starts, num_samples]])
    return runs, {"num_samples": num_samples, "num_images": num_images}


def _group_columns(table: pa.Table, rows: np.ndarray, num_images: int) -> dict[str, np.ndarray]:
    """Return the columns of one row group's samples, after `num_images` images in earlier groups.

    `image_starts` holds the end of each sample's images: the files begin with the first start, 0.
    """
    tiles = table["tiles"].combine_chunks()
    image_ends = num_images + np.cumsum(pc.list_value_length(tiles).to_numpy(zero_copy_only=False))
    plain = {name: table[name].to_numpy() for name in ("shard", "text_tokens", "num_tiles", "repeat")}
    return {**plain, "rows": rows, "image_starts": image_ends, "image_tiles": tiles.flatten().to_numpy()}
