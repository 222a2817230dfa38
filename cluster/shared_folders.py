"""Check, inside a ray_session, that all nodes of the cluster see a folder that the run uses."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vico.errors import UserError, one_line

logger = logging.getLogger(__name__)
_ANSWER_TIMEOUT_S = 60.0


def refuse_unseen_folder(field: str, folder: Path) -> None:
    """Raise UserError when a node of the cluster does not see a file that this process writes there."""
    marker = folder.resolve() / f".seen-{secrets.token_hex(4)}"
    marker.touch()
    try:
        nodes = _nodes_without(marker)
    finally:
        marker.unlink()
    if nodes:
        raise UserError(
            f"{field}={folder} is not seen by {nodes}; set {field} in the site to a folder that all nodes of "
            "the cluster share"
        )


def refuse_unseen_model(folder: Path) -> None:
    """Raise UserError when a node of the cluster does not see the model folder of this node."""
    config = folder / "config.json"
    nodes = _nodes_without(config) if config.is_file() else ""
    if nodes:
        raise UserError(
            f"inputs.model: {folder} is not seen by {nodes}; put the model in a folder that all nodes of the "
            "cluster share (for a model of the Hub: set HF_HOME to one)"
        )


def _nodes_without(path: Path) -> str:
    """Name the first node that lacks the file and say how many nodes lack it; "" when all have it.

    A node that does not answer is not counted: it may be leaving the cluster.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return ""
    answers = {
        node["NodeManagerAddress"]: ray.remote(os.path.exists)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(str(path))
        for node in nodes
    }
    lacking = []
    for address, answer in answers.items():
        try:
            if not ray.get(answer, timeout=_ANSWER_TIMEOUT_S):
                lacking.append(address)
        except RayError as error:
            reason = one_line(error, max_chars=None)
            logger.warning("node %s did not say whether it sees %s: %s", address, path, reason)
    return f"node {lacking[0]} ({len(lacking)} of {len(nodes)} nodes)" if lacking else ""
