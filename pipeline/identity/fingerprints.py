"""What a stage's result is a function of, as one fingerprint: stage, code version, config, inputs.

Where a stage runs (site, workers, paths) never enters. Used by planning; a golden test pins known
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
    """A value that has no stable written form, so it cannot be part of an identity."""


def stable_form(value: Any, where: str = "value") -> Any:
    """The value as plain JSON types; pydantic models lose the fields that stand at their default.

    Raises UnstableValue for nan, inf, sets, paths and whatever else may read differently the next time.
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
        return [stable_form(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: stable_form(item, f"{where}.{key}") for key, item in value.items()}
    raise UnstableValue(
        f"{where}={value!r} ({type(value).__name__}) has no stable form; give it as text or numbers"
    )


def config_identity(config: BaseModel, where: str = "config") -> dict[str, Any]:
    """A config in stable form without the fields at their default, so that a new field with a default
    moves nothing."""
    form = {}
    for name, field in type(config).model_fields.items():
        value = stable_form(getattr(config, name), f"{where}.{name}")
        if not _is_default(field, value, where) or _is_tag(field):
            form[name] = value
    return form


def _is_default(field: FieldInfo, value: Any, where: str) -> bool:
    if field.is_required():
        return False
    default = field.get_default(call_default_factory=True)
    return canonical_json(stable_form(default, where)) == canonical_json(value)


def _is_tag(field: FieldInfo) -> bool:
    """A field with one possible value tells two kinds of config apart, so it stays."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; floats in Python's shortest exact form."""
    return json.dumps(stable_form(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def stage_identity(code_version: int, config: BaseModel, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What is recorded beside a fingerprint, and with the stage's name gives it. The config's seed is
    resolved."""
    return {"code_version": code_version, "config": config_identity(config), "inputs": dict(inputs)}


def stage_fingerprint(stage: str, identity: Mapping[str, Any]) -> str:
    return digest({"stage": stage, **identity})
