"""Tags of TensorBoard: a few headings per stage, no chart with figures of two stages."""

import pytest

from pipeline.tracking.tensorboard import tag


@pytest.mark.parametrize(
    "name, expected",
    [
        ("loss", "router/loss"),
        ("learning_rate", "router/learning_rate"),
        ("kl_per_token", "router/kl_per_token"),
        ("routed_tokens_saved", "router/routed_tokens_saved"),
        ("validation_kl_full", "router_validation/validation_kl_full"),
        ("tokens_per_second", "router_speed/tokens_per_second"),
        ("seconds_data_wait", "router_speed/seconds_data_wait"),
        ("tiles_per_pack", "router_data/tiles_per_pack"),
        ("policy_tokens", "router_data/policy_tokens"),
        ("share_compressed", "router_data/share_compressed"),
        ("system/node1/cpu_utilization_percentage", "system/node1/cpu_utilization_percentage"),
    ],
)
def test_metrics_are_below_few_headings(name, expected):
    assert tag("router", name) == expected
