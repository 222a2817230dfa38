"""What workers reported about their code: compared with the driver's, kept beside the attempt, recorded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from cluster.sources.driver import driver_code
from cluster.sources.in_worker import PACKAGES, REPORT_PREFIX
from vico.errors import UserError
from vico.own_files import no_links

WORKERS_FILE = "workers.ndjson"
"""In an attempt's folder: the report of every process that worked on it. `*.jsonl` are metrics."""


class WorkerReports:
    """The reports of the workers of one attempt, in its folder."""

    def __init__(self, folder: Path):
        self._path = folder / WORKERS_FILE
        self._kept: set[tuple[str, int]] = set()

    def keep(self, report: Mapping[str, Any]) -> None:
        """Append the report of a process, unless its report is there."""
        process = (report["host"], report["pid"])
        if process not in self._kept:
            self._kept.add(process)
            with open(self._path, "a", encoding="utf-8", opener=no_links) as file:
                file.write(json.dumps(report) + "\n")


_REPORTS: ContextVar[WorkerReports | None] = ContextVar("worker_reports", default=None)


@contextmanager
def reports_kept_in(attempt_folder: Path) -> Iterator[None]:
    """Keep the reports of workers that this thread starts in the attempt's folder."""
    token = _REPORTS.set(WorkerReports(attempt_folder))
    try:
        yield
    finally:
        _REPORTS.reset(token)


def accept(report: Mapping[str, Any], kept_in: WorkerReports | None = None) -> None:
    """Keep a worker's report. Raises UserError if its code is not this process's."""
    reports = kept_in or _REPORTS.get()
    if reports is not None:
        reports.keep(report)
    code = driver_code()
    if report["digest"] == code["digest"]:
        return
    ours, theirs = code["packages"], report["packages"]
    names = [name for name in PACKAGES if theirs[name]["digest"] != ours[name]["digest"]]
    name = names[0]
    more = f" (and {', '.join(names[1:])})" if names[1:] else ""
    raise UserError(
        f"a worker on {report['host']} imports other code than this command: {name}{more} from "
        f"{theirs[name]['folder'] or 'nowhere'}, here from {ours[name]['folder']}; install the same version "
        "on every node, or run all from one checkout that every node sees and that is not edited meanwhile; "
        "then the same command again"
    )


def accept_files(folder: Path) -> None:
    """Accept the reports that ranks, their controller and a converter left in an attempt's folder."""
    reports = WorkerReports(folder)
    for path in sorted(folder.glob(f"{REPORT_PREFIX}*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        accept(report, reports)


def code_of_attempt(folder: Path) -> dict[str, Any]:
    """Return the digest of this process's code, and of the workers' codes with the number of processes."""
    return {"driver": driver_code()["digest"], "workers": worker_digests(folder)}


def worker_digests(folder: Path) -> dict[str, int]:
    """Return digest of the code -> number of the attempt's worker processes that imported it.

    Raises ValueError, KeyError or TypeError if the reports are damaged.
    """
    path = folder / WORKERS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    reports = (json.loads(line) for line in lines)
    processes = {(report["host"], report["pid"]): report["digest"] for report in reports}
    return dict(Counter(processes.values()))
