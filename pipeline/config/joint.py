"""The block `joint` of a pipeline file: its blocks, and what they take over from the first stages."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from pipeline.config.graph import JOINT, JOINT_STAGES, Graph, block_path

LEARNING_RATE_SHARE = 0.5
"""Default learning rate of the joint training, as a share of the first training's."""
_NOT_TAKEN_OVER = {"consistency": ("connector_start", "connector_warmup_steps")}
"""Settings for a new compressed connector; the joint training continues with a trained one."""


class JointBlock(BaseModel):
    """Continued consistency training at the router's rates, then losses, labels and router once more. null,
    the default: off; `{}`: on, with the settings of the first stages."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def joint_field(graph: Graph) -> dict[str, Any]:
    """Return the field `joint` of a pipeline file, as `create_model` takes it; none for a graph without a
    router."""
    if "router" not in graph.names:
        return {}
    blocks: dict[str, Any] = {}
    for spec in JOINT_STAGES:
        required = any(field.is_required() for field in spec.config_class.model_fields.values())
        default = Field(...) if required else Field(default_factory=spec.config_class)
        blocks[block_path(spec.name)[-1]] = (spec.config_class, default)
    block = create_model("JointBlock", __base__=JointBlock, __doc__=JointBlock.__doc__, **blocks)
    return {JOINT: (block | None, Field(None))}


def fill_in_joint(content: dict[str, Any]) -> None:
    """Give each block of `joint` the settings of the first stage's block that it does not set itself."""
    joint = content.get(JOINT)
    if not isinstance(joint, dict):
        return
    filled = dict(joint)
    for spec in JOINT_STAGES:
        name = block_path(spec.name)[-1]
        first, own = content.get(name), joint.get(name, {})
        if isinstance(first, dict) and isinstance(own, dict):
            filled[name] = _merged(_taken_over(name, first), own)
    content[JOINT] = filled


def is_taken_over(location: Sequence[int | str], own: Any) -> bool:
    """Return whether a key of `joint` has its value from a first stage; `own` is the block as given."""
    if not location or location[0] != JOINT:
        return False
    for name in location[1:]:
        if isinstance(name, int):
            return False
        if not isinstance(own, dict):
            return False
        if name not in own:
            return True
        own = own[name]
    return False


def _taken_over(name: str, first: Mapping[str, Any]) -> dict[str, Any]:
    left_out = _NOT_TAKEN_OVER.get(name, ())
    values = {key: deepcopy(value) for key, value in first.items() if key not in left_out}
    optimizer = values.get("optimizer")
    if name == "consistency" and isinstance(optimizer, dict):
        rate = optimizer.get("learning_rate")
        if isinstance(rate, int | float) and not isinstance(rate, bool):
            optimizer["learning_rate"] = LEARNING_RATE_SHARE * rate
    return values


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            merged[key] = _merged(inner, value)
        else:
            merged[key] = value
    return merged
