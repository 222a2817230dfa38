"""Published and partial files of a stage's output, and moving results to superseded/."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.durable_files import delete, sync_folder
from vico.own_files import check_inside, move_inside


def is_partial(name: str) -> bool:
    return name.startswith(".") and ".partial-" in name


def partials(output: Path) -> Iterator[Path]:
    """Yield the files and folders of an output that were not published."""
    for parent, folders, files in os.walk(output):
        for name in [*folders, *files]:
            if is_partial(name):
                yield Path(parent, name)
        folders[:] = [name for name in folders if not is_partial(name)]


def remove_partials(output: Path) -> None:
    """Delete what earlier attempts left half-written."""
    for path in list(partials(output)):
        delete(path, output.parents[2])


def published(output: Path) -> Iterator[str]:
    """Yield the names of the published files of an output, folders within it included.

    A link to a file is one; a link to a folder or to nothing, a FIFO or a device is not.
    """
    for parent, folders, files in os.walk(output):
        folders[:] = [name for name in folders if not is_partial(name)]
        for name in files:
            path = os.path.join(parent, name)
            if not is_partial(name) and os.path.isfile(path):
                yield os.path.relpath(path, output)


def move_to_superseded(folder: Path, superseded: Path, names: Iterable[str], damaged: Iterable[str]) -> None:
    """Move the `damaged` files of a stage's output, then the files and folders `names` of the stage."""
    storage = folder.parents[1]
    for name in damaged:
        check_inside((folder / "output" / name).parent, storage)
        target = superseded / "output" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(folder / "output" / name):
            move_inside(folder / "output" / name, target, storage)
    for name in names:
        if os.path.lexists(folder / name):
            move_inside(folder / name, superseded / name, storage)
    sync_folder(folder)


def new_superseded_folder(folder: Path) -> Path:
    """Create superseded/<n> with the next free number."""
    check_inside(folder / "superseded", folder.parents[1])
    number = 1
    while True:
        superseded = folder / "superseded" / str(number)
        try:
            superseded.mkdir(parents=True)
            return superseded
        except FileExistsError:
            number += 1
