"""Ranks share the packs of a step: at any world size, also one that changes in mid-epoch, a global step holds
the same samples, packs and rates, and every sample comes `repeat` times an epoch.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.training.loop import share_of_rank
from tests.unit.data_prep.packs.test_plan import columns, plan_of, random_columns, sample_lists


def as_values(pack):
    return (pack.number, pack.rows.tolist(), pack.copies.tolist(), [r.tolist() for r in pack.compressed])


def trained(plan, step: int, world_size: int) -> dict[int, tuple]:
    """{number in the step: pack} of all ranks of one step; each rank runs equally many micro-steps."""
    shares = [share_of_rank(plan.step(step), rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    found = [one for share in shares for one in share]
    numbers = [number for number, _ in found]
    assert len(set(numbers)) == len(numbers), "no pack is on two ranks"
    assert [pack is None for _, pack in found] == [n >= plan.packs_per_step for n in numbers]
    return {number: as_values(pack) for number, pack in found if pack is not None}


attempts = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    sample_lists,
    st.integers(4, 7),
    st.sampled_from(["tile", "image", "full"]),
    attempts,
    st.integers(0, 3),
    st.sampled_from([1.0, 2.0]),
)
def test_steps_are_the_same_at_every_world_size_and_across_changes(
    samples, packs_per_step, rate_unit, attempts, seed, repeat
):
    index = columns(samples, repeat)
    changed = {"packs_per_step": packs_per_step, "rate_unit": rate_unit, "seed": seed, "window_samples": 9}
    alone = plan_of(index, **changed)
    wanted = [dict(enumerate(map(as_values, alone.step(n)))) for n in range(alone.num_steps)]
    step, seen = 0, Counter()
    while step < alone.num_steps:
        for (
            world_size,
            num_steps,
        ) in attempts:  # an attempt: a new plan, other ranks, goes on where it stopped
            plan = plan_of(index, summary=alone.summary, **changed)
            for n in range(step, min(step + num_steps, plan.num_steps)):
                found = trained(plan, n, world_size)
                assert found == wanted[n]
                for _, rows, copies, _ in found.values():
                    seen.update(zip(rows, copies, strict=True))
            step = min(step + num_steps, plan.num_steps)
    assert seen == Counter({(row, copy): 1 for row in index.rows.tolist() for copy in range(int(repeat))})


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(0, 1000), st.integers(0, 1000))
def test_a_repeat_below_one_is_the_expected_share_stable_by_seed_and_epoch(share, seed, epoch):
    index = random_columns(400, repeat=share, shard_size=30)
    settings = {"seed": seed, "epoch": epoch, "window_samples": 100}

    def rows(**changed):
        plan = plan_of(index, **{**settings, **changed})
        found = [row for n in range(plan.num_packs) for row in plan.pack(n).rows.tolist()]
        assert len(set(found)) == len(found) == plan.num_entries
        return set(found)

    chosen = rows()
    wanted = len(index) * np.float32(share)
    assert abs(len(chosen) - wanted) < 5 * np.sqrt(wanted * (1 - share)) + 1  # five deviations
    assert rows() == chosen == rows(window_samples=90, packs_per_step=7)
    assert rows(epoch=epoch + 1) != chosen and rows(seed=seed + 1) != chosen


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_runs_as_many_micro_steps(world_size):
    plan = plan_of(random_columns(100), packs_per_step=4)
    for rank in range(world_size):
        assert len(share_of_rank(plan.step(0), rank, world_size)) == -(-4 // world_size)
