"""A stage's result that was made elsewhere, taken into the store by digest in place of running the stage.

`inputs.adopt: {consistency: FOLDER}` in the pipeline file asks for it. The digest of the files enters the
identity, where the folder lies does not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stages.outputs import NEEDED
from stages.stage_config import StageConfig
from vico.errors import UserError

if TYPE_CHECKING:
    from stages.context import Context


CODE_VERSION = 1
INPUTS = ()
NEEDS_RAY = False
FOLDER = "folder"
"""The name under which the context gives the folder."""
POLICY = "policy"


class AdoptedConfig(StageConfig):
    """The result by its digest: of names and contents of all files."""

    digest: str


Config = AdoptedConfig


def run(config: AdoptedConfig, context: Context) -> dict[str, float | int | str]:
    """Copies the files into the output one by one; UserError when they changed since the plan was made."""
    files = adopted_files(context.stage, context.inputs[FOLDER])
    for number, (name, path) in enumerate(files.items()):
        context.check()
        if not context.parts.done(name):
            shutil.copyfile(path, context.parts.partial(name))
            context.parts.publish(name)
        context.progress(number + 1, len(files), "files")
    made = files_digest({name: context.parts.output / name for name in files}, _sha256)
    if made != config.digest:
        raise UserError(
            f"inputs.adopt.{context.stage}={context.inputs[FOLDER]} changed while it was copied; run again "
            f"with --force {context.stage} when it is at rest"
        )
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files.values())}


def adopted_files(stage: str, folder: Path) -> dict[str, Path]:
    """Name in the output -> file, hidden ones left out. A model folder is taken for the consistency stage's
    `policy/`.

    Raises UserError when the folder is not there or lacks what later stages read.
    """
    field = f"inputs.adopt.{stage}={folder}"
    if not folder.is_dir():
        raise UserError(f"{field} is no folder; give the output folder of a {stage} stage")
    found = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    found = {
        name: path for name, path in found.items() if not any(part[0] == "." for part in name.split("/"))
    }
    if stage == "consistency" and "config.json" in found:
        found = {f"{POLICY}/{name}": path for name, path in found.items()}
    missing = [name for name in NEEDED.get(stage, ()) if name not in found]
    if missing or not found:
        raise UserError(
            f"{field} has no {missing[0] if missing else 'files'}; give the output folder of a {stage} stage"
            + (" or a model folder" if stage == "consistency" else "")
        )
    return found


def files_digest(files: dict[str, Path], sha256: Callable[[Path], str]) -> str:
    """One digest over names and contents."""
    content = {name: sha256(path) for name, path in files.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
