"""Ranks share the packs of a step: a global step has the same samples, packs and rates at any world size.

The world size may change within an epoch, and every sample still occurs `repeat` times per epoch.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packs.plan import PackPlan
from stages.training.step import share_of_rank
from tests.unit.data_prep.packs.test_plan import as_values, columns, plan_of, random_columns, sample_lists


def trained_packs(plan: PackPlan, step: int, world_size: int) -> dict[int, tuple]:
    """Return {number in the step: pack} over all ranks of one step; ranks run equally many micro-steps."""
    shares = [share_of_rank(plan.step(step), rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    micro_steps = [micro_step for share in shares for micro_step in share]
    numbers = [number for number, _ in micro_steps]
    assert len(set(numbers)) == len(numbers), "no pack is on two ranks"
    packs_per_step = plan.settings.packs_per_step
    assert [pack is None for _, pack in micro_steps] == [n >= packs_per_step for n in numbers]
    return {number: as_values(pack) for number, pack in micro_steps if pack is not None}


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
    expected = [dict(enumerate(map(as_values, alone.step(n)))) for n in range(alone.num_steps)]
    step, seen = 0, Counter()
    while step < alone.num_steps:
        # each attempt has a new plan and other ranks, and resumes where the last one stopped
        for world_size, num_steps in attempts:
            plan = plan_of(index, summary=alone.summary, **changed)
            for n in range(step, min(step + num_steps, plan.num_steps)):
                packs = trained_packs(plan, n, world_size)
                assert packs == expected[n]
                for _, rows, copies, _ in packs.values():
                    seen.update(zip(rows, copies, strict=True))
            step = min(step + num_steps, plan.num_steps)
    assert seen == Counter({(row, copy): 1 for row in index.rows.tolist() for copy in range(int(repeat))})


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(0, 1000), st.integers(0, 1000))
def test_a_repeat_below_one_is_the_expected_share_stable_by_seed_and_epoch(share, seed, epoch):
    index = random_columns(400, repeat=share, shard_size=30)
    settings = {"seed": seed, "epoch": epoch, "window_samples": 100}

    def planned_rows(**changed: int) -> set[int]:
        plan = plan_of(index, **{**settings, **changed})
        rows = [row for n in range(plan.num_packs) for row in plan.pack(n).rows.tolist()]
        assert len(set(rows)) == len(rows) == plan.num_entries
        return set(rows)

    chosen = planned_rows()
    expected = len(index) * np.float32(share)
    assert abs(len(chosen) - expected) < 5 * np.sqrt(expected * (1 - share)) + 1  # five standard deviations
    assert planned_rows() == chosen == planned_rows(window_samples=90, packs_per_step=7)
    assert planned_rows(epoch=epoch + 1) != chosen and planned_rows(seed=seed + 1) != chosen


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_runs_the_same_number_of_micro_steps(world_size):
    plan = plan_of(random_columns(100), packs_per_step=4)
    for rank in range(world_size):
        assert len(share_of_rank(plan.step(0), rank, world_size)) == -(-4 // world_size)
