"""Fetch output files of a stage from an object store into the working copy; each is checked by its digest."""

import os
import secrets
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_prep.records.identity import file_sha256
from pipeline.json_files import OutputFile
from pipeline.storage.folder import Sha256s
from pipeline.storage.parts_file import file_key
from pipeline.storage.working_copy import THREADS, WorkingCopy
from vico.errors import UserError
from vico.own_files import check_inside


def download_files(
    copy: WorkingCopy, folder: Path, files: Mapping[str, OutputFile], sha256s: Sha256s
) -> Path | None:
    """Fetch the files that the stage's output in the working copy does not have with the right bytes.

    Returns the first that the store has with other bytes or not at all, or None. Raises UserError if the
    disk is too small.
    """
    output = folder / "output"
    same_size = [name for name, file in files.items() if _size(output / name) == file.bytes]
    checked = zip(same_size, sha256s([output / name for name in same_size]), strict=True)
    present = {name for name, sha256 in checked if sha256 == files[name].sha256}
    missing = {name: file for name, file in files.items() if name not in present}
    _refuse_small_disk(copy, folder, sum(file.bytes for file in missing.values()))

    def download(name: str) -> bool:
        return _download(copy, folder, name, missing[name])

    with ThreadPoolExecutor(THREADS) as pool:
        complete = list(pool.map(download, missing))
    return next((output / name for name, ok in zip(missing, complete, strict=True) if not ok), None)


def _download(copy: WorkingCopy, folder: Path, name: str, file: OutputFile) -> bool:
    target = folder / "output" / name
    check_inside(target.parent, copy.folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Readers hold no lease: several commands may fetch the same file at the same time.
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(8)}"
    try:
        with partial.open("wb") as out:
            for window in copy.bucket.windows(file_key(copy, folder, name, file), file.bytes):
                out.write(window)
        if file_sha256(partial) == file.sha256:
            os.replace(partial, target)
            return True
    except FileNotFoundError:
        pass
    partial.unlink(missing_ok=True)
    return False


def _refuse_small_disk(copy: WorkingCopy, folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(copy.folder).free
    if num_bytes > free:
        raise UserError(
            f"work={copy.folder} has {free / 1e9:.1f} GB free, {folder.parent.name} needs "
            f"{num_bytes / 1e9:.1f} GB from {copy.bucket.address} there; free space or set `work` "
            "in the site to a larger disk"
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
