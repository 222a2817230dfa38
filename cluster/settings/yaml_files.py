"""YAML as people write it: `1e-5` is a number and a repeated key is an error. Errors name file and line."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from vico.bounded_text import refuse_yaml_bomb
from vico.errors import UserError, one_line

_FLOAT, _INT = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"
_MERGE, _MAP = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:map"


class _Loader(yaml.SafeLoader):
    """Reads numbers by YAML 1.2. PyYAML follows YAML 1.1: 1e-5 is text, 1:30 is 90 and 010 is 8."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_FLOAT, _INT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBERS = (
    (
        _FLOAT,
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"
            r"|[-+]?\.inf$|\.nan$"
        ),
        list("-+0123456789."),
    ),
    (_INT, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789")),
)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` or YAML 1.1 would take for a number or another type: 1e5, 08, yes."""


for _resolver in _NUMBERS:
    _Loader.add_implicit_resolver(*_resolver)
    _Dumper.add_implicit_resolver(*_resolver)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _unique_keys(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    """Return a block of keys. Raises ConstructorError for a key that is not text or appears twice."""
    seen = set[str]()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE:
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is not text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} appears twice", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(_INT, _decimal)
_Loader.add_constructor(_MAP, _unique_keys)


def yaml_value(text: str, source: str) -> Any:
    """Return the value of a YAML text. Raises UserError that names `source`, line and fault."""
    try:
        refuse_yaml_bomb(text)
        return _unshared(yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: {error.problem or error.context}; fix the YAML there") from error
    except RecursionError as error:
        raise UserError(f"{source}: values are nested too deep; fix the YAML there") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: {one_line(error)}; fix the YAML there") from error


def _unshared(value: Any) -> Any:
    """Return a copy in which no block is in two places: an alias or a merged key gives the same object, and
    an override of one place would change the other."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def yaml_text(value: Any, *, flow: bool = False, width: float = 80) -> str:
    """Return a value as YAML that `yaml_value` reads as the same value; keys keep their order."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=width
    )
    return text


def yaml_mapping(path: Path, kind: str) -> dict[str, Any]:
    """Return the block of keys in a YAML file; an empty file has no keys.

    Raises UserError, which calls the file by `kind` ("config", "site").
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{kind} file {path} does not exist; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{kind} file {path} is a folder; name the YAML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{kind} file {path} cannot be read ({error}); give a readable YAML file") from error
    content = yaml_value(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a {kind} file is a block of keys")
    return content
