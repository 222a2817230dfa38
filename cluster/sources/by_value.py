"""Send Ray's workers what they run, so that `in_worker` compares their code before anything is imported."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.sources import in_worker
from cluster.sources.reports import accept
from vico.errors import one_line

logger = logging.getLogger(__name__)
cloudpickle.register_pickle_by_value(in_worker)
_ANSWER_TIMEOUT_S = 60.0


def pickled(content: Any) -> bytes:
    """Return what a worker unpickles only after it has compared its code."""
    return cloudpickle.dumps(content)


def refuse_other_code() -> None:
    """Ask a worker on each node of the cluster for its code; raise UserError if it is not this process's.

    A node that does not answer is left out: every process compares its code again before it works.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    answers = {
        node["NodeManagerAddress"]: ray.remote(in_worker.code_here)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote()
        for node in nodes
    }
    for address, answer in answers.items():
        try:
            report = ray.get(answer, timeout=_ANSWER_TIMEOUT_S)
        except RayError as error:
            logger.warning(
                "node %s did not say which code it has: %s", address, one_line(error, max_chars=None)
            )
            continue
        accept(report)
