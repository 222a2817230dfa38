"""Steps of a training over several epochs."""

from types import SimpleNamespace

import pytest

from data_prep.packs.epoch_plans import EpochPlans, num_training_steps


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(1, 0, 10), (2.5, 0, 25), (1, 7, 7), (1, 70, 10)]
)
def test_number_of_steps(epochs, max_steps, expected):
    assert num_training_steps(epochs, max_steps, lambda epoch: 10) == expected


def test_epochs_of_different_length_are_all_trained_completely():
    assert num_training_steps(3, 0, lambda epoch: (10, 12, 11)[epoch]) == 33


def test_steps_are_counted_over_epochs_of_different_length():
    def plan(epoch: int) -> SimpleNamespace:
        return SimpleNamespace(num_steps=2 + epoch, step=lambda step: [(epoch, step)])

    epochs = EpochPlans(plan, epochs=2, max_steps=0)
    assert epochs.num_steps == 5
    packs = [epochs.packs(step) for step in range(5)]
    assert packs == [[(0, 0)], [(0, 1)], [(1, 0)], [(1, 1)], [(1, 2)]]
