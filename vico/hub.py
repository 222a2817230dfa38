"""Model folders by name: a local folder as it is, a Hub id (`owner/name`) as its snapshot in the cache."""

import re
from pathlib import Path

from vico.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
# Python files belong to a checkpoint and are handed on by an export; they are never run
_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors", "*.py", "README.md", "LICENSE*")


def model_folder(path: str | Path) -> Path:
    """The folder itself, or that of a Hub id, fetched where the cache lacks it.

    Raises UserError for an id that the Hub does not give out and for a Hub that cannot be reached. A name
    that is no id comes back as it is: whoever opens it says what is missing.
    """
    folder = Path(path)
    if folder.exists() or isinstance(path, Path) or not _HUB_ID.match(path):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(path, allow_patterns=list(_FILES)))
    except GatedRepoError as error:
        remedy = "ask for access on its page and set HF_TOKEN"
        raise UserError(f"model={path} is gated on the Hub; {remedy}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"model={path} is neither a folder here nor a model that the Hub gives out; check the name, "
            "or set HF_TOKEN for a private one"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"model={path} is no folder here and not in the Hub's cache, and the Hub cannot be reached "
            f"({type(error).__name__}); fetch it with `hf download {path}` where there is a network, and "
            "give the folder"
        ) from error
