"""Short paths to results: `<storage>/runs/<run>/model` of a run, `<storage>/latest/model` of the newest."""

import logging
import os
from pathlib import Path

from pipeline.results.quality import EVALUATED_STAGE, EXPORTED_STAGE
from pipeline.results.run_results import record_of
from pipeline.results.runs import RunFile, Runs
from stages.outputs import MODEL_FOLDER

logger = logging.getLogger(__name__)
LATEST = "latest"
"""The link in the storage to the folder of the run that finished last."""
EVALUATION = "evaluation"


def link_results(run: RunFile, storage: Path) -> None:
    """Link the run's model and evaluation from its folder, and its folder from `latest`.

    The links are relative, so that a storage can be moved. A file system without links keeps none; then
    `model_path` gives the long path.
    """
    folder = Runs(storage).run_folder(run.run)
    targets = {folder / MODEL_FOLDER: _output(run, EXPORTED_STAGE, storage, MODEL_FOLDER)}
    targets[folder / EVALUATION] = _output(run, EVALUATED_STAGE, storage, "")
    try:
        for link, target in targets.items():
            if target is not None:
                _link(link, target)
        _link(storage / LATEST, folder)
    except OSError as error:
        logger.warning("no short paths in %s: %s", storage, error)


def model_path(run: RunFile, storage: Path) -> Path | None:
    """Return the shortest path of the run's exported model; None if it has none on this machine."""
    target = _output(run, EXPORTED_STAGE, storage, MODEL_FOLDER)
    if target is None:
        return None
    own = Runs(storage).run_folder(run.run) / MODEL_FOLDER
    for path in (storage / LATEST / MODEL_FOLDER, own):
        if path.is_dir() and path.samefile(target):
            return path
    return target


def shown_path(path: Path) -> str:
    """Return a path as a user in the working folder would type it."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def _output(run: RunFile, stage: str, storage: Path, name: str) -> Path | None:
    if stage not in run.stages or run.stages[stage].state != "done":
        return None
    result = record_of(run, stage, storage)
    path = None if result is None else result.output / name
    return path if path is not None and path.is_dir() else None


def _link(link: Path, target: Path) -> None:
    """Point a link at a folder, at once; raise FileExistsError if something else has its name."""
    relative = os.path.relpath(target, link.parent)
    if link.is_symlink() and os.readlink(link) == relative:
        return
    if link.exists() and not link.is_symlink():
        raise FileExistsError(f"{link} is not a link")
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(relative, target_is_directory=True)
    os.replace(new, link)
