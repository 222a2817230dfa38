"""Adopt a result that was made elsewhere instead of running its stage.

`inputs.adopt: {consistency: FOLDER}` in the pipeline file asks for it. The digest of the files enters the
stage's identity, the path of the folder does not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.outputs import NEEDED, POLICY_FOLDER
from stages.stage_config import StageConfig
from vico.errors import UserError
from vico.model_files import refuse_outside_link

if TYPE_CHECKING:
    from stages.context import Context


CODE_VERSION = 1
INPUTS: tuple[str, ...] = ()
NEEDS_RAY = False
ADOPTED_FOLDER = "folder"
"""The name under which the context gives the folder."""


class AdoptedConfig(StageConfig):
    """The adopted result, identified by its digest."""

    digest: str
    """sha256 over the names and contents of all its files."""


Config = AdoptedConfig


def run(config: AdoptedConfig, context: Context) -> dict[str, float | int | str]:
    """Copy the files into the output one by one; UserError if they changed since the plan was made."""
    folder = context.folder(ADOPTED_FOLDER)
    files = adopted_files(context.stage, folder)
    for number, (name, path) in enumerate(files.items()):
        context.check()
        if not context.parts.done(name):
            shutil.copyfile(path, context.parts.partial(name))
            context.parts.publish(name)
        context.progress(number + 1, len(files), "files")
    copied_digest = files_digest({name: context.parts.output / name for name in files}, _sha256)
    if copied_digest != config.digest:
        raise UserError(
            f"inputs.adopt.{context.stage}={folder} changed while it was copied; wait until nothing "
            f"writes to it, then run again with --force {context.stage}"
        )
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files.values())}


def adopted_files(stage: str, folder: Path) -> dict[str, Path]:
    """Return name in the output -> file, without hidden files.

    For a consistency stage a model folder is accepted too; it becomes `policy/`. Raises UserError if the
    folder does not exist, lacks a file that later stages read, or has a link to a folder, to nothing, or to a
    file outside of it.
    """
    field = f"inputs.adopt.{stage}={folder}"
    if not folder.is_dir():
        raise UserError(f"{field} is not a folder; give the output folder of a {stage} stage")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: path for name, path in files.items() if not _is_hidden(name)}
    for path in folder.rglob("*"):  # which does not look into linked folders
        if path.is_symlink() and not path.is_file() and not _is_hidden(path.relative_to(folder).as_posix()):
            raise UserError(
                f"{path} is a link to no file, and nothing below it would be adopted; copy it there"
            )
    for path in files.values():
        refuse_outside_link(path, folder)
    is_policy = stage.endswith("consistency")
    if is_policy and "config.json" in files:
        files = {f"{POLICY_FOLDER}/{name}": path for name, path in files.items()}
    missing = [name for name in NEEDED.get(stage, ()) if name not in files]
    if missing or not files:
        raise UserError(
            f"{field} has no {missing[0] if missing else 'files'}; give the output folder of a {stage} stage"
            + (" or a model folder" if is_policy else "")
        )
    return files


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def files_digest(files: Mapping[str, Path], sha256: Callable[[Path], str]) -> str:
    """Return one sha256 over the names and contents of the files."""
    content = {name: sha256(path) for name, path in files.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
