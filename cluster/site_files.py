"""Find a site file by path or name, read it and check it. Called by the command line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cluster.project import STARTER_FOLDER
from cluster.settings.blocks import SiteBlock
from cluster.settings.yaml_files import yaml_mapping
from cluster.site import Site
from cluster.sqlite_uris import sqlite_path, sqlite_uri
from vico.errors import UserError, one_line

SITES_FOLDER = STARTER_FOLDER / "sites"
_MOST_PROBLEMS = 50


def load_site(site: str | Path | None = None, *, storage: str | Path | None = None) -> Site:
    """Return the site of a file, or of a name `sites/NAME.yaml`; None is `local`. `storage` overrides the
    file's.

    All paths of the result are absolute; relative ones are taken from the working directory.
    Raises UserError if the file is missing, and one with a line per fault if it is wrong.
    """
    path = site_path(site)
    settings = {} if path is None else yaml_mapping(path, "site")
    if storage is not None:
        settings["storage"] = str(storage)
    try:
        loaded = Site.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in problems(error))) from error
    return _with_absolute_paths(loaded)


def _with_absolute_paths(site: Site) -> Site:
    """Return the site with paths that mean the same in a job, whose working directory is another one."""
    tracking, hook = site.tracking, site.hook
    database = None if tracking.uri is None else sqlite_path(tracking.uri)
    if tracking.uri is not None and database is not None and not database.is_absolute():
        start, _, options = tracking.uri.partition("?")
        scheme = start.partition(":")[0]
        uri = sqlite_uri(_absolute(database)).replace("sqlite", scheme, 1)
        tracking = tracking.model_copy(update={"uri": uri + (f"?{options}" if options else "")})
    has_database = tracking.uri is None or database is not None
    if tracking.artifacts is not None and has_database and "://" not in tracking.artifacts:
        tracking = tracking.model_copy(update={"artifacts": str(_absolute(Path(tracking.artifacts)))})
    if hook.command and os.sep in hook.command[0]:
        program = str(_absolute(Path(hook.command[0])))
        hook = hook.model_copy(update={"command": [program, *hook.command[1:]]})
    changes: dict[str, Any] = {"storage": _absolute(site.storage), "tracking": tracking, "hook": hook}
    if site.work is not None:
        changes["work"] = _absolute(site.work)
    return site.model_copy(update=changes)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))


def site_path(site: str | Path | None) -> Path | None:
    """Return the file of a site; None if `local` has no file, as in an installed package."""
    name = "local" if site is None else str(site)
    remedy = f"give a site file, or one of these names: {', '.join(site_names())}"
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        if not Path(name).is_file():
            raise UserError(f"--site {name}: there is no such file; {remedy}")
        return Path(name)
    for folder in (Path("sites"), SITES_FOLDER):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    if name == "local":
        return None
    raise UserError(f"--site {name}: there is no sites/{name}.yaml; {remedy}")


def site_names() -> list[str]:
    """Return the names of all sites in `sites/` of the working directory and of the project."""
    names = {path.stem for folder in (Path("sites"), SITES_FOLDER) for path in folder.glob("*.yaml")}
    return sorted(names | {"local"})


def problems(error: ValidationError) -> list[str]:
    """Return the problems of a site, one line each: field, value, remedy."""
    lines = [_problem(problem) for problem in error.errors()[:_MOST_PROBLEMS]]
    return list(dict.fromkeys(lines))


def _problem(problem: ErrorDetails) -> str:
    location = tuple(str(part) for part in problem["loc"])
    field = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"{field} is not a field of a site; {_known_name(location)}"
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{field} is missing; add it to the site file"
    if problem["type"] == "string_type" and isinstance(problem["input"], int | float | date):
        shown = "" if field.startswith("environment.") else f"={problem['input']}"  # may be a secret
        return f"{field}{shown} is not a text in YAML; put it in quotes"
    shown = one_line(repr(problem["input"]), max_chars=60)
    if problem["type"] in ("path_type", "path_str"):
        return f"{field}={shown} is not a path; write a text such as /shared/folder"
    message = problem["msg"].partition(" or instance of ")[0]
    message = message[:1].lower() + message[1:]
    return f"{field}={shown}: {message}; change it in the site file"


def _known_name(location: tuple[str, ...]) -> str:
    """Return what a user may have meant by an unknown field: the same name in a block below, a similar name
    in the same block, or else all names of that block."""
    *parents, name = location
    block = _block_at(parents)
    for path in _field_paths(block):
        if path[-1] == name:
            return f"did you mean {'.'.join((*parents, *path))}?"
    similar = difflib.get_close_matches(name, block.model_fields, n=1)
    if not similar:
        stages = "" if parents else "; keys of stages belong in the pipeline file"
        return f"known here: {', '.join(block.model_fields)}{stages}"
    inner = _blocks(block).get(similar[0])
    fields = f" (with {', '.join(inner.model_fields)})" if inner and parents else ""
    return f"did you mean {similar[0]}{fields}?"


def _block_at(parents: Sequence[str]) -> type[SiteBlock]:
    """Return the block in which a field is, by the names above it; an entry of a list or of a block of names
    (`nodes.0`, `resources.stages.shard`) has a name more."""
    block: type[SiteBlock] = Site
    names = iter(parents)
    for name in names:
        kind = block.model_fields[name].annotation
        inner = [
            part for part in (kind, *get_args(kind)) if isinstance(part, type) and issubclass(part, SiteBlock)
        ]
        if not inner:
            break
        block = inner[0]
        if get_origin(kind) in (list, dict):
            next(names, None)
    return block


def _blocks(block: type[SiteBlock]) -> dict[str, type[SiteBlock]]:
    """Return the blocks among the fields of a block."""
    types = {name: field.annotation for name, field in block.model_fields.items()}
    return {
        name: kind for name, kind in types.items() if isinstance(kind, type) and issubclass(kind, SiteBlock)
    }


def _field_paths(block: type[SiteBlock]) -> Iterator[tuple[str, ...]]:
    """Yield the path of every field of the blocks in a block."""
    for name, inner in _blocks(block).items():
        for field in inner.model_fields:
            yield (name, field)
        for path in _field_paths(inner):
            yield (name, *path)
