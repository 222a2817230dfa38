"""Reading of samples from the shards by byte offset, ready to pack; every stage that runs the model uses it.

What is read is compared with the index, so a swapped or damaged shard stops the run with its name. webdataset
reads a tar from its start only; `benchmarks/loading.py` (`loading_vs_webdataset`) compares the two.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.remote_files import as_location
from data_prep.shards.index import ShardIndex, load_index
from data_prep.shards.open_shards import OpenShards
from vico.packing import EncodedSample, EncodedText
from vico.picture_files import open_picture
from vico.prompt import PromptFormat, Skeleton
from vico.tiling import Tiling, tile_pixels

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
_SPAN_COLUMNS = ("key", "shard", "json_offset", "json_bytes", "image_offsets", "image_bytes")
_READ_ATTEMPTS = 3
_RETRY_WAIT_S = 0.2
logger = logging.getLogger(__name__)


class SampleReader:
    """Reads the samples of a shard folder; `row` is a row number of its index.

    Safe to use from several threads. With `threads` above 1, `samples` decodes in that many threads.
    """

    def __init__(
        self,
        shard_folder: Path | str,
        prompt_format: PromptFormat,
        index: ShardIndex | None = None,
        threads: int = 1,
    ) -> None:
        self.folder, self.prompt_format = as_location(str(shard_folder)), prompt_format
        self._shards = OpenShards(self.folder)
        self.index = load_index(self.folder) if index is None else index
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None

    def record(self, row: int) -> dict[str, Any]:
        """Return KEY.json of a sample."""
        index_row = self.index.row(row)
        text = self._shards.read(index_row, index_row["json_offset"], index_row["json_bytes"])
        return self._parsed(index_row, text)

    def pictures(self, row: int) -> list[Image.Image]:
        """Return the sample's pictures in order, decoded."""
        index_row = self.index.row(row)
        return self._decoded(index_row, self._members(index_row)[1])

    def sample(self, row: int) -> EncodedSample:
        """Return the sample with its tiles, uint8 [T, 3, S, S] (T = 0 for text only), and its skeleton.

        Raises ShardMismatch when shard, index and model disagree about its pictures, tiles or tokens.
        """
        index_row = self.index.row(row, _READ_COLUMNS)
        text, pictures = self._members(index_row)
        if index_row["max_tiles"] < 1:
            raise self._shards.mismatch(index_row, f"the index has max_tiles={index_row['max_tiles']}")
        tiling = self.prompt_format.settings.tiling(index_row["max_tiles"])
        tiles = [tile_pixels(image, tiling) for image in self._decoded(index_row, pictures)]
        tiles_per_image = tuple(len(image_tiles) for image_tiles in tiles)
        if list(tiles_per_image) != index_row["tiles"]:
            raise self._shards.mismatch(
                index_row, f"pictures give {list(tiles_per_image)} tiles, the index has {index_row['tiles']}"
            )
        skeleton = self._checked_skeleton(index_row, text, tiles_per_image)
        return EncodedSample(index_row["key"], row, skeleton, _pixels(tiles, tiling), tiles_per_image)

    def text(self, row: int) -> EncodedText:
        """Return the sample without its pictures, which are not read.

        Raises ShardMismatch when shard, index and model disagree about its tokens.
        """
        index_row = self.index.row(row, _READ_COLUMNS)
        text = self._shards.read(index_row, index_row["json_offset"], index_row["json_bytes"])
        skeleton = self._checked_skeleton(index_row, text, tuple(index_row["tiles"]))
        return EncodedText(index_row["key"], row, skeleton)

    def retiled(self, row: int, max_tiles: int) -> EncodedSample:
        """Return the sample with its pictures cut into at most `max_tiles` tiles each, or its own limit."""
        index_row = self.index.row(row, _READ_COLUMNS)
        text, pictures = self._members(index_row)
        tiling = self.prompt_format.settings.tiling(min(max_tiles, index_row["max_tiles"]))
        tiles = [tile_pixels(image, tiling) for image in self._decoded(index_row, pictures)]
        counts = tuple(len(image_tiles) for image_tiles in tiles)
        skeleton = self._skeleton(index_row, text, counts)
        return EncodedSample(index_row["key"], row, skeleton, _pixels(tiles, tiling), counts)

    def samples(self, rows: Iterable[int]) -> list[EncodedSample]:
        """Return `sample` of each row, in order.

        The threads work in parallel: reading, decoding and scaling release Python's lock.
        """
        rows = list(rows)
        self.announce(rows)
        return list(map(self.sample, rows) if self._pool is None else self._pool.map(self.sample, rows))

    def announce(self, rows: Iterable[int]) -> None:
        """Ask the operating system to load what these rows will read, so that reads do not wait for the disk.

        Does nothing for remote shards, whose files are downloaded as a whole.
        """
        if not self._shards.is_local:
            return
        for row in rows:
            index_row = self.index.row(row, _SPAN_COLUMNS)
            start, num_bytes = self._span(index_row)
            shard = self._shards.file(index_row)
            os.posix_fadvise(shard.descriptor, start, num_bytes, os.POSIX_FADV_WILLNEED)

    def _parsed(self, index_row: dict[str, Any], text: bytes) -> dict[str, Any]:
        try:
            record = json.loads(text)
            source, line = record["source"], record["line"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._shards.mismatch(index_row, "its offset does not hold a sample") from error
        if (source, line) != (index_row["source"], index_row["line"]):
            raise self._shards.mismatch(index_row, f'its offset holds "line": {line} of {source}')
        if not _has_turns(record):
            raise self._shards.mismatch(index_row, "its conversations are not a list of from and value")
        return record

    def _checked_skeleton(self, index_row: dict[str, Any], text: bytes, tiles: tuple[int, ...]) -> Skeleton:
        """Return the skeleton; raise ShardMismatch unless it has as many tokens as the index says."""
        skeleton = self._skeleton(index_row, text, tiles)
        if skeleton.num_text_tokens != index_row["text_tokens"]:
            raise self._shards.mismatch(
                index_row,
                f"the text gives {skeleton.num_text_tokens} tokens, the index has {index_row['text_tokens']}",
            )
        return skeleton

    def _skeleton(self, index_row: dict[str, Any], text: bytes, tiles: tuple[int, ...]) -> Skeleton:
        try:
            return self.prompt_format.encode(self._parsed(index_row, text)["conversations"], tiles)
        except ValueError as error:  # shards of a version that wrote other rows
            raise self._shards.mismatch(index_row, str(error)) from error

    def _decoded(self, index_row: dict[str, Any], pictures: list[bytes]) -> list[Image.Image]:
        images: list[Image.Image] = []
        for n, data in enumerate(pictures):
            try:
                image = open_picture(data)
                image.load()
            except Exception as error:  # with verify=header the shard stage never decoded it
                raise self._shards.mismatch(index_row, f"picture {n} does not decode ({error})") from error
            images.append(image)
        return images

    def _members(self, index_row: dict[str, Any]) -> tuple[bytes, list[bytes]]:
        """Return KEY.json and the pictures' bytes as they were when the shard was written, in one read.

        When the digest of a picture differs, the file is opened and read again: a network file system may
        return a wrong page once.
        """
        start, total = self._span(index_row)
        if len(index_row["image_sha256"]) != len(index_row["image_bytes"]):
            raise self._shards.mismatch(index_row, "the index has pictures without a digest")
        spans = [
            (offset - start, offset - start + num_bytes)
            for offset, num_bytes in zip(index_row["image_offsets"], index_row["image_bytes"], strict=True)
        ]
        for attempt in range(1, _READ_ATTEMPTS + 1):
            data = self._shards.read(index_row, start, total)
            pictures = [data[first:end] for first, end in spans]
            digests = [hashlib.sha256(picture).digest() for picture in pictures]
            if digests == index_row["image_sha256"]:
                return data[: index_row["json_bytes"]], pictures
            wrong = next(n for n, digest in enumerate(digests) if digest != index_row["image_sha256"][n])
            if attempt < _READ_ATTEMPTS:
                logger.warning("%s: picture %d has a wrong digest, reading it again", index_row["key"], wrong)
                time.sleep(_RETRY_WAIT_S * attempt)
                self._shards.drop(index_row["shard"])
        raise self._shards.mismatch(
            index_row, f"picture {wrong} differs from the one that was written ({_READ_ATTEMPTS} reads)"
        )

    def _span(self, index_row: dict[str, Any]) -> tuple[int, int]:
        """Return (offset, bytes) of a sample in its shard: its members follow each other, the record first.

        Raises ShardMismatch when the index contradicts itself.
        """
        start, offsets, sizes = index_row["json_offset"], index_row["image_offsets"], index_row["image_bytes"]
        if len(offsets) != len(sizes):
            raise self._shards.mismatch(index_row, "the index has pictures without a place")
        return start, index_row["json_bytes"] if not sizes else offsets[-1] + sizes[-1] - start


def _has_turns(record: dict[str, Any]) -> bool:
    """Return whether a record has the turns that the shard stage writes."""
    turns = record.get("conversations")
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in turns
    )


def _pixels(tiles: list[np.ndarray], tiling: Tiling) -> np.ndarray:
    """Return the tiles of all pictures, uint8 [T, 3, S, S]."""
    return np.concatenate(tiles) if len(tiles) > 1 else tiles[0] if tiles else _no_tiles(tiling)


def _no_tiles(tiling: Tiling) -> np.ndarray:
    return np.zeros((0, 3, tiling.tile_size, tiling.tile_size), np.uint8)
