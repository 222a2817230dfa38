"""How a stage writes its output: each part under a partial name, synced, then renamed once.

Stages use it in the driver and in workers; the runner prepares the folder.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.durable_files import delete, locked, sync_folder, sync_tree
from stages.stops import LeaseLost
from vico.own_files import check_inside, move_inside, no_links

LEASE_FILE = "lease.json"
JOURNAL_FILE = "parts.journal"
"""In an attempt's folder: the parts it published and removed, in order, one line of JSON each."""
HELD_FILE = ".held.json"
"""In an attempt's folder: parts that are being uploaded to an object store. `remove` leaves them in place;
the uploader deletes them when the upload is complete."""


@dataclass(frozen=True)
class Parts:
    """The parts of one stage (`<storage>/<stage>/<fingerprint>`), written by one attempt. Can be pickled.

    A part is a file or a folder. Its name is a path relative to `output`, such as `00012.tar` or
    `checkpoints/step-00020`.
    """

    folder: Path
    attempt: int

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def storage(self) -> Path:
        return self.folder.parents[1]

    @property
    def attempt_folder(self) -> Path:
        return self.folder / "attempts" / str(self.attempt)

    def done(self, name: str) -> bool:
        """Return whether this part is complete, whichever attempt wrote it."""
        return (self.output / name).exists()

    def partial(self, name: str) -> Path:
        """Return the path to which this attempt writes the part before it publishes it, never a link.

        The parent folders exist. The path itself may be left over from an earlier try within the same
        attempt: open files with mode "w", and empty folders first.
        """
        target = self.output / name
        self._check_inside(target.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.parent / f".{target.name}.partial-{self.attempt}"
        if partial.is_symlink():
            partial.unlink()
        return partial

    def _check_inside(self, path: Path) -> None:
        """Raise UserError if a link on the way to the path leads out of the storage."""
        check_inside(path, self.storage)

    def below(self, pattern: str) -> list[Path]:
        """Return the paths in the stage's folder that match a pattern, sorted, except those reached through a
        link: they belong to others."""
        folder = os.path.realpath(self.folder)
        paths = sorted(self.folder.glob(pattern))
        return [
            path
            for path in paths
            if os.path.realpath(path.parent) == os.path.join(folder, path.parent.relative_to(self.folder))
        ]

    def publish(self, name: str, *more: str, replace: bool = False) -> Path:
        """Sync the partial file or folder, rename it to its final name and return that path.

        The parts `more` follow in order; their folder is synced once. `replace` is for files that every
        attempt writes again from the parts (plots, tables), never for parts. Raises LeaseLost if another
        attempt owns the stage, FileExistsError if the part is already published.
        """
        names = (name, *more)
        for part in names:
            sync_tree(self.partial(part))
        with locked(self.folder):
            self.check_lease()
            for part in names:
                target = self.output / part
                self._check_inside(target.parent)
                if os.path.lexists(target) and not replace:
                    raise FileExistsError(
                        f"{target} is published already; call done({part!r}) before writing it again"
                    )
                move_inside(self.partial(part), target, self.storage)
                self._append_to_journal(published=part)
        self._sync_folders(names)
        return self.output / name

    def rename(self, new_names: Mapping[str, str]) -> None:
        """Give published parts new names, which must be free, in order. Raises like `publish`."""
        with locked(self.folder):
            self.check_lease()
            for name, new_name in new_names.items():
                target = self.output / new_name
                self._check_inside(target.parent)
                self._check_inside((self.output / name).parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                if os.path.lexists(target):
                    raise FileExistsError(f"{target} is published already")
                move_inside(self.output / name, target, self.storage)
                self._append_to_journal(published=new_name)
                self._append_to_journal(removed=name)
        self._sync_folders(new_names.values())

    def _sync_folders(self, names: Iterable[str]) -> None:
        for folder in dict.fromkeys((self.output / name).parent for name in names):
            sync_folder(folder)

    def remove(self, name: str) -> None:
        """Delete a part or a folder of parts that nobody needs any more; do nothing if it does not exist."""
        path = self.output / name
        if not os.path.lexists(path):
            return
        with locked(self.folder):
            self.check_lease()
            self._check_inside(path.parent)
            if not os.path.lexists(path):  # it was being uploaded, and the driver has deleted it since
                return
            self._append_to_journal(removed=name)
            held = [part for part in self.held() if is_within(part, name)]
            if name in held:
                return
            # of a folder in which some parts are held, only the others are deleted
            paths = [path]
            if held and not path.is_symlink():
                paths = [child for child in path.iterdir() if f"{name}/{child.name}" not in held]
            hidden_paths = [self.hide(path) for path in paths]
        for hidden in hidden_paths:
            self.delete(hidden)

    def hide(self, path: Path) -> Path:
        """Rename a path before its deletion, so that a kill leaves no half part; return the new path."""
        hidden = path.with_name(f".{path.name}.partial-{self.attempt}-{secrets.token_hex(4)}")
        move_inside(path, hidden, self.storage)
        return hidden

    def delete(self, path: Path) -> None:
        """Delete a hidden file or folder of the stage; of a link the link.

        Raises UserError for one behind a link that leads out of the storage.
        """
        delete(path, self.storage)

    def held(self) -> list[str]:
        """Return the parts that are being uploaded to an object store; call it while the folder is locked."""
        try:
            return json.loads((self.attempt_folder / HELD_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []

    def _append_to_journal(self, **action: str) -> None:
        """Append what was done to a part; called while the folder is locked."""
        self._check_inside(self.attempt_folder)
        self.attempt_folder.mkdir(parents=True, exist_ok=True)
        with open(self.attempt_folder / JOURNAL_FILE, "a", encoding="utf-8", opener=no_links) as file:
            file.write(json.dumps(action) + "\n")

    def write_json(self, name: str, value: object) -> Path:
        """Write a summary as JSON, replacing the file of an earlier attempt; nan and inf raise ValueError."""
        text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
        self.partial(name).write_text(text + "\n", encoding="utf-8")
        return self.publish(name, replace=True)

    def check_lease(self) -> None:
        """Raise LeaseLost if the stage's lease names another attempt or was released."""
        try:
            lease = json.loads((self.folder / LEASE_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return  # the stage runs alone, without a runner
        if lease["attempt"] == self.attempt and not lease["released"]:
            return
        owner = f"attempt {lease['attempt']} on {lease['host']}, pid {lease['pid']}"
        raise LeaseLost(
            f"attempt {self.attempt} may no longer write to {self.folder}; the last owner is {owner}"
        )


def has_published(attempt_folder: Path) -> bool:
    """Return whether the attempt published a part, according to its journal."""
    try:
        return '"published"' in (attempt_folder / JOURNAL_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


def is_within(part: str, name: str) -> bool:
    """Return whether a part has this name or is in the folder of this name."""
    return f"{part}/".startswith(f"{name}/")
