"""What the files of a trained router say of it: its threshold, and the policy whose vision features it knows.

An adopted router (`inputs.adopt`) may lack the one or be of another policy. The mark is the digest of the
policy's weights in the metadata of `router.safetensors`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from stages.losses_policy import policy_digest
from stages.outputs import METRICS_FILE, ROUTER_FILE
from vico.errors import UserError

_KEY = "vico.policy"


def policy_mark(policy_folder: Path) -> dict[str, str]:
    """Return the metadata of a router's file that name its policy."""
    return {_KEY: policy_digest(policy_folder)}


def calibrated_threshold(router_folder: Path) -> float:
    """Return the threshold of the router's P(compress). Raises UserError if there is none."""
    path = router_folder / METRICS_FILE
    metrics = json.loads(path.read_text(encoding="utf-8"))
    threshold = metrics.get("absolute_threshold") if isinstance(metrics, Mapping) else None
    if not isinstance(threshold, int | float) or not math.isfinite(threshold):
        raise UserError(
            f"{path}: absolute_threshold={threshold} is not a threshold, so the router chooses no rates; "
            "adopt a router with its calibrated threshold, or let the stage run here"
        )
    return float(threshold)


def check_router_policy(router_folder: Path, policy_folder: Path) -> None:
    """Raise UserError if the router was trained on the vision features of another policy.

    A router without a mark, from an earlier version, is not compared.
    """
    from safetensors import safe_open

    path = router_folder / ROUTER_FILE
    with safe_open(path, "np") as file:
        mark = (file.metadata() or {}).get(_KEY)
    if mark is None or mark == policy_digest(policy_folder):
        return
    raise UserError(
        f"{path}: the router was trained on vision features and losses of another policy than "
        f"{policy_folder}; adopt the router of this policy, or let the stage run here"
    )
