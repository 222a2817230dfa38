"""Site files by path or name, read and checked; what is wrong in one line. Called by the command line."""

from __future__ import annotations

import difflib
import os
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.site import Site
from vico.errors import UserError

SITES_FOLDER = Path(__file__).resolve().parent.parent / "sites"


def load_site(site: str | Path | None = None, *, storage: str | Path | None = None) -> Site:
    """The site of a file, or of a name `sites/NAME.yaml`; None is `local`. `storage` overrides the file's.

    The `storage` of the result is absolute; a relative one is taken from the working directory.
    Raises UserError for a file that is missing or wrong.
    """
    path = site_path(site)
    settings = {} if path is None else site_settings(path)
    if storage is not None:
        settings["storage"] = str(storage)
    try:
        loaded = Site.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from error
    absolute = Path(os.path.abspath(loaded.storage.expanduser()))
    return loaded.model_copy(update={"storage": absolute})


def site_path(site: str | Path | None) -> Path | None:
    """The file of a site; None where `local` has no file, which is so for an installed package."""
    name = "local" if site is None else str(site)
    remedy = f"give a site file, or a name among: {', '.join(known_sites())}"
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


def known_sites() -> list[str]:
    names = {path.stem for folder in (Path("sites"), SITES_FOLDER) for path in folder.glob("*.yaml")}
    return sorted(names | {"local"})


def site_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a readable YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())}); mend that line") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        found = type(settings).__name__
        raise UserError(f"{path}: holds a {found}; a site file holds fields such as `storage: ./runs`")
    return settings


def first_problem(error: ValidationError) -> str:
    """The first problem of a site in one line: field, value, remedy."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = known_fields(problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{field} is not a field of a site; {remedy}"
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{field}={problem['input']!r}: {message}; change it in the site file"


def known_fields(location: tuple[int | str, ...]) -> list[str]:
    """The fields of the part of a site that stands at `location`."""
    part: Any = Site
    for name in location:
        part = typing.get_type_hints(part)[str(name)]
    return list(part.model_fields)
