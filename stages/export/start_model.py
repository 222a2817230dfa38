"""The model that a pipeline starts from, as its export names it: name, digest of its weights, licence."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

_LICENCE = re.compile(r"^license:[ \t]*(\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class StartModel:
    """Name of the model folder, sha256 over its weight files in their order, and its licence."""

    name: str
    weights_sha256: str
    licence: str


def start_model(folder: Path) -> StartModel:
    """Read the weights and the model card of a model folder."""
    from vico.model_files import weight_files

    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return StartModel(folder.resolve().name, digest.hexdigest(), stated_licence(folder))


def stated_licence(folder: Path) -> str:
    """Return the licence in the front matter of a model folder's README.md."""
    card = folder / "README.md"
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2) if card.is_file() else []
    match = _LICENCE.search(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return match[1].strip() if match else "not stated in its folder"
