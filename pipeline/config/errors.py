"""The errors of pydantic for a config as lines for people: dotted path, value, fault, remedy."""

import difflib
import json
from collections.abc import Callable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.site import Site
from vico.shown_text import printable

_KINDS = (
    ("float", "a number"),
    ("finite_number", "a finite number"),
    ("int", "a whole number"),
    ("bool", "true or false"),
    ("string", "text"),
    ("path", "a path"),
    ("model", "a block of keys"),
    ("dict", "a block of keys"),
    ("tuple", "a list"),
    ("list", "a list"),
    ("set", "a list"),
)
_BOUNDS = {
    "greater_than": ("gt", "must be greater than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be less than"),
    "less_than_equal": ("le", "must be at most"),
}


_MOST_LINES = 50  # a file of thousands of unknown keys kept the command busy with suggestions


def error_lines(
    error: ValidationError,
    root: type[BaseModel],
    is_repeated: Callable[[tuple[int | str, ...]], bool] = lambda location: False,
) -> str:
    """Return one line per fault, in the order of the file, without those of keys that only repeat others."""
    faults = [details for details in error.errors() if not is_repeated(details["loc"])]
    lines = [_line(details, root) for details in faults[:_MOST_LINES]]
    if len(faults) > _MOST_LINES:
        lines.append(f"and {len(faults) - _MOST_LINES} more faults; fix these first")
    return "\n".join(dict.fromkeys(map(printable, lines)))


def _line(details: ErrorDetails, root: type[BaseModel]) -> str:
    location = [str(part) for part in details["loc"]]
    path = ".".join(location) or "config"
    kind, value = details["type"], details.get("input")
    if kind == "extra_forbidden":
        return _unknown_key(location, root)
    if kind == "missing":
        return f"{path} is missing; give it a value"
    shown = f"{path}={_short(value)}"
    if kind in _BOUNDS:
        field, words = _BOUNDS[kind]
        return f"{shown} {words} {details['ctx'][field]:g}"
    if kind in ("literal_error", "enum", "union_tag_invalid"):
        allowed = str(details["ctx"].get("expected") or details["ctx"].get("expected_tags"))
        return f"{shown} is not one of {allowed}{_nearest(value, allowed)}"
    if kind in ("value_error", "assertion_error"):
        message = str(details["ctx"]["error"])
        return message if message.startswith(path) else f"{path}: {message}"
    for prefix, words in _KINDS:
        if kind.startswith(prefix) and (
            "type" in kind or "parsing" in kind or kind == prefix or "from" in kind
        ):
            return f"{shown} is not {words}{_example(location, root)}"
    return f"{shown}: {details['msg'].lower()}{_example(location, root)}"


def _short(value: Any) -> str:
    """Return the value as it is written in the file, cut to 60 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown_key(location: list[str], root: type[BaseModel]) -> str:
    path, name = ".".join(location), location[-1]
    if path in Site.model_fields:
        return (
            f"unknown key {path}; it is a key of the site file: set it there, and name the file with --site"
        )
    model = _model_at(location[:-1], root)
    field_names = list(model.model_fields) if model else []
    near = difflib.get_close_matches(name, field_names, n=1, cutoff=0.6)
    if near:
        return f"unknown key {path}; did you mean {'.'.join([*location[:-1], near[0]])}?"
    elsewhere = [other for other in _paths(root) if other.split(".")[-1] == name]
    if elsewhere:
        return f"unknown key {path}; did you mean {elsewhere[0]}?"
    return f"unknown key {path}; known there: {', '.join(field_names)}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the config classes that an annotation allows: `[A]` for `A | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _model_at(location: list[str], root: type[BaseModel]) -> type[BaseModel] | None:
    """Return the config class of the block at this path; None if it is not a block."""
    model: type[BaseModel] | None = root
    for name in location:
        if model is None or name not in model.model_fields:
            continue  # an index of a list or a tag of a union
        models = _models(model.model_fields[name].annotation)
        model = models[0] if models else None
    return model


def _paths(
    model: type[BaseModel], prefix: str = "", outer: tuple[type[BaseModel], ...] = ()
) -> Iterator[str]:
    """Yield the dotted path of every key of a config class; a class inside itself gives only its own key."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models(field.annotation):
            if inner not in (*outer, model):
                yield from _paths(inner, f"{prefix}{name}.", (*outer, model))


def _nearest(value: Any, allowed: str) -> str:
    names = [name.strip().strip("'") for name in allowed.replace(" or ", ", ").split(",")]
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _example(location: list[str], root: type[BaseModel]) -> str:
    """Return the remedy: the default as an example of the right form, if the field has one."""
    model = _model_at(location[:-1], root)
    field = model.model_fields.get(location[-1]) if model and location else None
    if field is None or field.is_required():
        return "; fix the value"
    default = field.get_default(call_default_factory=True)
    if default is None or isinstance(default, BaseModel):
        return "; fix the value or leave it out"
    return f"; give one such as {_short(default)} (the default)"
