"""The one list of controls agrees with what a config may name and with the functions that choose tiles."""

from typing import get_args

from stages.controls import (
    ALL,
    BY_NAME,
    COMPARED,
    FEWER_TILES,
    ROUTED,
    SEEING_ORACLE,
    SERVED,
    ControlName,
    points_of,
)
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.points import CHOICES


def test_a_config_may_name_each_control_and_names_all_by_default():
    """The seeing oracle comes with the blind one, to be compared with it."""
    named = (*COMPARED, FEWER_TILES)
    names = tuple(control.name for control in named if control is not SEEING_ORACLE)
    assert get_args(ControlName) == names == EvaluateConfig(seed=0).controls


def test_each_compared_control_has_a_choice_function():
    assert tuple(CHOICES) == COMPARED


def test_names_and_labels_are_unique():
    assert len(BY_NAME) == len({control.label for control in ALL}) == len(ALL)


def test_points_of_a_control_are_a_list_also_if_metrics_have_only_one():
    metrics = {"full": {"kl": 1.0}, "served": [{"kl": 2.0}, {"kl": 3.0}]}
    assert points_of(metrics, BY_NAME["full"]) == [{"kl": 1.0}]
    assert points_of(metrics, SERVED) == [{"kl": 2.0}, {"kl": 3.0}]


def test_the_model_card_shows_the_rules_that_a_user_can_serve():
    assert [control for control in ALL if control.rule] == [ROUTED, SERVED]
