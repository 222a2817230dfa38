"""The actor of the ratio stage: losses of samples at the full rate and with each tile compressed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.draws import chosen_rows
from data_prep.shards.index import load_index
from stages.inference import InferenceSettings, load_models, open_reader
from stages.outputs import part_name
from stages.parts import Parts
from stages.ratio.config import RatioConfig, Unit
from vico.inference.branches import RatedSample
from vico.inference.tile_losses import encoded_pair, rate_losses
from vico.objectives.labels import loss_ratio
from vico.packing import EncodedSample

# T tiles of a sample
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
MEDIAN_COLUMNS = ("loss_full", "loss_compressed", "ratio")


class TileRow(TypedDict):
    """One row of `ratios.parquet`, in the order of SCHEMA."""

    key: str
    split: str
    image: int
    tile: int
    num_tiles: int
    num_answer_tokens: int
    loss_full: float
    loss_compressed: float
    ratio: float
    kind: str


@dataclass(frozen=True)
class ShardRows:
    """The chosen rows of one shard."""

    shard: int
    rows: tuple[int, ...]


def shards_of(config: RatioConfig, shard_folder: Path) -> list[ShardRows]:
    """Return the chosen rows by shard: samples of the config's splits with a tile and an answer token."""
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
    return [
        ShardRows(number, tuple(np.sort(row[positions]).tolist()))
        for number, positions in positions_by_value(shard)
    ]


def positions_by_value(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each distinct value, rising, with its positions, rising. One sort serves all values."""
    order = np.argsort(values, kind="stable")
    distinct, first = np.unique(values[order], return_index=True)
    return zip(distinct.tolist(), np.split(order, first)[1:], strict=True)


class RatioActor:
    """A policy and its reference; `write_part` computes the losses of one shard."""

    def __init__(self, settings: InferenceSettings, unit: Unit, parts: Parts):
        self.settings, self.unit, self.parts = settings, unit, parts
        self.reader = open_reader(settings)
        self.policy, self.reference = load_models(settings, self.reader)

    def write_part(self, shard: ShardRows) -> int:
        """Publish the losses of the shard's rows and return the number of tiles."""
        name = part_name(shard.shard)
        if self.parts.done(name):  # a worker died between publishing and returning
            return pq.read_metadata(self.parts.output / name).num_rows
        rows = [row for samples in self._batches(shard.rows) for row in self._tile_rows(samples)]
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), self.parts.partial(name))
        self.parts.publish(name)
        return len(rows)

    def _batches(self, rows: Sequence[int]) -> Iterator[list[EncodedSample]]:
        """Yield the samples in groups that fill the vision tower once."""
        batch: list[EncodedSample] = []
        for row in rows:
            batch.append(self.reader.sample(row))
            if sum(len(sample.pixels) for sample in batch) >= self.settings.batch_tiles:
                yield batch
                batch = []
        if batch:
            yield batch

    def _tile_rows(self, samples: Sequence[EncodedSample]) -> Iterator[TileRow]:
        pixels = np.concatenate([sample.pixels for sample in samples])
        first_tiles = np.cumsum([0, *(len(sample.pixels) for sample in samples)]).tolist()
        losses = rate_losses(
            *encoded_pair(self.policy, self.reference, pixels, self.settings.batch_tiles),
            [
                RatedSample(sample.skeleton, first, rate_vectors(sample.tiles_per_image, self.unit))
                for sample, first in zip(samples, first_tiles, strict=False)
            ],
            row_tokens=self.settings.row_tokens,
            kl_chunk_rows=self.settings.kl_chunk_rows,
        )
        for sample, sample_losses in zip(samples, losses, strict=True):
            yield from tile_rows(sample, self.reader.index.row(sample.row), sample_losses, self.unit)


def rate_vectors(tiles_per_image: Sequence[int], unit: Unit) -> list[np.ndarray]:
    """Return the rate vectors of a sample, bool [T] each: first all tiles at the full rate.

    Then follows one vector per tile with only that tile compressed, or with unit image one vector per image
    with all of its tiles compressed.
    """
    image_of_tile = np.repeat(np.arange(len(tiles_per_image)), tiles_per_image)
    compressed = np.eye(len(image_of_tile), dtype=bool)
    if unit == "image":
        compressed = image_of_tile == np.arange(len(tiles_per_image))[:, None]
    return [np.zeros(len(image_of_tile), bool), *compressed]


def tile_rows(
    sample: EncodedSample, indexed: Mapping[str, Any], losses: np.ndarray, unit: Unit
) -> Iterator[TileRow]:
    """Yield the rows of a sample's tiles; `losses` are those of its `rate_vectors`, `indexed` its index row.

    With unit image all tiles of an image have its loss.
    """
    loss_full, *compressed = losses.tolist()
    number = 0
    for image, num_tiles in enumerate(sample.tiles_per_image):
        for tile in range(num_tiles):
            loss_compressed = compressed[image if unit == "image" else number]
            number += 1
            yield {
                "key": sample.key,
                "split": indexed["split"],
                "image": image,
                "tile": tile,
                "num_tiles": num_tiles,
                "num_answer_tokens": sample.skeleton.num_answer_tokens,
                "loss_full": loss_full,
                "loss_compressed": loss_compressed,
                "ratio": float(loss_ratio(loss_compressed, loss_full)),
                "kind": indexed["kind"],
            }


def medians(ratios: pa.Table) -> dict[str, Any]:
    """Return the number of tiles and the medians of losses and ratio, over all tiles and by kind."""
    columns = {name: ratios[name].to_numpy() for name in MEDIAN_COLUMNS}

    def medians_of(positions: np.ndarray) -> dict[str, float]:
        values = {
            name: float(np.median(column[positions])) for name, column in columns.items() if len(positions)
        }
        return {"tiles": len(positions), **values}

    kinds = ratios["kind"].dictionary_encode().combine_chunks()
    names = kinds.dictionary.to_pylist()
    positions_by_kind = positions_by_value(kinds.indices.to_numpy())
    by_kind = {names[code]: medians_of(positions) for code, positions in positions_by_kind}
    return {"all": medians_of(np.arange(len(ratios))), "by_kind": dict(sorted(by_kind.items()))}
