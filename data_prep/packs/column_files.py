"""The planning columns of one split as flat files, written once from the index and read window by window.

So a plan over any number of samples holds no more than a window; opened by `data_prep/packs/plan_cache.py`.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
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
    """Columns as in IndexColumns over n samples; each access maps a file anew and drops the mapping with the
    array, so that pages that were read do not pile up in the process.
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
        """The samples at these positions, int64 [any], in that order."""
        return columns_at(self, positions)

    def shard_runs(self) -> tuple[np.ndarray, np.ndarray]:
        """As IndexColumns.shard_runs."""
        runs = np.load(self.folder / "runs.npy")
        return runs[0, :-1], runs[1]

    def name(self, i: int) -> str:
        """The key of sample i for messages, or its row number where no index is at hand."""
        row = int(self.rows[i])
        return f"row {row}" if self.index is None else self.index.row(row)["key"]


def index_digest(path: Path) -> str:
    """16 hex digits that name this state of an index file: its footer, size and time of change.

    A whole digest would read gigabytes at every start; a copy has another time and is read anew.
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
    """The columns of a split of the index at `path`, written to `cache` where they are not there yet.

    Safe to call from several processes: each writes its own partial folder, the first to rename wins.
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
    """One pass over the index, a row group at a time."""
    names = ["shard", "text_tokens", "num_tiles", "repeat", "tiles", "split"]
    num_rows = num_samples = num_images = 0
    last_shard, numbers, starts = None, [], []
    files = {name: open(folder / name, "wb") for name in _DTYPES}  # noqa: SIM115 - closed below
    try:
        np.zeros(1, np.int64).tofile(files["image_starts"])
        parquet = pq.ParquetFile(path)
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, names)
            chosen = pc.equal(table["split"], split)
            rows = num_rows + np.flatnonzero(chosen.to_numpy())
            num_rows += len(table)
            table = table.filter(chosen)
            tiles = table["tiles"].combine_chunks()
            ends = num_images + np.cumsum(pc.list_value_length(tiles).to_numpy(zero_copy_only=False))
            found = {name: table[name].to_numpy() for name in ("shard", "text_tokens", "num_tiles", "repeat")}
            found |= {"rows": rows, "image_starts": ends, "image_tiles": tiles.flatten().to_numpy()}
            for name, values in found.items():
                np.ascontiguousarray(values, _DTYPES[name]).tofile(files[name])
            shard = found["shard"]
            before = np.r_[-1 if last_shard is None else last_shard, shard[:-1]]
            new = np.flatnonzero(shard != before[: len(shard)])
            numbers.append(shard[new].astype(np.int64))
            starts.append(num_samples + new)
            num_samples += len(rows)
            if len(rows):
                num_images, last_shard = int(ends[-1]), shard[-1]
    finally:
        for file in files.values():
            file.close()
    none = np.zeros(0, np.int64)
    np.save(folder / "runs.npy", np.stack([np.r_[none, *numbers, -1], np.r_[none, *starts, num_samples]]))
    about = {"num_samples": num_samples, "num_images": num_images}
    (folder / "about.json").write_text(json.dumps(about))
