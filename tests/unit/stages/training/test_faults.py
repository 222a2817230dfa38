"""How a training reacts to odd losses and gradients."""

import json
import math

import pytest

from cluster.train_settings import DivergenceSettings
from stages.training.faults import Diverged, LossWatch


def watched(
    losses: list[float],
    grad_norms: list[float] | None = None,
    skipped: list[int] | None = None,
    **settings: int,
) -> dict[str, float]:
    """Return the counts of the last step after watching all of them."""
    watch = LossWatch(DivergenceSettings(**settings))
    for step, loss in enumerate(losses, start=1):
        norm = grad_norms[step - 1] if grad_norms else 1.0
        counts = watch.counts(step, loss, norm, skipped[step - 1] if skipped else 0)
    return counts


def test_a_spike_is_a_loss_far_above_the_median_of_enough_losses():
    assert watched([9.0, *[1.0] * 10, 9.9])["loss_spikes"] == 0
    assert watched([*[1.0] * 10, 10.1, 1.0, 10.1])["loss_spikes"] == 2


def test_more_spikes_than_allowed_stop_the_training():
    losses = [*[1.0] * 10, 11.0, 11.0]
    assert watched(losses, max_loss_spikes=2)["loss_spikes"] == 2
    with pytest.raises(Diverged, match=r"step 12: train\.divergence\.max_loss_spikes=1 is passed \(2\)"):
        watched(losses, max_loss_spikes=1)


def test_skipped_updates_are_counted_and_limited():
    losses, norms, skipped = [1.0] * 3, [1.0, math.inf, math.inf], [0, 1, 2]
    assert watched(losses, norms, skipped, max_skipped_steps=2)["skipped_steps"] == 2
    with pytest.raises(Diverged, match=r"step 3: train\.divergence\.max_skipped_steps=1 is passed \(2\)"):
        watched(losses, norms, skipped, max_skipped_steps=1)


def test_limits_apply_to_the_whole_training_however_often_it_is_started():
    settings = DivergenceSettings(max_loss_spikes=2, max_skipped_steps=2)
    first = LossWatch(settings)
    for step, loss in enumerate([*[1.0] * 10, 11.0], start=1):
        first.counts(step, loss, 1.0, 0)
    assert first.counts(12, 1.0, math.inf, 1) == {"loss_spikes": 1.0, "skipped_steps": 1.0}
    state = json.loads(json.dumps(first.state))  # as a checkpoint keeps it
    # the engine's own count continues from the checkpoint, or starts from zero
    for skipped_before in (0, 1):
        again = LossWatch(settings, state, skipped_before)
        counts = again.counts(13, 11.0, math.inf, skipped_before + 1)
        assert counts == {"loss_spikes": 2.0, "skipped_steps": 2.0}, "the window of losses is restored"
        with pytest.raises(Diverged, match=r"train\.divergence\.max_skipped_steps=2 is passed \(3\)"):
            again.counts(14, 1.0, math.inf, skipped_before + 2)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_stops_the_training_unless_some_may_be_left_out(norm):
    with pytest.raises(Diverged, match=f"step 2: the gradient's norm is {norm}"):
        watched([1.0, 1.0], [1.0, norm], [0, 1])
    with pytest.raises(Diverged, match=f"step 2: the gradient's norm is {norm}"):  # and was not left out
        watched([1.0, 1.0], [1.0, norm], max_skipped_steps=5)
