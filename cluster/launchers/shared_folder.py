"""The folder of a job on a file system that submitting machine and nodes share: kinds `slurm` and `local`.

It has the job's files, its sources, what it prints, and a marker that is written last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.launchers.archive import package_files
from cluster.launchers.launcher import Job, JobStatus
from cluster.site import Site
from vico.errors import UserError, last_line
from vico.own_files import check_inside

DRIVER_LOG, MARKER, PID_FILE = "job.log", "ended.json", "driver.pid"
_SHOWN_BYTES = 100_000
_STOPPED = (130, 143)


class FolderJobs:
    """What launchers with job folders share: the jobs' files are in `folder`, one folder per job."""

    def __init__(self, folder: str | Path, site: Site | None = None) -> None:
        self.folder, self._site = Path(folder), site

    @property
    def site(self) -> Site:
        assert self._site is not None, "a launcher without a site submits nothing"
        return self._site

    def place(self) -> dict[str, Any]:
        """Return what a later command needs to reach the jobs, for run.json."""
        return {"folder": str(self.folder)}


def write_job_folder(folder: Path, job: Job, *, with_sources: bool) -> None:
    """Write the files of a job, and the project's sources, into a new folder. Raises UserError if it cannot,
    or if a link leads out of the storage on the way to it."""
    check_inside(folder, folder.parents[1])
    try:
        folder.mkdir(parents=True)
        for name, content in package_files(job.files, with_sources=with_sources).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; jobs write their scripts and logs there: fix its permissions, or "
            "choose another folder with --storage"
        ) from error


def end_of_job(folder: Path) -> JobStatus | None:
    """Return how the driver ended by its marker; None if it did not write one (yet)."""
    try:
        code = json.loads((folder / MARKER).read_text(encoding="utf-8"))["exit_code"]
    except FileNotFoundError:
        return None
    if code == 0:
        return JobStatus("done")
    if code in _STOPPED:
        return JobStatus("cancelled", f"its driver was stopped (exit code {code})")
    reason = last_line(last_lines(folder / DRIVER_LOG)) or "it printed nothing"
    return JobStatus("failed", f"its driver ended with exit code {code}: {reason}")


def last_lines(path: Path) -> str:
    """Return the last 100 kB of a text file; "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            size = file.tell()
            file.seek(max(0, size - _SHOWN_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
