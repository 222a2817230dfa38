"""`vico gc`: find what no run of a storage needs, and remove it.

A run is kept as long as its folder exists. It needs the folders of its stages and of everything that those
were made from, and its record if a later run moved that to superseded/.
"""

import errno
import logging
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.launchers.shared_folder import MARKER
from pipeline.results.records import RECORD_FILE, Record
from pipeline.results.run_results import record_of
from pipeline.results.runs import RUN_FILE, RunFile, Runs
from pipeline.storage.folder import UPLOAD_MARK, FolderStorage
from pipeline.storage.leases import STALE_S, Leases
from pipeline.storage.lookup import storage_of
from pipeline.storage.output_files import partials
from stages.durable_files import delete, locked
from stages.parts import Parts
from vico.errors import UserError
from vico.own_files import check_inside

logger = logging.getLogger(__name__)
TRASH = ".gc-"
_STOP_IT = "nothing is removed while it works: stop it, or try again when it has ended"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
Kind = Literal["run", "stage", "superseded", "partial", "job", "object", "trash"]


@dataclass(frozen=True)
class Garbage:
    """Something that no run needs, and why. `path` is an address (str) for objects of an object store."""

    kind: Kind
    path: Path | str
    why: str
    bytes: int

    def as_json(self) -> dict[str, Any]:
        address = storage_of(self.path).address(self.path) if isinstance(self.path, Path) else self.path
        return {"kind": self.kind, "path": address, "why": self.why, "bytes": self.bytes}


def collect_garbage(
    storage: Path, drop: Iterable[str] = (), *, dry_run: bool, stale_s: float = STALE_S
) -> list[Garbage]:
    """Return what no run needs, and remove it unless `dry_run`. Runs in `drop` are removed too.

    Raises LeaseHeld while a driver works in the storage (one that this machine cannot see counts as gone if
    it did not renew its lease for `stale_s` seconds), and UserError if a run cannot be read: then what it
    needs is unknown.
    """
    if not storage.is_dir():
        return []
    runs = Runs(storage)
    check_inside(runs.folder, storage)
    leases = Leases(runs.storage, stale_s=stale_s)
    stale_tokens = leases.refuse_live_holders(_folders(storage), _STOP_IT)
    if dry_run:
        return list(_all_garbage(storage, runs, drop))
    with runs.locked():  # meanwhile no command looks for its run, creates it or begins to work on it
        # A working copy may be minutes old: what it shows as unneeded, a run that has ended since may need.
        runs.storage.refresh()
        leases.refuse_new_holders(_folders(storage), stale_tokens, _STOP_IT)
        leases.revoke(stale_tokens, _STOP_IT)
        all_garbage = list(_all_garbage(storage, runs, drop))
        trash = _new_trash(storage)
        for number, garbage in enumerate(all_garbage):
            _remove(garbage, None if trash is None else trash / str(number), runs.storage)
    # Deleting may take longer than a command waits for the lock, also what a killed gc has left.
    left = [garbage.path for garbage in all_garbage if garbage.kind == "trash"]
    for path in [*left, *([] if trash is None else [trash])]:
        delete(Path(path), storage)
    return all_garbage


def _new_trash(storage: Path) -> Path | None:
    """Return a new folder for what is removed, or None if the file system is too full for one."""
    trash = storage / f"{TRASH}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        trash.mkdir()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return None
    return trash


def _folders(storage: Path) -> list[Path]:
    folders = [*_run_folders(storage), *_stage_folders(storage)]
    return [folder for folder in folders if not folder.is_symlink()]


def _remove(garbage: Garbage, target: Path | None, storage: FolderStorage) -> None:
    """Rename it to `target`, so that it is gone at once; if a kill leaves it there, the next gc removes it.

    Without a target it is deleted in place, its record first.
    """
    if garbage.kind == "trash":
        return
    with ExitStack() as stack:
        if isinstance(garbage.path, Path) and garbage.kind in ("partial", "superseded"):
            stack.enter_context(locked(_stage_folder(garbage.path)))
        storage.remove(garbage.path, target)


def _stage_folder(path: Path) -> Path:
    return next(parent for parent in path.parents if _FINGERPRINT.fullmatch(parent.name))


