"""The actor of the ratio stage: losses of samples at the full rate and with each tile compressed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.finite import check_finite
from stages.inference import InferenceSettings, load_models, open_reader
from stages.outputs import part_name
from stages.parts import Parts
from stages.ratio.config import RatioConfig
from stages.ratio.isolation import rate_vectors, tile_losses
from stages.ratio.samples import ShardRows, positions_by_value
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


class RatioActor:
    """A policy and its reference; `write_part` computes the losses of one shard."""

    def __init__(self, settings: InferenceSettings, config: RatioConfig, parts: Parts):
        self.settings, self.config, self.parts = settings, config, parts
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
        """Yield the samples in groups of at most `batch_tiles` tiles; a larger sample is a group of its own.

        Groups depend on the shard's rows alone, so that losses are the same whichever actor computes them.
        """
        batch: list[EncodedSample] = []
        num_tiles = 0
        for row in rows:
            sample = self.reader.sample(row)
            if batch and num_tiles + len(sample.pixels) > self.settings.batch_tiles:
                yield batch
                batch, num_tiles = [], 0
            batch.append(sample)
            num_tiles += len(sample.pixels)
        if batch:
            yield batch

    def _tile_rows(self, samples: Sequence[EncodedSample]) -> Iterator[TileRow]:
        pixels = np.concatenate([sample.pixels for sample in samples])
        first_tiles = np.cumsum([0, *(len(sample.pixels) for sample in samples)]).tolist()
        rates = [rate_vectors(sample.tiles_per_image, sample.key, self.config) for sample in samples]
        losses = rate_losses(
            *encoded_pair(self.policy, self.reference, pixels, self.settings.batch_tiles),
            [
                RatedSample(sample.skeleton, first, vectors)
                for sample, first, vectors in zip(samples, first_tiles, rates, strict=False)
            ],
            row_tokens=self.settings.row_tokens,
            kl_chunk_rows=self.settings.kl_chunk_rows,
        )
        for sample, vectors, sample_losses in zip(samples, rates, losses, strict=True):
            check_finite(sample.key, sample_losses, "losses", self.settings.dtype, "ratio.dtype")
            both = tile_losses(sample.tiles_per_image, vectors, sample_losses, self.config)
            yield from tile_rows(sample, self.reader.index.row(sample.row), *both)


def tile_rows(
    sample: EncodedSample, indexed: Mapping[str, Any], losses_full: np.ndarray, losses_compressed: np.ndarray
) -> Iterator[TileRow]:
    """Yield the rows of a sample's tiles; the losses are float64 [T], `indexed` its index row."""
    tiles = ((image, tile) for image, count in enumerate(sample.tiles_per_image) for tile in range(count))
    values = zip(losses_full.tolist(), losses_compressed.tolist(), strict=True)
    for (image, tile), (loss_full, loss_compressed) in zip(tiles, values, strict=True):
        yield {
            "key": sample.key,
            "split": indexed["split"],
            "image": image,
            "tile": tile,
            "num_tiles": sample.tiles_per_image[image],
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
