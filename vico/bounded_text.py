"""Limits for JSON and YAML that others wrote: a small text must not keep a command busy, fill the memory or
end in a traceback."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

MAX_DEPTH = 64
"""Lists and objects within each other."""
MAX_DIGITS = 40
"""Of a whole number. JSON and YAML know no limit; tokenizers write 10**30 for a length without one."""
MAX_YAML_BYTES = 256 * 1024
MAX_YAML_VALUES = 50_000
"""Values of a YAML text, with each alias counted as all that it stands for."""
_LONG_NUMBER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|[0-9_:]+)")


class BeyondLimits(ValueError):
    """A text is larger, deeper or longer than anything that this project reads."""


def bounded_json(
    text: str | bytes,
    max_bytes: int,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Return the value of a JSON text. Raises ValueError if it is not JSON or beyond the limits."""
    if len(text) > max_bytes:
        raise BeyondLimits(f"it has {len(text)} bytes, more than {max_bytes}")
    return depth_checked(
        text,
        lambda: json.loads(
            text, parse_int=bounded_int, parse_float=finite_float, object_pairs_hook=object_pairs_hook
        ),
    )


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs, as an `object_pairs_hook`.

    Raises ValueError if a name appears twice; json would keep the last value without a word.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        [(repeated, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {repeated!r} appears twice")
    return values


def depth_checked(text: str | bytes, decode: Callable[[], Any]) -> Any:
    """Return what `decode` makes of a JSON text; raise BeyondLimits if it is nested too deep."""
    try:
        value = decode()
    except RecursionError:
        raise _too_deep() from None
    opened = (
        text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    )
    if opened > MAX_DEPTH:
        refuse_depth(value)
    return value


def refuse_depth(value: Any) -> None:
    """Raise BeyondLimits if lists and dicts are nested too deep. Does not recurse."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for container in level for child in _children(container)]
        if not level:
            return
    raise _too_deep()


def _children(container: Any) -> Iterable[Any]:
    if isinstance(container, dict):
        return (child for child in container.values() if isinstance(child, dict | list))
    if isinstance(container, list):
        return (child for child in container if isinstance(child, dict | list))
    return ()


def _too_deep() -> BeyondLimits:
    return BeyondLimits(f"values are nested more than {MAX_DEPTH} levels deep")


def bounded_int(text: str) -> int:
    """Return the whole number that a text spells; raise BeyondLimits if it has too many digits."""
    if len(text) > MAX_DIGITS:
        raise BeyondLimits(f"a number has {len(text)} digits")
    return int(text)


def finite_float(text: str) -> float:
    """Return the number that a text spells; raise BeyondLimits if it is too large for 64 bits."""
    value = float(text)
    if math.isinf(value):
        raise BeyondLimits(f"the number {text[:20]} is too large")
    return value


def refuse_yaml_bomb(text: str) -> None:
    """Raise BeyondLimits if a YAML text is too long, too deep, has a number of too many digits, or becomes
    too large once its aliases stand for what they name; yaml.YAMLError if it is not YAML.

    Reads the text as a stream of events, in which nothing is expanded.
    """
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise BeyondLimits(f"it has {len(text)} characters, more than {MAX_YAML_BYTES}")
    sizes: dict[str, int] = {}
    open_blocks: list[tuple[str | None, int]] = []  # anchor, and the count before the block
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes and any(anchor == event.anchor for anchor, _ in open_blocks):
                raise BeyondLimits(f"line {_line(event)}: *{event.anchor} is within what it stands for")
            total += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
            _refuse_long_number(event)
        elif isinstance(event, yaml.CollectionStartEvent):
            if event.anchor:
                sizes.pop(event.anchor, None)
            open_blocks.append((event.anchor, total))
            total += 1
            if len(open_blocks) > MAX_DEPTH:
                raise _too_deep()
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_blocks.pop()
            if anchor:
                sizes[anchor] = total - before
        if total > MAX_YAML_VALUES:
            raise BeyondLimits(
                f"line {_line(event)}: its aliases make more than {MAX_YAML_VALUES} values of it"
            )


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _refuse_long_number(event: Any) -> None:
    if event.implicit[0] and len(event.value) > MAX_DIGITS and _LONG_NUMBER.fullmatch(event.value):
        raise BeyondLimits(
            f"line {_line(event)}: a number has {len(event.value)} digits; quote it if it is a text"
        )
