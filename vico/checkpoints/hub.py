"""Find model folders by name: a local folder as it is, a Hub id as its snapshot in the cache.

A Hub id is `owner/name` or `owner/name@revision`.
"""

import re
from functools import cache
from pathlib import Path

from vico.errors import UserError

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?$")
# Python files are part of a checkpoint, and an export copies them; they are never run.
_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", "*.py", "README.md", "LICENSE*")


def model_folder(path: str | Path) -> Path:
    """Return the folder itself, or the snapshot of a Hub id; files missing in the cache are fetched.

    Without a revision, the commit of `main` in the cache is used, so that later calls find the same model;
    without one in the cache, the Hub's. A name that is not a Hub id is returned as it is: whoever opens it
    reports what is missing. So is a path in a folder that is here. Raises UserError if the Hub refuses the id
    or cannot be reached.
    """
    hub_id = _hub_id(path)
    if hub_id is None:
        return Path(path)
    name, revision = hub_id.groups()
    return _snapshot(name, revision or _cached_commit(name))


def config_folder(path: str | Path) -> Path:
    """Return the folder itself, or a snapshot of a Hub id with its JSON files alone, without weights.

    Raises as `model_folder` does.
    """
    hub_id = _hub_id(path)
    if hub_id is None:
        return Path(path)
    name, revision = hub_id.groups()
    return _snapshot(name, revision or _cached_commit(name), ("*.json",))


def folder_here(path: str | Path) -> Path:
    """Return the folder itself, or the snapshot of a Hub id as far as it is in the cache; never asks the Hub.

    It may lack weights or not exist.
    """
    folder = Path(path)
    hub_id = None if folder.exists() else _HUB_ID.match(str(path))
    if hub_id is None:
        return folder
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id[1], "config.json", revision=hub_id[2])
    return Path(config).parent if isinstance(config, str) else folder


def hub_name(path: str | Path) -> str | None:
    """Return `owner/name` of a Hub id that is not a folder here; None for anything else."""
    hub_id = _hub_id(str(path))
    return None if hub_id is None else hub_id[1]


def _hub_id(path: str | Path) -> re.Match[str] | None:
    """Return the parts of a Hub id; None for a Path, a path that exists, and a name without a revision in a
    folder that exists: it is a mistyped path."""
    if isinstance(path, Path) or Path(path).exists():
        return None
    hub_id = _HUB_ID.match(path)
    return None if hub_id and not hub_id[2] and Path(path).parent.exists() else hub_id


def pinned_hub_id(path: str | Path) -> str | None:
    """Return a Hub id with its current commit, `owner/name@commit`; None for anything else.

    Raises as `model_folder` does.
    """
    folder = model_folder(path)
    hub_id = None if folder == Path(path) else _HUB_ID.match(str(path))
    return None if hub_id is None else f"{hub_id[1]}@{folder.name}"


def _cached_commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None


@cache
def _snapshot(name: str, revision: str | None, files: tuple[str, ...] = _FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    path = name if revision is None else f"{name}@{revision}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        remedy = "ask for access on its page and set HF_TOKEN"
        raise UserError(f"model={path} is gated on the Hub; {remedy}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model={path} is neither a local folder nor a model on the Hub; check the name, or set HF_TOKEN "
            "for a private one"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model={path}: the Hub has no such revision of {name}; give another") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"model={path} is neither a local folder nor in the Hub's cache, and the Hub cannot be reached "
            f"({type(error).__name__}); fetch it with `hf download {name}` on a machine with network access, "
            "and give the folder"
        ) from error
