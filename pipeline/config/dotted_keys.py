"""Config blocks by dotted keys: `--set a.b=value` into a block, and a block as one level of `a.b` keys."""

import json
from collections.abc import Mapping
from typing import Any

from cluster.settings.yaml_files import yaml_value
from vico.bounded_text import MAX_DEPTH
from vico.errors import UserError


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in the content; the value is read as YAML. Raises UserError for a wrong form."""
    path, equals, text = override.partition("=")
    shown = repr(override if len(override) <= 80 else f"{override[:80]}..")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"--set {shown} has no key and value; write it as --set shard.max_tiles=6")
    if len(names) > MAX_DEPTH:
        raise UserError(f"--set {shown}: the key has {len(names)} parts; name a field of the config")
    block = content
    for depth, name in enumerate(names[:-1], start=1):
        inner = block.get(name)
        if inner is None:
            inner = block[name] = {}
        if not isinstance(inner, dict):
            key = ".".join(names[:depth])
            raise UserError(f"--set {shown}: {key}={inner!r} is not a block of keys; set {key} itself")
        block = inner
    block[names[-1]] = yaml_value(text, f"--set {shown}")


def flattened(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the block as one level: `{"a": {"b": 1e-5}}` gives `{"a.b": 1e-5}`. An empty block stays."""
    flat: dict[str, Any] = {}
    for name, value in block.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def flattened_text(block: Mapping[str, Any]) -> dict[str, str]:
    """Return the block as one level of text: `{"a": {"b": 1e-5}}` gives `{"a.b": "1e-05"}`."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in flattened(block).items()
    }
