"""How a stage writes: each part under a partial name of its attempt, synced, renamed once.

Used by the stages, in the driver and in workers; the runner prepares the folder.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.durable_files import delete, locked, sync_folder, sync_tree
from stages.stops import LeaseLost

LEASE_FILE = "lease.json"
JOURNAL_FILE = "parts.journal"
"""In an attempt's folder: which parts it published and removed, in order, a line of JSON each."""
HELD_FILE = ".held.json"
"""In an attempt's folder: parts that are being brought to an object store. One of them that is removed
meanwhile stays until it is there: whoever brings it deletes it then."""


@dataclass(frozen=True)
class Parts:
    """The parts of one stage (`<storage>/<stage>/<fingerprint>`), written by one attempt. Can be pickled.

    A name is a path relative to `output`, such as `00012.tar` or `checkpoints/step-00020`, a file or a
    folder.
    """

    folder: Path
    attempt: int

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def attempt_folder(self) -> Path:
        return self.folder / "attempts" / str(self.attempt)

    def done(self, name: str) -> bool:
        """Whether this part is complete, whichever attempt wrote it."""
        return (self.output / name).exists()

    def partial(self, name: str) -> Path:
        """Where this attempt writes the part before it is published; the parent folders are there.

        The path itself may be left over from an earlier try within the same attempt; write files with mode
        "w" and folders from empty.
        """
        target = self.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.parent / f".{target.name}.partial-{self.attempt}"

    def publish(self, name: str, *more: str, replace: bool = False) -> Path:
        """Sync the partial file or folder and rename it to its final name; returns that path. With `more`
        names these follow in order, and their folder is synced once.

        Raises LeaseLost when another attempt owns the stage, FileExistsError when the part is there already.
        `replace` is for files that are drawn again from the parts on every attempt (figures, tables), never
        for parts.
        """
        names = (name, *more)
        for one in names:
            sync_tree(self.partial(one))
        with locked(self.folder):
            self.check_lease()
            for one in names:
                if (self.output / one).exists() and not replace:
                    raise FileExistsError(
                        f"{self.output / one} is published already; ask done({one!r}) before writing it again"
                    )
                os.replace(self.partial(one), self.output / one)
                self._note(published=one)
        self._sync_folders(names)
        return self.output / name

    def rename(self, new_names: Mapping[str, str]) -> None:
        """Give published parts other names that are free, in order; raises as `publish` does."""
        with locked(self.folder):
            self.check_lease()
            for name, new_name in new_names.items():
                target = self.output / new_name
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    raise FileExistsError(f"{target} is published already")
                os.replace(self.output / name, target)
                self._note(published=new_name)
                self._note(removed=name)
        self._sync_folders(new_names.values())

    def _sync_folders(self, names: Iterable[str]) -> None:
        for folder in dict.fromkeys((self.output / name).parent for name in names):
            sync_folder(folder)

    def remove(self, name: str) -> None:
        """Drop a part, or a folder of parts, that nobody needs any more; quietly if it is not there."""
        path = self.output / name
        if not path.exists():
            return
        with locked(self.folder):
            self.check_lease()
            if not path.exists():  # it was held, and the driver has let it go meanwhile
                return
            self._note(removed=name)
            held = [part for part in self.held() if is_within(part, name)]
            if name in held:
                return
            # a folder of parts of which some are held goes but for those
            going = [one for one in path.iterdir() if f"{name}/{one.name}" not in held] if held else [path]
            gone = [self.out_of_sight(one) for one in going]
        for one in gone:
            delete(one)

    def out_of_sight(self, path: Path) -> Path:
        """Rename what is to be deleted to a partial name: a kill while it is deleted leaves no half part."""
        hidden = path.with_name(f".{path.name}.partial-{self.attempt}-{secrets.token_hex(4)}")
        return path.rename(hidden)

    def held(self) -> list[str]:
        """Parts that are being brought to an object store; asked while the folder is locked."""
        try:
            return json.loads((self.attempt_folder / HELD_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []

    def _note(self, **what: str) -> None:
        """Enter into the journal what is done; called while the folder is locked."""
        self.attempt_folder.mkdir(parents=True, exist_ok=True)
        with (self.attempt_folder / JOURNAL_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")

    def write_json(self, name: str, value: Any) -> Path:
        """Write a summary as JSON, replacing that of an earlier attempt; nan and inf raise ValueError."""
        text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
        self.partial(name).write_text(text + "\n", encoding="utf-8")
        return self.publish(name, replace=True)

    def check_lease(self) -> None:
        """Raise LeaseLost when the stage's lease names another attempt or was given back."""
        try:
            lease = json.loads((self.folder / LEASE_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return  # a stage run by itself, without a runner
        if lease["attempt"] == self.attempt and not lease["released"]:
            return
        owner = f"attempt {lease['attempt']} on {lease['host']}, pid {lease['pid']}"
        raise LeaseLost(
            f"attempt {self.attempt} may no longer write to {self.folder}; the last owner is {owner}"
        )


def has_published(attempt_folder: Path) -> bool:
    """Whether the attempt published a part, by its journal."""
    try:
        return '"published"' in (attempt_folder / JOURNAL_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


def is_within(part: str, name: str) -> bool:
    """Whether a part has this name or lies in a folder of it."""
    return f"{part}/".startswith(f"{name}/")
