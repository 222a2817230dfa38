"""Samples out of the shards by byte offset, ready to pack; used by every stage that runs the model.

What is read is held against the index, so that a swapped or damaged shard stops the run with its name.
"""

import hashlib
import io
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.remote_files import as_place, joined
from data_prep.shards.cache import OpenFile, ShardCache, WrongBytes
from data_prep.shards.index import ShardIndex, load_index
from data_prep.shards.names import shard_name
from vico.errors import UserError
from vico.packing import EncodedSample
from vico.prompt import PromptFormat
from vico.tiling import Tiling, pixel_values

_OPEN_SHARDS = 64
_READ_COLUMNS = (
    "key",
    "shard",
    "source",
    "line",
    "json_offset",
    "json_bytes",
    "image_offsets",
    "image_bytes",
    "image_sha256",
    "tiles",
    "max_tiles",
    "text_tokens",
)
_PLACE_COLUMNS = ("key", "shard", "json_offset", "json_bytes", "image_offsets", "image_bytes")
_OPEN_REMOTE_SHARDS = 4  # each stays in the cache as long as it is open
_READ_ATTEMPTS = 3
_RETRY_WAIT_S = 0.2
logger = logging.getLogger(__name__)


class ShardMismatch(UserError):
    """A shard does not hold what the index says."""


