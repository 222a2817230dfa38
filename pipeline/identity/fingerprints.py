"""Fingerprints of stages: one sha256 over a stage's name, code version, config and the fingerprints of its
inputs.

Where a stage runs (site, workers, paths) never enters. Used by planning; a golden test pins published
fingerprints.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


class UnstableValue(TypeError):
    """A value without a stable written form, which cannot be part of an identity."""


def stable_form(value: Any, where: str = "value") -> Any:
    """Return the value as plain JSON types; pydantic models without the fields at their default.

    Raises UnstableValue for nan, inf, sets, paths and any other value that may read differently the next
    time; `where` names the value in the message.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, BaseModel):
        return config_identity(value, where)
    if isinstance(value, list | tuple):
        return [stable_form(element, f"{where}[{number}]") for number, element in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: stable_form(element, f"{where}.{key}") for key, element in value.items()}
    raise UnstableValue(
        f"{where}={value!r} ({type(value).__name__}) has no stable form; give it as text or numbers"
    )


def config_identity(config: BaseModel, where: str = "config") -> dict[str, Any]:
    """Return a config in stable form without the fields at their default: a new field with a default
    changes no fingerprint. Neither does a new default, if the class says what was left out before
    (`StageConfig.LEFT_OUT`)."""
    form = {}
    left_out = getattr(type(config), "LEFT_OUT", {})
    for name, field in type(config).model_fields.items():
        value = stable_form(getattr(config, name), f"{where}.{name}")
        is_left_out = (
            canonical_json(left_out[name]) == canonical_json(value)
            if name in left_out
            else _is_default(field, value, where)
        )
        if not is_left_out or _is_tag(field):
            form[name] = value
    return form


def _is_default(field: FieldInfo, value: Any, where: str) -> bool:
    if field.is_required():
        return False
    default = field.get_default(call_default_factory=True)
    return canonical_json(stable_form(default, where)) == canonical_json(value)


def _is_tag(field: FieldInfo) -> bool:
    """Return whether the field has one possible value, which tells kinds of config apart: it is always
    kept."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces; floats in Python's shortest exact form."""
    return json.dumps(stable_form(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: Any) -> str:
    """Return the sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def stage_identity(code_version: int, config: BaseModel, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return what a stage's fingerprint is computed from, beside its name; records keep it.

    `inputs` maps names to fingerprints; the config's seed must be resolved.
    """
    return {"code_version": code_version, "config": config_identity(config), "inputs": dict(inputs)}


def stage_fingerprint(stage: str, identity: Mapping[str, Any]) -> str:
    return digest({"stage": stage, **identity})
