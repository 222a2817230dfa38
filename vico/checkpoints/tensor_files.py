"""Tensors of safetensors files as byte ranges: inspected without reading them, written range by range.

Renaming, splitting along the first axis and joining tensors copy bytes, so writing a checkpoint of any size
needs the memory of one buffer.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from vico.errors import UserError
from vico.model_files import weight_files

SHARD_BYTES = 5 * 10**9  # the largest file, as in transformers and the published checkpoints
_BUFFER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, or some of its rows, as (start, number of bytes) of consecutive `spans` of a file.

    `dtype` is a name of safetensors, such as BF16.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def num_bytes(self) -> int:
        return sum(length for _, length in self.spans)

    def chunk(self, number: int) -> tuple["StoredTensor", ...]:
        """Return `number` equal pieces along the first axis; raise UserError if it does not divide evenly."""
        rows, rest = divmod(self.shape[0], number)
        if rest:
            raise UserError(
                f"{self.path}: a tensor of shape {list(self.shape)} does not split into {number} equal "
                "parts; copy the weights again"
            )
        size = self.num_bytes // number
        shape = (rows, *self.shape[1:])
        return tuple(
            replace(self, shape=shape, spans=_cut(self.spans, part * size, size)) for part in range(number)
        )


def joined(pieces: Sequence[StoredTensor]) -> StoredTensor:
    """Return pieces of one file, of equal dtype and width, as a tensor of all their rows in this order."""
    assert len({(piece.path, piece.dtype, piece.shape[1:]) for piece in pieces}) == 1
    spans: list[tuple[int, int]] = []
    for start, length in chain.from_iterable(piece.spans for piece in pieces):
        if spans and sum(spans[-1]) == start:
            start, length = spans[-1][0], spans.pop()[1] + length
        spans.append((start, length))
    rows = sum(piece.shape[0] for piece in pieces)
    return replace(pieces[0], shape=(rows, *pieces[0].shape[1:]), spans=tuple(spans))


def _cut(spans: Iterable[tuple[int, int]], begin: int, num_bytes: int) -> tuple[tuple[int, int], ...]:
    """Return the spans of the `num_bytes` from byte `begin` on, counted over all spans."""
    cut = []
    for start, length in spans:
        first, last = max(begin, 0), min(begin + num_bytes, length)
        if first < last:
            cut.append((start + first, last - first))
        begin -= length
    return tuple(cut)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the folder's weight files, by its name in the files."""
    tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        tensors |= tensors_of_file(path)
    return tensors


def tensors_of_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file by name; raise UserError if it is cut short."""
    try:
        with safe_open(path, framework="numpy"):  # imports no torch
            pass  # safetensors itself checks header, ranges and the file's length
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    tensors = {}
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            start = 8 + header_bytes + begin
            spans = ((start, end - begin),)
            tensors[name] = StoredTensor(path, about["dtype"], tuple(about["shape"]), spans)
    return tensors


def write_tensor_files(
    folder: Path, tensors: Mapping[str, tuple[StoredTensor, ...]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `model.safetensors`, or shards and an index.

    A shard has at most `shard_bytes`, or a single larger tensor. Each tensor is the concatenation of its
    parts along the first axis. Files are synced; the index is written last.
    """
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", tensors, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file_name, tensors, names)
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(_num_bytes(parts) for parts in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_into(part: StoredTensor, buffer: memoryview) -> None:
    """Read a tensor's bytes into a writable buffer of bytes; raise UserError if the file is too short."""
    with part.path.open("rb", buffering=0) as source:
        filled = 0
        for start, length in part.spans:
            source.seek(start)
            end = filled + length
            while filled < end:  # one call reads at most 2 GiB
                num_read = source.readinto(buffer[filled:end])
                if not num_read:
                    raise _became_shorter(part)
                filled += num_read


def _became_shorter(part: StoredTensor) -> UserError:
    return UserError(f"{part.path} became shorter while it was read; copy it again")


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
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        parts = tensors[name]
        assert len({(part.dtype, part.shape[1:]) for part in parts}) == 1, name
        rows = () if not parts[0].shape else (sum(part.shape[0] for part in parts),)
        end = offset + _num_bytes(parts)
        header[name] = {
            "dtype": parts[0].dtype,
            "shape": [*rows, *parts[0].shape[1:]],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _write_file(path: Path, tensors: Mapping[str, tuple[StoredTensor, ...]], names: list[str]) -> None:
    # Wider dtypes first, as safetensors does: each tensor then starts at a multiple of its item size.
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
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) if bits else 8


def _copy(part: StoredTensor, target: BinaryIO) -> None:
    with part.path.open("rb", buffering=0) as source:
        for start, length in part.spans:
            source.seek(start)
            for number in range(math.ceil(length / _BUFFER_BYTES)):
                piece_bytes = min(_BUFFER_BYTES, length - number * _BUFFER_BYTES)
                piece = source.read(piece_bytes)
                if len(piece) != piece_bytes:
                    raise _became_shorter(part)
                target.write(piece)
