"""`vico logs`: what a run or one of its stages wrote, and what it goes on to write."""

import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.results.runs import ENDED, RunFile, Runs
from pipeline.running.jobs import JobWatch
from vico.errors import UserError

_POLL_S = 0.3


class Tail:
    """A growing text file that is read line by line; it need not be there yet."""

    def __init__(self, path: Path, prefix: str = ""):
        self.path, self.prefix = path, prefix
        self._offset = 0
        self._rest = b""

    def lines(self, *, to_end: bool = False) -> Iterator[str]:
        """The complete lines that came since the last call; `to_end` gives a last line without its end,
        too."""
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


def log_lines(runs: Runs, name: str, *, stage: str | None, follow: bool) -> Iterator[str]:
    """The lines of a run's log, or of its driver's and ranks' logs in one stage; `follow` goes on until
    the run ends, or the job that it was submitted as."""
    run, watch = runs.named(name), JobWatch()
    if stage is not None and stage not in run.stages:
        raise UserError(
            f"--stage={stage!r} is no stage of run {run.run}; its stages are {', '.join(run.stages)}"
        )
    tails: dict[Path, Tail] = {}
    while True:
        # Asked before reading, so that the last lines are read.
        job_end = watch.end(run) if follow else None
        ended = not follow or run.state in ENDED or job_end is not None
        runs.storage.refresh(_folder(runs, run, stage))
        for path, prefix in _log_files(runs, run, stage):
            tail = tails.setdefault(path, Tail(path, prefix))
            yield from tail.lines(to_end=ended)
        if ended:
            if job_end is not None:
                yield job_end
            return
        time.sleep(_POLL_S)
        runs.storage.refresh(runs.run_folder(run.run))
        run = runs.named(run.run)


def _log_files(runs: Runs, run: RunFile, stage: str | None) -> list[tuple[Path, str]]:
    """Paths with the prefix of their lines."""
    if stage is None:
        return [(runs.run_folder(run.run) / "driver.log", "")]
    folder = _folder(runs, run, stage) / "attempts" / str(run.stages[stage].attempt)
    ranks = sorted(folder.glob("rank-*.log"), key=lambda path: (len(path.name), path.name))
    return [(folder / "driver.log", ""), *((path, f"[{path.stem}] ") for path in ranks)]


def _folder(runs: Runs, run: RunFile, stage: str | None) -> Path:
    if stage is None:
        return runs.run_folder(run.run)
    return runs.folder.parent / stage / run.stages[stage].fingerprint
