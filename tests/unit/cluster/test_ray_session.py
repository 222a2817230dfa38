"""What a cluster that was joined lacks of the CPUs and GPUs of a site."""

import pytest

from cluster.ray_session import lacking
from cluster.settings.blocks import Resources, StageResources


@pytest.mark.parametrize(
    "resources, lacks",
    [
        (Resources(workers=4), []),
        (Resources(workers=4, gpus_per_worker=1), ["has 0 GPUs, resources.workers=4 need 4"]),
        (
            Resources(workers=9, gpus_per_worker=1),
            ["has 8 CPUs, resources.workers=9 need 9", "has 0 GPUs, resources.workers=9 need 9"],
        ),
        (
            Resources(stages={"router": StageResources(workers=3, gpus_per_worker=1)}),
            ["has 0 GPUs, resources.workers=3 need 3"],
        ),
    ],
)
def test_cpus_and_gpus_that_a_cluster_lacks_are_named(resources, lacks):
    assert lacking({"CPU": 8.0}, resources) == lacks
