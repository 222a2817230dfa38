"""The plan of packs: every sample once, within the budgets, independent of workers, with balanced steps."""

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packs.fixed_packs import fixed_packs
from data_prep.packs.pack import Pack, PackBudget
from data_prep.packs.plan import PackPlan, PlanSettings, PlanSummary
from data_prep.packs.rates import RateDraw
from data_prep.shards.index import IndexColumns
from vico.errors import UserError

TOKENS_FULL = 16


def columns(
    rows: list[tuple[int, list[int]]], repeat: float | list[float] = 1.0, shard_size: int = 7
) -> IndexColumns:
    """Return the columns of samples given as (text tokens, tiles of each picture); row numbers have gaps."""
    n = len(rows)
    lengths = [len(tiles) for _, tiles in rows]
    return IndexColumns(
        rows=np.arange(n) * 3 + 1,
        shard=(np.arange(n) // shard_size * 2).astype(np.int32),
        text_tokens=np.array([text for text, _ in rows], np.int32),
        num_tiles=np.array([sum(tiles) for _, tiles in rows], np.int32),
        repeat=np.broadcast_to(np.float32(repeat), n),
        image_starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        image_tiles=np.array([t for _, tiles in rows for t in tiles], np.int16),
    )


def random_columns(n: int, seed: int = 0, repeat: float = 1.0, shard_size: int = 50) -> IndexColumns:
    rng = np.random.default_rng(seed)
    rows = [
        (int(rng.integers(5, 80)), [int(t) for t in rng.choice([1, 3, 5, 7], rng.integers(0, 3))])
        for _ in range(n)
    ]
    return columns(rows, repeat, shard_size)


def budget_of(reference_tokens: int = 512, tiles: int = 24) -> PackBudget:
    return PackBudget(reference_tokens, tiles, TOKENS_FULL)


def plan_of(index: IndexColumns, summary: PlanSummary | None = None, **changed: Any) -> PackPlan:
    """Return a plan with some settings changed; those of budget and rates are named like the others."""
    budget = {name: changed.pop(name) for name in ("reference_tokens", "tiles") if name in changed}
    rates = RateDraw(changed.pop("rate_unit", "tile"), changed.pop("compress_share", 0.5))
    settings = {"packs_per_step": 4, "seed": 3, "epoch": 0, "window_samples": 64, **changed}
    return PackPlan(index, PlanSettings(budget_of(**budget), rates=rates, **settings), summary)


def as_values(pack: Pack) -> tuple[int, list[int], list[int], list[list[bool]]]:
    return (pack.number, pack.rows.tolist(), pack.copies.tolist(), [r.tolist() for r in pack.compressed])


def everything(plan: PackPlan) -> list[list[tuple]]:
    """Return all steps as plain values."""
    return [[as_values(pack) for pack in plan.step(n)] for n in range(plan.num_steps)]


sample_lists = st.lists(
    st.tuples(st.integers(2, 60), st.lists(st.integers(1, 5), max_size=3)), min_size=1, max_size=60
)
plans = st.fixed_dictionaries(
    {
        "packs_per_step": st.integers(1, 5),
        "window_samples": st.integers(1, 40),
        "seed": st.integers(0, 5),
        "epoch": st.integers(0, 3),
        "rate_unit": st.sampled_from(["tile", "image", "full"]),
        "reference_tokens": st.integers(60 + 15 * TOKENS_FULL, 900),
        "tiles": st.integers(15, 40),
    }
)


@settings(max_examples=60, deadline=None)
@given(sample_lists, plans, st.integers(1, 9), st.integers(0, 3))
def test_every_sample_occurs_repeat_times_within_the_budgets(samples, changed, shard_size, repeat):
    if repeat == 0:
        samples = [*samples, (2, [])]
    repeats = [float(repeat)] * (len(samples) - 1) + [1.0]
    index = columns(samples, repeats, shard_size)
    plan = plan_of(index, **changed)
    tokens = budget_of().sample_tokens(index)
    seen = Counter()
    numbers = []
    for n in range(plan.num_steps):
        packs = plan.step(n)
        assert len(packs) == changed["packs_per_step"]
        numbers += [pack.number for pack in packs]
        for pack in packs:
            seen.update(zip(pack.rows.tolist(), pack.copies.tolist(), strict=True))
            positions = (pack.rows - 1) // 3
            assert tokens[positions].sum() == pack.num_tokens <= changed["reference_tokens"]
            assert index.num_tiles[positions].sum() == pack.num_tiles <= changed["tiles"]
            assert [len(rates) for rates in pack.compressed] == index.num_tiles[positions].tolist()
            assert (len(pack.rows) == 0) == (pack.number >= plan.num_packs)
    expected = {
        (int(row), copy) for row, times in zip(index.rows, repeats, strict=True) for copy in range(int(times))
    }
    assert seen == Counter(expected)
    assert numbers == list(range(plan.num_steps * changed["packs_per_step"]))


@settings(max_examples=30, deadline=None)
@given(sample_lists, plans, st.data())
def test_a_position_is_one_number(samples, changed, data):
    """A new plan opened at any step, with or without the summary, gives the same packs and rates."""
    index = columns(samples)
    plan = plan_of(index, **changed)
    n = data.draw(st.integers(0, plan.num_steps - 1))
    whole = everything(plan)
    with_summary = plan_of(index, summary=plan.summary, **changed)
    for other in (plan_of(index, **changed), with_summary):
        assert [as_values(pack) for pack in other.step(n)] == whole[n]


def test_packs_per_step_does_not_change_what_a_pack_holds():
    """Another number regroups the same packs: their samples and rates stay."""
    index = random_columns(300)
    contents = []
    for packs_per_step in (1, 4, 6):
        steps = everything(plan_of(index, packs_per_step=packs_per_step))
        contents.append(sorted((rows, rates) for step in steps for _, rows, _, rates in step if rows))
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize(
    "unit, digest",
    [("tile", "2da04fbc39bfe5bc"), ("image", "55fe23479f79059a"), ("full", "cca78ed1ad8b9eb2")],
)
def test_a_plan_is_the_same_as_in_earlier_versions(unit, digest):
    """A training that resumes with newer code counts the steps of this plan."""
    rows = [(5 + i * 37 % 75, [1 + i * (k + 3) % 7 for k in range(i * 5 % 4)]) for i in range(300)]
    repeat = [(1.0, 2.0, 0.5)[i % 3] for i in range(300)]
    plan = plan_of(columns(rows, repeat), seed=5, epoch=2, rate_unit=unit, compress_share=0.4)
    assert hashlib.sha256(repr(everything(plan)).encode()).hexdigest()[:16] == digest


def test_epochs_and_seeds_differ_in_order_and_rates():
    index = random_columns(300)
    plans = [everything(plan_of(index, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(plan) for plan in plans}) == 4


def test_samples_of_distant_shards_meet_and_lines_are_shuffled():
    index = random_columns(1000, shard_size=50)
    plan = plan_of(index, window_samples=200)
    first_rows = np.concatenate([pack.rows for pack in plan.step(0)])
    shards = index.shard[(first_rows - 1) // 3]
    assert len(set(shards.tolist())) > 1
    order = np.concatenate([plan.pack(n).rows for n in range(plan.num_packs)])
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.3


def test_a_fractional_repeat_is_a_random_share_that_changes_with_the_epoch():
    index = random_columns(2000, repeat=1.25, shard_size=100)
    seen = []
    for epoch in (0, 1):
        plan = plan_of(index, epoch=epoch, window_samples=500)
        packs = [plan.pack(n) for n in range(plan.num_packs)]
        rows = Counter(row for pack in packs for row in pack.rows.tolist())
        assert set(rows) == set(index.rows.tolist()) and set(rows.values()) == {1, 2}
        seen.append({row for row, times in rows.items() if times == 2})
        assert len(seen[-1]) == pytest.approx(500, abs=60)
    assert seen[0] != seen[1]


def test_a_repeat_below_one_takes_a_share_and_copies_are_spread():
    index = random_columns(1000, repeat=0.3)
    plan = plan_of(index)
    assert plan.num_entries == pytest.approx(300, abs=50)
    plan = plan_of(random_columns(200, repeat=4.0, shard_size=20))
    packs_by_row: dict[int, list[int]] = {}
    for number in range(plan.num_packs):
        for row in plan.pack(number).rows.tolist():
            packs_by_row.setdefault(row, []).append(number)
    spreads = [max(numbers) - min(numbers) for numbers in packs_by_row.values()]
    assert np.mean(spreads) > plan.num_packs / 4


def test_rates_by_tile_by_image_and_full():
    index = columns([(10, [4, 4, 4])] * 400, shard_size=100)
    drawn = {}
    for unit in ("tile", "image", "full"):
        plan = plan_of(index, rate_unit=unit, compress_share=0.25, reference_tokens=10_000)
        rates = [r for n in range(plan.num_packs) for r in plan.pack(n).compressed]
        drawn[unit] = np.stack(rates).reshape(-1, 4)
    assert drawn["tile"].mean() == pytest.approx(0.25, abs=0.03)
    assert drawn["image"].mean() == pytest.approx(0.25, abs=0.04)
    assert (drawn["image"] == drawn["image"][:, :1]).all()
    assert not (drawn["tile"] == drawn["tile"][:, :1]).all()
    assert not drawn["full"].any()


def test_the_rates_of_a_sample_do_not_depend_on_its_pack():
    index = random_columns(200)
    by_sample = []
    for changed in ({}, {"reference_tokens": 700}, {"window_samples": 17}):
        plan = plan_of(index, **changed)
        packs = [plan.pack(n) for n in range(plan.num_packs)]
        by_sample.append(
            {
                (row, copy): rates.tolist()
                for pack in packs
                for row, copy, rates in zip(
                    pack.rows.tolist(), pack.copies.tolist(), pack.compressed, strict=True
                )
            }
        )
    assert by_sample[0] == by_sample[1] == by_sample[2]


def cost_of(packs: list[Pack]) -> np.ndarray:
    return np.array([100 * pack.num_tiles + pack.num_tokens for pack in packs])


@pytest.mark.parametrize("num_ranks, most", [(8, 1.1), (2, 1.03)])
def test_packs_are_full_and_ranks_have_equal_work(num_ranks, most):
    """Packs of the same micro-step are neighbours in cost."""
    index = random_columns(4000, shard_size=200)
    plan = plan_of(index, window_samples=1000, packs_per_step=8)
    packs = [plan.pack(n) for n in range(plan.num_packs)]
    assert np.mean([max(pack.num_tokens / 512, pack.num_tiles / 24) for pack in packs]) > 0.98
    costs = cost_of(packs)[: len(packs) // 8 * 8]
    micro_steps = costs.reshape(-1, num_ranks)
    assert np.mean(micro_steps.max(axis=1) / micro_steps.mean(axis=1)) < most
    order = costs.reshape(-1, 8).mean(axis=1)
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.35, (
        "light steps are spread over the epoch"
    )


def test_samples_of_all_sizes_count_alike_over_an_epoch():
    """A step's loss is divided by its own number of samples. With packs of similar samples and steps of
    similar packs, a sample of 13 tiles would count 2.7 times as much as the mean, one of a tile half."""
    random = np.random.default_rng(0)
    num_tiles = random.choice([0, 1, 3, 5, 7, 9, 13], 12_000, p=[0.2, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1])
    texts = random.integers(40, 400, len(num_tiles)).tolist()
    index = columns(
        [(t, [n] if n else []) for t, n in zip(texts, num_tiles.tolist(), strict=True)], 1.0, 2000
    )
    settings = PlanSettings(PackBudget(32_768, 96, 256), 8, seed=3, epoch=0, window_samples=4096)
    plan = PackPlan(index, settings)
    weights = np.zeros(len(num_tiles))
    for n in range(plan.num_steps - 1):  # the last one is not full
        rows = np.concatenate([pack.rows for pack in plan.step(n)]) // 3
        weights[rows] = plan.num_entries / (plan.num_packs / 8) / len(rows)
    for count in np.unique(num_tiles):
        assert weights[(num_tiles == count) & (weights > 0)].mean() == pytest.approx(1, abs=0.05), count


def test_a_window_is_planned_when_it_is_needed(monkeypatch):
    index = random_columns(3000)
    summary = plan_of(index).summary
    planned = []
    original = PackPlan._packed
    monkeypatch.setattr(PackPlan, "_packed", lambda self, w: planned.append(w) or original(self, w))
    plan = plan_of(index, summary=summary)
    plan.step(plan.num_steps // 2)
    assert 1 <= len(planned) <= 2
    for n in range(plan.num_steps):
        plan.step(n)
    assert len(planned) <= plan.num_windows + 2 and len(plan._windows) <= 4


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"reference_tokens": 100},
            r"reference_tokens_per_pack=100 .* row 4 \(114 reference tokens, 4 tiles\)",
        ),
        ({"tiles": 3}, r"tiles_per_pack=3 .* row 4 .* raise tiles_per_pack to at least 4"),
    ],
)
def test_a_sample_that_fits_no_pack_is_named(changed, message):
    index = columns([(20, [1]), (50, [4]), (30, [])])
    with pytest.raises(UserError, match=message):
        plan_of(index, **changed)
    with pytest.raises(UserError, match=message):
        list(fixed_packs(index, budget_of(**changed), compressed=False))


def test_a_split_without_samples_and_a_step_past_the_end_are_refused():
    with pytest.raises(UserError, match="no samples"):
        plan_of(columns([]))
    plan = plan_of(columns([(20, [1])]))
    with pytest.raises(IndexError, match="step 1 of 1"):
        plan.step(1)


@settings(max_examples=50, deadline=None)
@given(sample_lists, st.integers(300, 900), st.integers(15, 40), st.booleans())
def test_fixed_packs_hold_every_sample_in_index_order(samples, reference_tokens, tiles, compressed):
    index = columns(samples, repeat=2.0)
    packs = list(fixed_packs(index, budget_of(reference_tokens, tiles), compressed=compressed))
    assert np.concatenate([pack.rows for pack in packs]).tolist() == index.rows.tolist()
    assert [pack.number for pack in packs] == list(range(len(packs)))
    for pack in packs:
        assert pack.num_tokens <= reference_tokens and pack.num_tiles <= tiles
        assert all((rates == compressed).all() for rates in pack.compressed)
