"""What an actor of the ratio stage does: losses of a shard's samples at the full rate and with each tile
compressed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.draws import chosen_rows
from data_prep.shards.index import load_index
from stages.inference import InferenceSettings, opened_models, opened_reader
from stages.parts import Parts
from stages.ratio.config import RatioConfig
from vico.inference.tile_losses import RatedSample, encoded_tiles, rate_losses
from vico.objectives.labels import loss_ratio
from vico.packing import EncodedSample

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("image", pa.int32()),
        ("tile", pa.int32()),
        ("num_tiles", pa.int32()),
        ("num_answer_tokens", pa.int32()),
        ("loss_full", pa.float64()),
        ("loss_compressed", pa.float64()),
        ("ratio", pa.float64()),
        ("kind", pa.string()),
    ]
)


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard that are looked at."""

    shard: int
    rows: tuple[int, ...]


def part_name(shard: int) -> str:
    return f"parts/{shard:05d}.parquet"


def shards_of(config: RatioConfig, shard_folder: Path) -> list[ShardRows]:
    """The chosen rows shard by shard: those of the config's splits with a tile and an answer token."""
    index = load_index(shard_folder)
    rows, shards = [], []
    for split in config.splits:
        table = index.table(["shard", "num_tiles", "answer_tokens"], split)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        usable = (columns["num_tiles"] > 0) & (columns["answer_tokens"] > 0)
        chosen = chosen_rows(columns["row"][usable], config.max_samples, config.seed)
        rows.append(chosen)
        shards.append(columns["shard"][np.searchsorted(columns["row"], chosen)])
    row, shard = np.concatenate(rows), np.concatenate(shards)
    return [ShardRows(n, tuple(np.sort(row[places]).tolist())) for n, places in _places(shard)]


def _places(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(value, where it stands, rising) of each distinct value, rising; one sort, and no pass for each."""
    order = np.argsort(values, kind="stable")
    found, first = np.unique(values[order], return_index=True)
    return zip(found.tolist(), np.split(order, first)[1:], strict=True)


class RatioActor:
    """A policy and its reference; `write_part` does one shard."""

    def __init__(self, settings: InferenceSettings, unit: str, parts: Parts):
        self.settings, self.unit, self.parts = settings, unit, parts
        self.reader = opened_reader(settings)
        self.policy, self.reference = opened_models(settings, self.reader)

    def write_part(self, item: ShardRows) -> int:
        """Publishes the losses of the shard's rows; the number of tiles."""
        name = part_name(item.shard)
        if self.parts.done(name):  # the worker that wrote it died before it could say so
            return pq.read_metadata(self.parts.output / name).num_rows
        rows = [entry for group in self._groups(item.rows) for entry in self._entries(group)]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), self.parts.partial(name))
        self.parts.publish(name)
        return len(rows)

    def _groups(self, rows: Sequence[int]) -> Iterator[list[EncodedSample]]:
        """The samples, as many at a time as fill the vision tower once."""
        group: list[EncodedSample] = []
        for row in rows:
            group.append(self.reader.sample(row))
            if sum(len(sample.pixels) for sample in group) >= self.settings.batch_tiles:
                yield group
                group = []
        if group:
            yield group

    def _entries(self, samples: list[EncodedSample]) -> Iterator[dict]:
        pixels = np.concatenate([sample.pixels for sample in samples])
        first_tiles = np.cumsum([0, *(len(sample.pixels) for sample in samples)])
        losses = rate_losses(
            encoded_tiles(self.policy, pixels, self.settings.batch_tiles),
            encoded_tiles(self.reference, pixels, self.settings.batch_tiles),
            [
                RatedSample(sample.skeleton, int(first), rate_vectors(sample.tiles_per_image, self.unit))
                for sample, first in zip(samples, first_tiles, strict=False)
            ],
            row_tokens=self.settings.row_tokens,
            kl_chunk_rows=self.settings.kl_chunk_rows,
        )
        for sample, (loss_full, *compressed) in zip(samples, losses, strict=True):
            entry = self.reader.index.row(sample.row)
            yield from tile_entries(sample, entry, loss_full, compressed, self.unit)


def rate_vectors(tiles_per_image: Sequence[int], unit: str) -> list[np.ndarray]:
    """All tiles at the full rate first, then one vector a tile with only that tile compressed (unit image: a
    vector an image with all of its tiles compressed); bool [T] each.
    """
    image_of_tile = np.repeat(np.arange(len(tiles_per_image)), tiles_per_image)
    compressed = np.eye(len(image_of_tile), dtype=bool)
    if unit == "image":
        compressed = image_of_tile == np.arange(len(tiles_per_image))[:, None]
    return [np.zeros(len(image_of_tile), bool), *compressed]


def tile_entries(sample: EncodedSample, entry: dict, loss_full, compressed, unit: str) -> Iterator[dict]:
    """The rows of a sample's tiles; with unit image the tiles of an image share its loss."""
    number = 0
    for image, num_tiles in enumerate(sample.tiles_per_image):
        for tile in range(num_tiles):
            loss_compressed = compressed[image if unit == "image" else number]
            number += 1
            yield {
                "key": sample.key,
                "split": entry["split"],
                "image": image,
                "tile": tile,
                "num_tiles": num_tiles,
                "num_answer_tokens": sample.skeleton.num_answer_tokens,
                "loss_full": loss_full,
                "loss_compressed": loss_compressed,
                "ratio": float(loss_ratio(loss_compressed, loss_full)),
                "kind": entry["kind"],
            }


def medians(ratios: pa.Table) -> dict:
    """Medians of losses and ratio over all tiles and by kind of content, with the number of tiles."""
    columns = {name: ratios[name].to_numpy() for name in ("loss_full", "loss_compressed", "ratio")}

    def of(places: np.ndarray) -> dict[str, float]:
        found = {name: float(np.median(column[places])) for name, column in columns.items() if len(places)}
        return {"tiles": len(places), **found}

    kinds = ratios["kind"].dictionary_encode().combine_chunks()
    names = kinds.dictionary.to_pylist()
    by_kind = {names[code]: of(places) for code, places in _places(kinds.indices.to_numpy())}
    return {"all": of(np.arange(len(ratios))), "by_kind": dict(sorted(by_kind.items()))}
