"""Published and partial files of a stage's output, and moving them to superseded/."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.durable_files import sync_folder


def is_partial(name: str) -> bool:
    return name.startswith(".") and ".partial-" in name


def partials(output: Path) -> Iterator[Path]:
    """Files and folders of an output that were not published."""
    for parent, folders, files in os.walk(output):
        for name in [*folders, *files]:
            if is_partial(name):
                yield Path(parent, name)
        folders[:] = [name for name in folders if not is_partial(name)]


def published(output: Path) -> Iterator[str]:
    """Names of the files of an output that were published."""
    for parent, folders, files in os.walk(output):
        folders[:] = [name for name in folders if not is_partial(name)]
        for name in files:
            if not is_partial(name):
                yield os.path.relpath(os.path.join(parent, name), output)


def move_aside(folder: Path, aside: Path, names: Iterable[str], damaged: Iterable[str]) -> None:
    for name in damaged:
        target = aside / "output" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (folder / "output" / name).exists():
            os.rename(folder / "output" / name, target)
    for name in names:
        if (folder / name).exists():
            os.rename(folder / name, aside / name)
    sync_folder(folder)


def new_superseded(folder: Path) -> Path:
    number = 1
    while True:
        found = folder / "superseded" / str(number)
        try:
            found.mkdir(parents=True)
            return found
        except FileExistsError:
            number += 1
