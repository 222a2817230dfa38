"""What a step contains and how it is drawn never depends on the number of ranks."""

import pytest

from stages.training.optimizer import OptimizerConfig
from stages.training.step import derived_seed, share_of_rank


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_pack_of_a_step_goes_to_one_rank_and_ranks_run_equally_often(world_size):
    packs = ["a", "b", "c", "d"]
    shares = [share_of_rank(packs, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    trained = [(number, pack) for share in shares for number, pack in share if pack is not None]
    assert sorted(trained) == list(enumerate(packs))


def test_seeds_differ_by_purpose_step_and_pack_and_fit_torch():
    seeds = {derived_seed(0, what, step, pack) for what in "ab" for step in range(9) for pack in range(9)}
    assert len(seeds) == 2 * 9 * 9
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, "a", 1, 2) == derived_seed(0, "a", 1, 2)


def test_learning_rate_warms_up_peaks_and_ends_near_its_final_share():
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_share=0.1, final_lr_share=0.2)
    rates = [optimizer.learning_rate_at(step, 100) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] > 0
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
