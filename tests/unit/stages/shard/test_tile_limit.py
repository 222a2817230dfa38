"""The note on settings that ask for more tiles than the model cuts a picture into."""

from pathlib import Path

import pytest

from data_prep.records.config import RecordsConfig
from data_prep.records.sets import RecordSet
from stages.shard.config import ShardConfig
from stages.shard.tile_limit import tile_limit_notes

SMALL = Path(__file__).parents[4] / "models" / "small-internvl"


@pytest.mark.parametrize(
    "shard, of_set, names",
    [
        ({}, None, []),  # nobody asked for the default
        ({"max_tiles": 6}, None, ["shard.max_tiles=6"]),
        ({"max_tiles": 4}, None, []),
        ({}, 9, ["max_dynamic_patch=9 of set mine"]),
        ({"max_tiles": 6}, 9, ["max_dynamic_patch=9 of set mine"]),  # the set's own holds
    ],
)
def test_only_what_the_user_set_is_named(shard, of_set, names):
    rows = RecordSet("mine", "mine", RecordsConfig(format="demo"), max_tiles=of_set)
    notes = tile_limit_notes(ShardConfig(**shard), [rows], SMALL)
    tail = " has no full effect: the model cuts a picture into 4 tiles at most"
    assert notes == [name + tail for name in names]