class SampleReader:
    """Reads the samples of a shard folder; `row` is a row number of its index. Safe to use from several
    threads; `threads` of its own decode what `samples` asks for.
    """

    def __init__(
        self,
        shard_folder: Path | str,
        prompt_format: PromptFormat,
        index: ShardIndex | None = None,
        threads: int = 1,
    ):
        self.folder, self.prompt_format = as_place(str(shard_folder)), prompt_format
        self._cache = ShardCache(self.folder) if isinstance(self.folder, str) else None
        self._num_open = _OPEN_SHARDS if self._cache is None else _OPEN_REMOTE_SHARDS
        self.index = load_index(self.folder) if index is None else index
        self._shards: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None

    def record(self, row: int) -> dict[str, Any]:
        """KEY.json of a sample."""
        entry = self.index.row(row)
        return self._parsed(entry, self._bytes(entry, entry["json_offset"], entry["json_bytes"]))

    def pictures(self, row: int) -> list[Image.Image]:
        """The sample's pictures in order, decoded."""
        entry = self.index.row(row)
        return self._decoded(entry, self._members(entry)[1])

    def sample(self, row: int) -> EncodedSample:
        """The sample with its tiles, float32 [T, 3, S, S] (T = 0 for text only), and its skeleton.

        Raises ShardMismatch when shard, index and model do not agree on its pictures, tiles or tokens.
        """
        entry = self.index.row(row, _READ_COLUMNS)
        text, pictures = self._members(entry)
        tiling = self.prompt_format.settings.tiling(entry["max_tiles"])
        tiles = [pixel_values(image, tiling) for image in self._decoded(entry, pictures)]
        tiles_per_image = tuple(len(one) for one in tiles)
        if list(tiles_per_image) != entry["tiles"]:
            raise self._mismatch(
                entry, f"pictures give {list(tiles_per_image)} tiles, the index has {entry['tiles']}"
            )
        skeleton = self.prompt_format.encode(self._parsed(entry, text)["conversations"], tiles_per_image)
        if skeleton.num_text_tokens != entry["text_tokens"]:
            raise self._mismatch(
                entry,
                f"the text gives {skeleton.num_text_tokens} tokens, the index has {entry['text_tokens']}",
            )
        pixels = np.concatenate(tiles) if len(tiles) > 1 else tiles[0] if tiles else _no_tiles(tiling)
        return EncodedSample(entry["key"], row, skeleton, pixels, tiles_per_image)

    def samples(self, rows: Iterable[int]) -> list[EncodedSample]:
        """`sample` of each row, in their order. Reading, decoding and scaling run beside each other: they
        let go of Python's lock."""
        rows = list(rows)
        self.announce(rows)
        return list(map(self.sample, rows) if self._pool is None else self._pool.map(self.sample, rows))

    def announce(self, rows: Iterable[int]) -> None:
        """Has the operating system fetch what these rows will read, beside the work that goes on here: a read
        out of a file that is not in memory waits for the disk.

        Does nothing for remote shards, whose files have just been written or are fetched whole.
        """
        if self._cache is not None:
            return
        for row in rows:
            entry = self.index.row(row, _PLACE_COLUMNS)
            start, num_bytes = _span(entry)
            os.posix_fadvise(self._shard(entry).descriptor, start, num_bytes, os.POSIX_FADV_WILLNEED)

    def _parsed(self, entry: dict[str, Any], text: bytes) -> dict[str, Any]:
        try:
            record = json.loads(text)
            found = record["source"], record["line"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._mismatch(entry, "there is no such sample at its offset") from error
        if found != (entry["source"], entry["line"]):
            raise self._mismatch(entry, f"line {found[1]} of {found[0]} lies at its offset")
        return record

    def _decoded(self, entry: dict[str, Any], pictures: list[bytes]) -> list[Image.Image]:
        images = []
        for n, data in enumerate(pictures):
            try:
                image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
                image.load()
            except Exception as error:  # sharded with verify=header, it was never decoded before
                raise self._mismatch(entry, f"picture {n} does not decode ({error})") from error
            images.append(image)
        return images

    def _members(self, entry: dict[str, Any]) -> tuple[bytes, list[bytes]]:
        """KEY.json and the pictures' bytes as they were when the shard was written, in one read. Read anew
        from a reopened file where the digest of a picture differs, since a network file system may give a
        wrong page once.
        """
        start, total = _span(entry)
        places = [
            (offset - start, offset - start + num_bytes)
            for offset, num_bytes in zip(entry["image_offsets"], entry["image_bytes"], strict=True)
        ]
        for attempt in range(1, _READ_ATTEMPTS + 1):
            data = self._bytes(entry, start, total)
            pictures = [data[first:end] for first, end in places]
            digests = [hashlib.sha256(picture).digest() for picture in pictures]
            if digests == entry["image_sha256"]:
                return data[: entry["json_bytes"]], pictures
            wrong = next(n for n, digest in enumerate(digests) if digest != entry["image_sha256"][n])
            if attempt < _READ_ATTEMPTS:
                logger.warning("%s: picture %d has a wrong digest, reading it again", entry["key"], wrong)
                time.sleep(_RETRY_WAIT_S * attempt)
                with self._lock:
                    self._shards.pop(entry["shard"], None)
        raise self._mismatch(
            entry, f"picture {wrong} has other bytes than when it was written ({_READ_ATTEMPTS} reads)"
        )

    def _bytes(self, entry: dict[str, Any], offset: int, num_bytes: int) -> bytes:
        shard = self._shard(entry)
        data = os.pread(shard.descriptor, num_bytes, offset)
        if len(data) != num_bytes:
            raise self._mismatch(entry, f"it ends {num_bytes - len(data)} bytes before the sample does")
        return data

    def _shard(self, entry: dict[str, Any]) -> OpenFile:
        """The open shard of an entry; one that is dropped here is closed when its last reader is done with
        it.
        """
        number = entry["shard"]
        with self._lock:
            if number in self._shards:
                self._shards.move_to_end(number)
                return self._shards[number]
        shard = self._opened(entry)  # other threads go on while a remote one is fetched
        with self._lock:
            self._shards[number] = shard
            self._shards.move_to_end(number)
            if len(self._shards) > self._num_open:
                self._shards.popitem(last=False)
            return shard

    def _opened(self, entry: dict[str, Any]) -> OpenFile:
        name = shard_name(entry["shard"])
        try:
            return OpenFile(self.folder / name) if self._cache is None else self._cache.opened(name)
        except FileNotFoundError as error:
            raise self._mismatch(entry, "the file is missing") from error
        except WrongBytes as error:
            raise self._mismatch(entry, str(error)) from error

    def _mismatch(self, entry: dict[str, Any], what: str) -> ShardMismatch:
        path = joined(self.folder, shard_name(entry["shard"]))
        remedy = "run again with --force shard" if self._cache is None else "copy the shard there again"
        return ShardMismatch(f"{path} does not match its index at {entry['key']}: {what}; {remedy}")


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    """(offset, bytes) of a sample in its shard: its members lie side by side, the record first."""
    start = entry["json_offset"]
    if not entry["image_bytes"]:
        return start, entry["json_bytes"]
    return start, entry["image_offsets"][-1] + entry["image_bytes"][-1] - start


def _no_tiles(tiling: Tiling) -> np.ndarray:
    return np.zeros((0, 3, tiling.tile_size, tiling.tile_size), np.float32)
