"""`vico logs`: the log of a run or of one of its stages, so far or as it is written."""

import time
from collections.abc import Iterator
from pathlib import Path

from cluster.launchers.by_kind import launcher_of_submission
from pipeline.results.runs import RunFile, Runs
from pipeline.running.jobs import DriverEnd, JobWatch, is_job
from vico.errors import UserError

_POLL_S = 0.3


class Tail:
    """A growing text file, read line by line. The file may not exist yet."""

    def __init__(self, path: Path, prefix: str = ""):
        self.path, self.prefix = path, prefix
        self._offset = 0
        self._rest = b""

    def lines(self, *, to_end: bool = False) -> Iterator[str]:
        """Yield the whole lines since the last call; with `to_end` also a last line without its newline."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
            self._offset += len(new)
            *whole, self._rest = (self._rest + new).split(b"\n")
            yield from (self._text(line) for line in whole)
        if to_end and self._rest:
            yield self._text(self._rest)
            self._rest = b""

    def _text(self, line: bytes) -> str:
        return self.prefix + line.decode("utf-8", errors="replace")


def job_log(runs: Runs, name: str) -> str:
    """Return what the job of a run printed, by its scheduler. Raises UserError if it was not submitted."""
    run = runs.named(name)
    if run.submission is None or not is_job(run.submission):
        raise UserError(f"--job: run {run.run} was not submitted; leave --job out for the run's own log")
    return launcher_of_submission(run.submission).logs(run.submission["id"])


def log_lines(
    runs: Runs,
    name: str,
    *,
    stage: str | None,
    follow: bool,
    start_timeout_s: float | None = None,
) -> Iterator[str]:
    """Yield the log of a run; with `stage`, the logs of its driver and ranks in that stage.

    With `follow`, wait for new lines until the run has ended and its driver has let go of it, or until the
    job that it was submitted as ends. While the job waits, yield the scheduler's reason whenever it changes;
    end if it still waits after `start_timeout_s`.
    """
    run, watch = runs.named(name), JobWatch(start_timeout_s=start_timeout_s)
    if stage is not None and stage not in run.stages:
        raise UserError(
            f"--stage={stage!r} is not a stage of run {run.run}; its stages are {', '.join(run.stages)}"
        )
    tails: dict[Path, Tail] = {}
    driver_end = DriverEnd(runs.run_folder(run.run))
    while True:
        # Checked before reading, so that the last lines are not missed.
        line, ended = watch.look(run) if follow else (None, True)
        if follow and ended and line is None:
            ended = driver_end.has_come()
        runs.storage.refresh(_folder(runs, run, stage))
        for path, prefix in _log_files(runs, run, stage):
            tail = tails.setdefault(path, Tail(path, prefix))
            yield from tail.lines(to_end=ended)
        if line is not None:
            yield line
        if ended:
            return
        time.sleep(_POLL_S)
        runs.storage.refresh(runs.run_folder(run.run))
        run = runs.named(run.run)


def _log_files(runs: Runs, run: RunFile, stage: str | None) -> list[tuple[Path, str]]:
    """Return the log files, each with the prefix of its lines."""
    if stage is None:
        return [(runs.run_folder(run.run) / "driver.log", "")]
    folder = _folder(runs, run, stage) / "attempts" / str(run.stages[stage].attempt)
    ranks = sorted(folder.glob("rank-*.log"), key=lambda path: (len(path.name), path.name))
    return [(folder / "driver.log", ""), *((path, f"[{path.stem}] ") for path in ranks)]


def _folder(runs: Runs, run: RunFile, stage: str | None) -> Path:
    if stage is None:
        return runs.run_folder(run.run)
    return runs.folder.parent / stage / run.stages[stage].fingerprint
