"""`vico gc`: what no run of a storage needs, and its removal.

A run is kept as long as its folder is there. It needs the folder of each of its stages, what those were made
from, and its record where a later run set that aside.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.results.run_results import record_of
from pipeline.results.runs import RUN_FILE, RunFile, Runs
from pipeline.results.stage_folder import RECORD_FILE, Record
from pipeline.storage.lease import Leases
from pipeline.storage.lookup import storage_of
from pipeline.storage.output_files import partials
from stages.durable_files import locked
from vico.errors import UserError

TRASH = ".gc-"
_STOP_IT = "nothing is removed while it works: stop it, or try again when it has ended"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
Kind = Literal["run", "stage", "superseded", "partial", "object", "trash"]


@dataclass(frozen=True)
class Garbage:
    """Something that nobody needs, and why."""

    kind: Kind
    path: Path | str
    why: str
    bytes: int

    def as_json(self) -> dict[str, Any]:
        place = storage_of(self.path).place(self.path) if isinstance(self.path, Path) else self.path
        return {"kind": self.kind, "path": place, "why": self.why, "bytes": self.bytes}


def collect(storage: Path, drop: Iterable[str] = (), *, dry_run: bool) -> list[Garbage]:
    """What is garbage once the runs in `drop` are given up; unless `dry_run`, it is gone when this returns.

    Raises LeaseHeld while a driver works in the storage, UserError when a run cannot be read, since what it
    needs is not known then.
    """
    if not storage.is_dir():
        return []
    runs = Runs(storage)
    leases = Leases(runs.storage)
    gone = leases.refuse_living(_folders(storage), _STOP_IT)
    if dry_run:
        return list(_garbage(storage, runs, drop))
    with runs.choosing():  # no command finds or makes its run meanwhile
        leases.refuse_holders(_folders(storage), gone, _STOP_IT)
        found = list(_garbage(storage, runs, drop))
        trash = storage / f"{TRASH}{os.getpid()}"
        for number, one in enumerate(found):
            _move(one, trash / str(number))
    for folder in storage.glob(f"{TRASH}*"):
        shutil.rmtree(folder)
    return found


def _folders(storage: Path) -> list[Path]:
    return [*_run_folders(storage), *_stage_folders(storage)]


def _move(one: Garbage, target: Path) -> None:
    """A rename takes it out of sight at once; what a kill leaves in the trash is garbage of the next time."""
    if one.kind == "trash":
        return
    with ExitStack() as stack:
        if one.kind in ("partial", "superseded"):
            stack.enter_context(locked(_stage_folder(one.path)))
        storage_of(target).remove(one.path, target)


def _stage_folder(path: Path) -> Path:
    return next(parent for parent in path.parents if _FINGERPRINT.fullmatch(parent.name))


def _garbage(storage: Path, runs: Runs, drop: Iterable[str]) -> Iterator[Garbage]:
    dropped = {runs.named(name).run for name in drop}
    kept = [run for run in runs.all() if run.run not in dropped]
    for path in sorted(storage.glob(f"{TRASH}*")):
        yield _found("trash", path, "left by a gc that was killed")
    for folder in _run_folders(storage):
        if folder.name in dropped:
            yield _found("run", folder, "dropped")
        elif not (folder / RUN_FILE).exists():
            yield _found("run", folder, f"has no {RUN_FILE}: killed before anything began")
    needed = _needed(storage, kept)
    asides = _needed_asides(storage, kept)
    given_up = []
    for folder in _stage_folders(storage):
        if folder not in needed:
            yield _found("stage", folder, "no run has this fingerprint")
            continue
        for one in _garbage_within(folder, asides.get(folder, set())):
            given_up += [one.path] if one.kind == "superseded" else []
            yield one
    for address, num_bytes in storage_of(storage).garbage(needed, given_up).items():
        yield Garbage("object", address, "no stage names this part", num_bytes)


def _garbage_within(folder: Path, asides: set[Path] | None) -> Iterator[Garbage]:
    """What a folder that is needed does not need. `asides`: those that are; None for all of them."""
    for path in sorted(folder.glob("superseded/*")):
        if asides is not None and path not in asides:
            yield _found("superseded", path, "set aside, and no run's record is in it")
    for path in [*sorted(partials(folder / "output")), *sorted(folder.glob(".*.tmp"))]:
        yield _found("partial", path, "half written by a process that is gone")


def _needed(storage: Path, kept: list[RunFile]) -> set[Path]:
    """The stage folders of these runs, and of all that the records in them were made from."""
    pending = [(name, entry.fingerprint) for run in kept for name, entry in run.stages.items()]
    found: set[Path] = set()
    while pending:
        stage, fingerprint = pending.pop()
        folder = storage / stage / fingerprint
        if folder in found:
            continue
        found.add(folder)
        for path in [folder / RECORD_FILE, *folder.glob(f"superseded/*/{RECORD_FILE}")]:
            try:
                record = Record.read(path, "")
            except UserError:
                continue  # its run's other stages are needed by their own entries
            if record is not None:
                pending += record.identity.get("inputs", {}).items()
    return found


def _needed_asides(storage: Path, kept: list[RunFile]) -> dict[Path, set[Path] | None]:
    """stage folder -> its superseded folders that hold the record of a run; None where that is not known."""
    found: dict[Path, set[Path] | None] = {}
    for run in kept:
        for stage, entry in run.stages.items():
            folder = storage / stage / entry.fingerprint
            known = found.setdefault(folder, set())
            try:
                record = record_of(run, stage, storage)
            except UserError:
                found[folder] = None  # the record that stands is damaged: what was set aside may be wanted
                continue
            if known is not None and record is not None and record.is_superseded:
                known.add(record.folder)
    return found


def _run_folders(storage: Path) -> list[Path]:
    return sorted(path for path in storage.glob("runs/*") if path.is_dir())


def _stage_folders(storage: Path) -> list[Path]:
    """Folders that are named like a stage's; whatever else lies in the storage is not ours to remove."""
    return sorted(
        path
        for path in storage.glob("*/*")
        if _FINGERPRINT.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    )


def _found(kind: Kind, path: Path, why: str) -> Garbage:
    return Garbage(kind, path, why, storage_of(path).size(path))
