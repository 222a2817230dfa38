"""The split depends on groups and pictures, not on files or order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.sets import record_sets
from data_prep.shards.split import SPLITS, Shares, side, split_of
from data_prep.shards.write import write_shard
from stages.shard.config import ShardConfig
from stages.shard.tasks import shard_settings
from tests.record_files import write_good_records

shares = st.tuples(st.floats(0, 0.5), st.floats(0, 0.49), st.integers(0, 3)).map(lambda s: Shares(*s))
digests = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4)


@given(shares, st.text(min_size=1), st.lists(digests, min_size=1, max_size=5))
def test_a_group_is_in_one_split_whatever_its_pictures(shares, group, rows):
    splits = {split_of(shares, key=str(n), group=group, pictures=row) for n, row in enumerate(rows)}
    assert len(splits) == 1 and splits <= set(SPLITS)


@given(shares, digests)
def test_the_smallest_picture_decides_whatever_the_order(shares, pictures):
    splits = {split_of(shares, key="k", group="", pictures=order) for order in (pictures, pictures[::-1])}
    assert splits == {side(shares, "picture", min(pictures))}
    assert split_of(shares, key="other", group="", pictures=[pictures[0]] * 2) == side(
        shares, "picture", pictures[0]
    )


def test_shares_are_met_and_the_key_decides_for_text_rows():
    shares = Shares(calib=0.2, test=0.1)
    sides = [split_of(shares, key=f"a-{n:08d}", group="", pictures=[]) for n in range(20_000)]
    assert sides.count("calib") / 20_000 == pytest.approx(0.2, abs=0.01)
    assert sides.count("test") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert {split_of(Shares(0, 0), key=str(n), group="", pictures=[]) for n in range(100)} == {"train"}


def test_a_larger_share_only_adds_groups():
    """A larger share never moves a group out of the split, so a test set can grow without leaking."""
    groups = [str(n).encode() for n in range(2000)]
    small, large = Shares(0.1, 0.1), Shares(0.1, 0.2)
    test = {g for g in groups if side(small, "group", g) == "test"}
    assert test < {g for g in groups if side(large, "group", g) == "test"}


def test_pinned_splits():
    """These must never change: written shards and the shipped model's training set depend on them."""
    shares = Shares(0.1, 0.1)
    assert [side(shares, "group", f"demo-{n:02d}".encode()) for n in range(12)] == PINNED
    other_seed = [side(Shares(0.1, 0.1, seed=1), "group", f"demo-{n:02d}".encode()) for n in range(12)]
    assert other_seed != PINNED


def test_another_split_seed_changes_the_split_and_nothing_else(tmp_path, prompt_format):
    """The same tar and index, except for the column `split`."""
    meta = write_good_records(tmp_path / "records", 60)
    (block,) = record_blocks(record_sets(RecordsConfig(format="internvl", path=meta)), 1000)
    tables = []
    for seed in (0, 1):
        settings = shard_settings(ShardConfig(split_seed=seed), block.record_set, heldout=False)
        content = write_shard(tmp_path / f"{seed}.tar", block, settings, prompt_format)
        assert content.quarantine == []
        tables.append(content.table)
    assert (tmp_path / "0.tar").read_bytes() == (tmp_path / "1.tar").read_bytes()
    assert tables[0]["split"] != tables[1]["split"]
    assert tables[0].drop_columns("split") == tables[1].drop_columns("split")


PINNED = [
    "train",
    "train",
    "train",
    "train",
    "test",
    "train",
    "calib",
    "train",
    "train",
    "train",
    "train",
    "train",
]
