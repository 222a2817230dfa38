"""The rates that a router chose, mixed with random ones: a function of the sample alone."""

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.packs.rates import RateDraw, tile_rates
from data_prep.packs.routed import RoutedTiles
from data_prep.shards.index import IndexColumns
from vico.errors import UserError

THRESHOLD = 0.6


def samples(num_samples: int = 40, num_shards: int = 3) -> IndexColumns:
    """Return samples of 0 to 3 pictures with 1 to 4 tiles; their rows have gaps."""
    random = np.random.default_rng(0)
    tiles = [random.integers(1, 5, random.integers(0, 4)).tolist() for _ in range(num_samples)]
    return IndexColumns(
        rows=np.arange(num_samples) * 2 + 5,
        shard=np.sort(random.integers(0, num_shards, num_samples)).astype(np.int32),
        text_tokens=np.ones(num_samples, np.int32),
        num_tiles=np.array([sum(counts) for counts in tiles], np.int32),
        repeat=np.ones(num_samples, np.float32),
        image_starts=np.cumsum([0, *map(len, tiles)]).astype(np.int64),
        image_tiles=np.array(list(chain(*tiles)), np.int32),
    )


def write_files(columns: IndexColumns, folder: Path) -> np.ndarray:
    """Write the files of a rates stage; return P(compress) of all tiles, in index order."""
    p_compress = np.random.default_rng(1).random(int(columns.num_tiles.sum())).astype(np.float32)
    row_of_tile = np.repeat(columns.rows, columns.num_tiles)
    shard_of_tile = np.repeat(columns.shard, columns.num_tiles)
    folder.mkdir(exist_ok=True)
    for shard in np.unique(shard_of_tile):
        here = shard_of_tile == shard
        table = pa.table({"row": row_of_tile[here], "p_compress": p_compress[here]})
        pq.write_table(table, folder / f"{shard:05d}.parquet")
    return p_compress


def rates(columns: IndexColumns, draw: RateDraw, epoch: int = 0) -> np.ndarray:
    return tile_rates(draw, columns, np.zeros(len(columns), np.int64), seed=3, epoch=epoch)[0]


def test_without_random_tiles_the_rates_are_the_routers_in_every_epoch(tmp_path):
    columns = samples()
    p_compress = write_files(columns, tmp_path)
    draw = RateDraw("tile", 0.5, RoutedTiles(tmp_path, THRESHOLD), random_share=0.0)
    for epoch in (0, 1):
        np.testing.assert_array_equal(rates(columns, draw, epoch), p_compress >= np.float32(THRESHOLD))


def test_a_tile_at_the_threshold_is_compressed(tmp_path):
    columns = samples()
    p_compress = write_files(columns, tmp_path)
    threshold = float(p_compress[7])
    draw = RateDraw("tile", 0.5, RoutedTiles(tmp_path, threshold), random_share=0.0)
    assert rates(columns, draw)[7]


@pytest.mark.parametrize("unit", ["tile", "image"])
def test_random_tiles_have_the_rates_of_a_training_without_a_router(tmp_path, unit):
    columns = samples(num_samples=600)
    routed = write_files(columns, tmp_path) >= np.float32(THRESHOLD)
    drawn = rates(columns, RateDraw(unit, 0.3))
    files = RoutedTiles(tmp_path, THRESHOLD)
    np.testing.assert_array_equal(rates(columns, RateDraw(unit, 0.3, files, random_share=1.0)), drawn)
    mixed = rates(columns, RateDraw(unit, 0.3, files, random_share=0.25))
    differ = routed != drawn
    assert np.mean(mixed[differ] == drawn[differ]) == pytest.approx(0.25, abs=0.05)
    assert (mixed[~differ] == drawn[~differ]).all()
    assert (rates(columns, RateDraw(unit, 0.3, files, random_share=0.25), epoch=1) != mixed).any()


def test_the_rates_of_a_sample_do_not_depend_on_the_samples_beside_it(tmp_path):
    columns = samples()
    write_files(columns, tmp_path)
    draw = RateDraw("tile", 0.5, RoutedTiles(tmp_path, THRESHOLD), random_share=0.5)
    together = np.split(rates(columns, draw), np.cumsum(columns.num_tiles)[:-1])
    order = np.random.default_rng(2).permutation(len(columns))
    for some in (order, order[:7], order[-1:]):
        apart = np.split(rates(columns.at(some), draw), np.cumsum(columns.num_tiles[some])[:-1])
        for position, sample in enumerate(some):
            np.testing.assert_array_equal(apart[position], together[sample])


def test_rates_of_other_shards_are_refused(tmp_path):
    columns = samples()
    write_files(columns, tmp_path)
    files = RoutedTiles(tmp_path, THRESHOLD)
    more = columns.at(np.arange(len(columns)))
    more.num_tiles[columns.num_tiles.argmax()] += 1
    with pytest.raises(UserError, match=r"has 10 of the 11 tiles of row \d+; .*inputs.adopt.joint_rates"):
        files.compressed(more)
    (tmp_path / f"{columns.shard[-1]:05d}.parquet").unlink()
    with pytest.raises(UserError, match="has 0 of the"):
        RoutedTiles(tmp_path, THRESHOLD).compressed(columns)
