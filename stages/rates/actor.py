"""The actor of the rates stage: the router's probability to compress each tile of the train samples."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from data_prep.shards.index import load_index
from stages.finite import check_finite
from stages.inference import InferenceSettings, load_policy, load_router, open_reader
from stages.outputs import part_name
from stages.parts import Parts

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("image", pa.int32()),
        ("tile", pa.int32()),
        ("p_compress", pa.float32()),
    ]
)


@dataclass(frozen=True)
class TrainShard:
    """The train samples of one shard that have tiles, by their rows in the index, rising."""

    shard: int
    rows: tuple[int, ...]


def train_shards(shard_folder: Path) -> list[TrainShard]:
    """Return the train samples with tiles by shard, also those without an answer: a training packs them."""
    table = load_index(shard_folder).table(["shard", "num_tiles"], "train")
    table = table.filter(pc.greater(table["num_tiles"], 0))
    row, shard = table["row"].to_numpy(), table["shard"].to_numpy()
    return [
        TrainShard(number, tuple(np.sort(row[shard == number]).tolist()))
        for number in np.unique(shard).tolist()
    ]


class RatesActor:
    """The first policy's vision tower with the router; `write_part` routes the tiles of one shard."""

    def __init__(self, settings: InferenceSettings, router_file: Path, parts: Parts):
        self.settings, self.parts = settings, parts
        self.reader = open_reader(settings)
        self.policy = load_policy(settings)
        self.router = load_router(self.policy, router_file).eval()

    def write_part(self, shard: TrainShard) -> int:
        """Publish the probabilities of the shard's tiles and return their number."""
        name = part_name(shard.shard)
        if not self.parts.done(name):  # it is done if a worker died between publishing and returning
            rows = [row for number in shard.rows for row in self._tile_rows(number)]
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), self.parts.partial(name))
            self.parts.publish(name)
        return pq.read_metadata(self.parts.output / name).num_rows

    def _tile_rows(self, row: int) -> Iterator[Mapping[str, Any]]:
        """Yield the tiles of one sample. They are computed apart from other samples, so that a rate depends
        on its picture alone."""
        sample = self.reader.sample(row)
        p_compress = self._p_compress(sample.pixels)
        check_finite(
            sample.key, p_compress, "probabilities to compress", self.settings.dtype, "joint.rates.dtype"
        )
        tiles = ((image, tile) for image, count in enumerate(sample.tiles_per_image) for tile in range(count))
        for (image, tile), probability in zip(tiles, p_compress.tolist(), strict=True):
            yield {"row": row, "key": sample.key, "image": image, "tile": tile, "p_compress": probability}

    @torch.no_grad()
    def _p_compress(self, pixels_N3SS: np.ndarray) -> np.ndarray:
        """Return P(compress) of the tiles, float32 [N]."""
        batches = torch.from_numpy(pixels_N3SS).to(self.settings.device).split(self.settings.batch_tiles)
        features = (self.policy.vision_features(batch) for batch in batches)
        return torch.cat([self.router.compress_probability(batch) for batch in features]).cpu().numpy()
