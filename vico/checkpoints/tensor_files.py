"""Tensors of safetensors files as ranges of bytes: looked at without reading them, written range by range.

What renames, splits along the first axis or concatenates tensors is a copy of bytes, so the memory of writing
a checkpoint of any size is one buffer.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from vico.errors import UserError
from vico.settings import weight_files

SHARD_BYTES = 5 * 10**9  # largest file, as transformers and the published checkpoints have it
_BUFFER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, or some of its rows, as bytes `start` to `start + num_bytes` of a file. `dtype` is the name
    that safetensors gives it.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def chunk(self, number: int) -> tuple["StoredTensor", ...]:
        """Equal pieces along the first axis, as torch.chunk gives them where `number` divides it."""
        rows, rest = divmod(self.shape[0], number)
        if rest:
            raise UserError(f"{self.path}: a tensor of shape {list(self.shape)} has no {number} equal parts")
        size = self.num_bytes // number
        shape = (rows, *self.shape[1:])
        return tuple(
            replace(self, shape=shape, start=self.start + part * size, num_bytes=size)
            for part in range(number)
        )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's weight files by its name in them."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        found |= tensors_of_file(path)
    return found


def tensors_of_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name; UserError where it is cut short."""
    try:
        with safe_open(path, framework="pt"):
            pass  # safetensors itself checks header, ranges and the file's length
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            start = 8 + header_bytes + begin
            found[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), start, end - begin)
    return found


def write_tensor_files(
    folder: Path, tensors: Mapping[str, tuple[StoredTensor, ...]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `model.safetensors`, or shards of at most `shard_bytes` (one tensor may be larger) and an index.

    Each tensor is the concatenation of its parts along the first axis. Files are synced; the index comes
    last.
    """
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", tensors, shards[0])
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file_name, tensors, names)
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(_num_bytes(parts) for parts in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _num_bytes(parts: Iterable[StoredTensor]) -> int:
    return sum(part.num_bytes for part in parts)


def _shards(tensors: Mapping[str, tuple[StoredTensor, ...]], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, parts in tensors.items():
        size = _num_bytes(parts)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(tensors: Mapping[str, tuple[StoredTensor, ...]], names: list[str]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        parts = tensors[name]
        assert len({(part.dtype, part.shape[1:]) for part in parts}) == 1, name
        rows = () if not parts[0].shape else (sum(part.shape[0] for part in parts),)
        end = offset + _num_bytes(parts)
        entries[name] = {
            "dtype": parts[0].dtype,
            "shape": [*rows, *parts[0].shape[1:]],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _write_file(path: Path, tensors: Mapping[str, tuple[StoredTensor, ...]], names: list[str]) -> None:
    # wider dtypes first, as safetensors writes them: each tensor then starts at a multiple of its item
    names = sorted(names, key=lambda name: -_item_bits(tensors[name][0].dtype))
    header = _header(tensors, names)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            for part in tensors[name]:
                _copy(part, file)
        file.flush()
        os.fsync(file.fileno())


def _item_bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def _copy(part: StoredTensor, target: BinaryIO) -> None:
    with part.path.open("rb", buffering=0) as source:
        source.seek(part.start)
        for number in range(math.ceil(part.num_bytes / _BUFFER_BYTES)):
            wanted = min(_BUFFER_BYTES, part.num_bytes - number * _BUFFER_BYTES)
            piece = source.read(wanted)
            if len(piece) != wanted:
                raise UserError(f"{part.path} became shorter while it was read; copy it again")
            target.write(piece)
