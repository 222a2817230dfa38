"""Model folders by name: a local folder as it is, a Hub id (`owner/name` or `owner/name@revision`) as its
snapshot in the cache."""

import re
from functools import cache
from pathlib import Path

from vico.errors import UserError

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?$")
# Python files belong to a checkpoint and are handed on by an export; they are never run
_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", "*.py", "README.md", "LICENSE*")


def model_folder(path: str | Path) -> Path:
    """The folder itself, or that of a Hub id, whose files are fetched where the cache lacks them. Without a
    revision it is the commit of `main` that the cache has, so that a later call does not find another model;
    else that of the Hub.

    Raises UserError for an id that the Hub does not give out and for a Hub that cannot be reached. A name
    that is no id comes back as it is: whoever opens it says what is missing.
    """
    folder = Path(path)
    hub_id = None if folder.exists() or isinstance(path, Path) else _HUB_ID.match(path)
    if hub_id is None:
        return folder
    name, revision = hub_id.groups()
    return _snapshot(name, revision or _cached_commit(name))


def pinned(path: str | Path) -> str | None:
    """A Hub id with the commit that it stands for now, `owner/name@commit`; None for what is no id. Errors of
    `model_folder`."""
    folder = model_folder(path)
    hub_id = None if folder == Path(path) else _HUB_ID.match(str(path))
    return None if hub_id is None else f"{hub_id[1]}@{folder.name}"


def _cached_commit(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else None


@cache
def _snapshot(name: str, revision: str | None) -> Path:
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
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FILES)))
    except GatedRepoError as error:
        remedy = "ask for access on its page and set HF_TOKEN"
        raise UserError(f"model={path} is gated on the Hub; {remedy}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model={path} is neither a folder here nor a model that the Hub gives out; check the name, "
            "or set HF_TOKEN for a private one"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"model={path}: the Hub has no such revision of {name}; give another") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"model={path} is no folder here and not in the Hub's cache, and the Hub cannot be reached "
            f"({type(error).__name__}); fetch it with `hf download {name}` where there is a network, and "
            "give the folder"
        ) from error
