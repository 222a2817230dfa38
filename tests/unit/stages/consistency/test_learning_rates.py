"""Learning rates of the vision tower's layers and the new connector, and the warm-up of the connector
alone."""

import pytest
import torch

from stages.consistency.config import ConsistencyConfig
from stages.consistency.learning_rates import check_warmup, consistency_rates
from stages.training.optimizer import OptimizerConfig
from stages.training.parameter_groups import parameter_groups
from tests.numerics.consistency_case import CONFIG, consistency_task, reference_run
from tests.tiny_model import make_tiny_model
from vico.errors import UserError

TOWER = "policy.base.model.vision_tower."
CONNECTOR = "policy.compressed_connector."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("rates") / "m")


def test_rates_fall_with_the_depth_of_the_vision_tower(folder):
    config = ConsistencyConfig(seed=0, vision_lr_decay=0.5, connector_lr_scale=3.0)
    task = consistency_task(folder)
    groups = parameter_groups(task, OptimizerConfig(weight_decay=0.1), consistency_rates(config, 2))
    group_of = {id(parameter): group for group in groups for parameter in group.parameters}
    expected = {f"{TOWER}embeddings.": 0.125, f"{TOWER}encoder.layer.0.": 0.25}
    expected |= {f"{TOWER}encoder.layer.1.": 0.5, CONNECTOR: 3.0}
    seen = set()
    for name, parameter in task.named_parameters():
        prefix = next((prefix for prefix in expected if name.startswith(prefix)), "")
        seen.add(prefix)
        assert group_of[id(parameter)].rate.lr_scale == expected.get(prefix, 1.0), name
        assert group_of[id(parameter)].weight_decay == (0.1 if parameter.ndim > 1 else 0.0), name
    assert seen == {*expected, ""}


def test_by_default_there_are_two_rates(folder):
    groups = parameter_groups(
        consistency_task(folder), OptimizerConfig(), consistency_rates(ConsistencyConfig(seed=0), 2)
    )
    assert sorted({group.rate.lr_scale for group in groups}) == [1.0, 2.0]
    assert {group.rate.first_update for group in groups} == {0}


def test_only_the_new_connector_changes_in_its_warm_up_and_everything_after_it(folder):
    task, run = consistency_task(folder), reference_run(folder)
    start, trained = task.state_dict(), dict(task.named_parameters())
    assert CONFIG.connector_warmup_steps == 2
    for name, before in start.items():
        moved_in_warmup = not torch.equal(before, run["after_warmup"][name])
        assert moved_in_warmup == name.startswith(CONNECTOR), name
        if name in trained:
            assert not torch.equal(before, run["state"][name]), name


def test_a_warm_up_that_leaves_no_updates_to_the_rest_is_refused():
    check_warmup(CONFIG, num_steps=3)
    with pytest.raises(UserError, match="connector_warmup_steps=2 leaves none of the 2 updates"):
        check_warmup(CONFIG, num_steps=2)


@pytest.mark.parametrize("setting", [{"vision_lr_decay": 0.9}, {"drop_path": 0.1}])
def test_settings_of_a_frozen_vision_tower_are_refused(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}=.* has no effect while train_vision is false"):
        ConsistencyConfig(seed=0, train_vision=False, **setting)