def _all_garbage(storage: Path, runs: Runs, drop: Iterable[str]) -> Iterator[Garbage]:
    dropped = {runs.named(name).run for name in drop}
    kept = [run for run in runs.all() if run.run not in dropped]
    for path in sorted(storage.glob(f"{TRASH}*")):
        yield _garbage("trash", path, "left by a gc that was killed")
    for folder in _run_folders(storage):
        if folder.name in dropped:
            yield _garbage("run", folder, "dropped")
        elif not (folder / RUN_FILE).exists():
            yield _garbage("run", folder, f"has no {RUN_FILE}: killed before anything began")
    needed = _needed_folders(storage, kept)
    needed_superseded = _needed_superseded(storage, kept)
    unneeded: list[Path] = []
    for folder in _stage_folders(storage):
        if folder not in needed:
            yield _garbage("stage", folder, "no run has this fingerprint")
            continue
        if folder.is_symlink():
            continue
        superseded = _unneeded_superseded(folder, needed_superseded.get(folder, set()))
        unneeded += superseded
        for path in superseded:
            yield _garbage("superseded", path, "replaced by a later result, and no run's record is in it")
        output = folder / "output"
        half_written = [] if output.is_symlink() else sorted(partials(output))
        for path in [*half_written, *sorted(folder.glob(".*.tmp"))]:
            yield _garbage("partial", path, "half-written by a process that is gone")
    for folder in sorted(storage.glob("jobs/vico-*")):
        if not _is_needed_job(folder, kept):
            yield _garbage("job", folder, "its run is gone, or it was a check of the site")
    for address, num_bytes in storage_of(storage).garbage(needed, unneeded).items():
        why = "its upload was never finished" if UPLOAD_MARK in address else "no stage names this part"
        yield Garbage("object", address, why, num_bytes)


def _unneeded_superseded(folder: Path, needed: set[Path] | None) -> list[Path]:
    """Return the superseded results of a stage's folder that are not in `needed`; None means all are."""
    if needed is None:
        return []
    return [path for path in Parts(folder, 0).below("superseded/*") if path not in needed]


def _needed_folders(storage: Path, kept: list[RunFile]) -> set[Path]:
    """Return the stage folders of these runs, and of everything that the records in them were made from."""
    pending = [(name, entry.fingerprint) for run in kept for name, entry in run.stages.items()]
    needed: set[Path] = set()
    while pending:
        stage, fingerprint = pending.pop()
        folder = storage / stage / fingerprint
        if folder in needed:
            continue
        needed.add(folder)
        for path in [folder / RECORD_FILE, *folder.glob(f"superseded/*/{RECORD_FILE}")]:
            try:
                record = Record.read(path, "")
            except UserError:
                continue  # its run's other stages are needed by their own entries
            if record is not None:
                pending += record.identity.get("inputs", {}).items()
    return needed


def _needed_superseded(storage: Path, kept: list[RunFile]) -> dict[Path, set[Path] | None]:
    """Return stage folder -> its superseded/<n> with the record of a run; None if that is unknown."""
    needed: dict[Path, set[Path] | None] = {}
    for run in kept:
        for stage, entry in run.stages.items():
            folder = storage / stage / entry.fingerprint
            superseded = needed.setdefault(folder, set())
            try:
                record = record_of(run, stage, storage)
            except UserError:
                needed[folder] = None  # the current record is damaged: any superseded one may be wanted
                continue
            if superseded is not None and record is not None and record.is_superseded:
                superseded.add(record.folder)
    return needed


def _is_needed_job(folder: Path, kept: list[RunFile]) -> bool:
    """Return whether a job belongs to a run, or is a check of the site that has not ended."""
    is_check = folder.name.startswith("vico-check-") and not (folder / MARKER).exists()
    return is_check or any(folder.name.startswith(f"vico-{run.run}-") for run in kept)


def _run_folders(storage: Path) -> list[Path]:
    return sorted(path for path in storage.glob("runs/*") if path.is_dir())


def _stage_folders(storage: Path) -> list[Path]:
    """Return the folders, and links, that are named like a stage's; gc touches nothing else in the storage,
    and nothing that it reaches through a link."""
    links = [path for path in storage.glob("*") if path.is_symlink() and not path.name.startswith(TRASH)]
    for link in links:
        logger.warning("%s is a link to %s; what it leads to is left alone", link, os.path.realpath(link))
    return sorted(
        path
        for path in storage.glob("*/*")
        if _FINGERPRINT.fullmatch(path.name)
        and path.parent not in links
        and (path.is_dir() or path.is_symlink())
    )


def _garbage(kind: Kind, path: Path, why: str) -> Garbage:
    return Garbage(kind, path, why, storage_of(path).size(path))
