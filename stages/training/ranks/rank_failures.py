"""How the ranks of a training ended: what each rank writes about its own end, and what the driver concludes.

Another start can help after a fault of the machine or of another rank, but not after a rank's own error.
"""

import errno
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypedDict

import torch

from cluster.metric_lines import MetricLine, MetricsWriter, metric_lines
from stages.parts import Parts
from stages.stops import LeaseLost
from stages.training.checkpoints import CheckpointDiffers
from stages.training.faults import Diverged, Preempted, hung_ranks, noticed_ranks
from vico.errors import Unreachable, UserError, last_line, one_line

logger = logging.getLogger(__name__)
FAILURE, PREEMPTION = "worker failure", "preemption"
RESTARTS_FILE = "restarts.jsonl"
"""In an attempt's folder: one line of metrics per failure and preemption, numbered over all attempts."""
_FOR_THE_USER: Mapping[str, type[Exception]] = {
    error.__name__: error for error in (UserError, LeaseLost, Unreachable)
}
_OF_THE_TRAINING: Mapping[str, type[Exception]] = {
    error.__name__: error for error in (Diverged, CheckpointDiffers)
}
_LOST_PEER, _MACHINE, _OWN = "lost peer", "machine", "own"
_MACHINE_ERRORS = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENETDOWN)
"""Errors of a failing disk or file server. A file that is missing or not permitted stays so after a
restart."""


class WorkersFailed(RuntimeError):
    """A training ended in an exception of a rank, or had more failures or preemptions than the site
    allows."""


class RankFailure(TypedDict):
    """The content of `failure-<rank>.json`."""

    rank: int
    type: str
    """Name of the exception's class, or of the base class that the driver knows."""
    message: str
    kind: str
    """lost peer, machine or own."""
    noticed: list[int]
    """Ranks that had a stop notice when this rank ended."""


def leave_failure(folder: Path, rank: int, error: Exception) -> None:
    """Write `failure-<rank>.json`, from which `cause` later finds out why the ranks ended."""
    names = [base.__name__ for base in type(error).__mro__]
    known_names = [name for name in names if name in _FOR_THE_USER or name in _OF_THE_TRAINING]
    path = folder / f"failure-{rank}.json"
    partial = path.with_name(f".{path.name}.partial")
    try:  # whole or not at all: this process may be killed while it writes
        failure: RankFailure = {
            "rank": rank,
            "type": (known_names or names)[0],
            "message": one_line(error, max_chars=None),
            "kind": _kind(error),
            "noticed": noticed_ranks(folder),
        }
        partial.write_text(json.dumps(failure))
        os.replace(partial, path)
    except OSError:
        logger.exception("%s is not writable", path)  # a full disk may be the failure itself


def _kind(error: Exception) -> str:
    text = str(error)
    if isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection"))
    ):
        return _LOST_PEER
    if isinstance(error, torch.AcceleratorError):  # running out of device memory is another class
        return _OWN if "device-side assert" in text else _MACHINE
    if isinstance(error, ConnectionError | TimeoutError):
        return _MACHINE
    return _MACHINE if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS else _OWN


def remove_failures(folder: Path) -> None:
    """Remove what the ranks of an earlier start left."""
    for path in folder.glob("failure-*.json"):
        path.unlink()


def cause(
    folder: Path, error: Exception, start: str = "start", *, node_taken: bool = False
) -> tuple[str, str]:
    """Return (kind, reason) of an end after which another start can help; raise a rank's own exception.

    `start` names the files with the stacks of hung ranks. `node_taken`: Ray says that it ended the ranks
    because their node goes away.
    """
    failures: list[RankFailure] = [
        json.loads(path.read_text()) for path in sorted(folder.glob("failure-*.json"))
    ]
    preempted = [failure for failure in failures if failure["type"] == Preempted.__name__]
    # Ray destroys the process group while other ranks still run: whatever they raise then, of any type, is a
    # consequence and not the cause. After a failed start (ControllerError) Ray names no ranks.
    ended: Mapping[int, object] = getattr(error, "worker_failures", {})
    first = [failure for failure in failures if failure not in preempted and failure["rank"] in ended]
    for failure in first:
        if failure["kind"] == _OWN:
            _raise_own(failure, folder, error)
    # A rank that Ray does not name may have had only the SIGTERM with which Ray clears the rest of a start.
    noticed = _ranks_with_notice(ended, first, folder)
    for failure in preempted:
        if not ended or failure["rank"] in {*ended, *noticed}:
            return PREEMPTION, failure["message"]
    if node_taken or any(getattr(end, "preempted", False) for end in ended.values()):
        return PREEMPTION, last_line(str(error))
    for failure in first:
        if failure["kind"] == _MACHINE:
            return FAILURE, _failure_line(failure, folder)
    reported = {failure["rank"] for failure in failures}
    for rank in sorted(noticed - reported):  # it had no time to report
        return PREEMPTION, f"rank {rank} got SIGTERM, or its node was taken away, and ended before its step"
    hung = hung_ranks(folder, start)
    if hung:
        return FAILURE, "; ".join(hung)
    return FAILURE, f"a worker died ({last_line(str(error))})"


def _ranks_with_notice(ended: Collection[int], first: Sequence[RankFailure], folder: Path) -> set[int]:
    """Return the ranks that had notice, except by the SIGTERM with which Ray clears the rest of a start.

    `ended` are the ranks that Ray's poll found ended. That may be only a peer which lost the connection to a
    rank whose node was taken; then what the peer saw at its end counts, not what is there now.
    """
    seen_by_peers = (rank for failure in first for rank in failure["noticed"])
    return {*set(ended).intersection(noticed_ranks(folder)), *seen_by_peers}


def _failure_line(failure: RankFailure, folder: Path) -> str:
    rank = failure["rank"]
    return f"rank {rank}: {failure['type']}: {failure['message']}; see {folder}/rank-{rank}.log"


def _raise_own(failure: RankFailure, folder: Path, error: Exception) -> NoReturn:
    name = failure["type"]
    if name in _FOR_THE_USER:
        raise _FOR_THE_USER[name](failure["message"]) from error
    raise _OF_THE_TRAINING.get(name, WorkersFailed)(_failure_line(failure, folder)) from error


class Restarts:
    """Counts failures and preemptions of ranks, including those of earlier attempts."""

    def __init__(self, parts: Parts):
        self._totals, self._number = restart_counts(parts), len(_lines(parts))
        self._file = MetricsWriter(parts.attempt_folder / RESTARTS_FILE)

    def add(self, kind: str) -> None:
        """Count one more and report it at once, even if the site allows no further restart."""
        self._totals[_plural(kind)] += 1
        self._number += 1
        counts = {f"num_{name}": float(count) for name, count in self._totals.items() if count}
        self._file.append(self._number, counts)


def restart_counts(parts: Parts) -> dict[str, int]:
    """Return `worker_failures` and `preemptions` of all attempts so far."""
    totals = {_plural(FAILURE): 0, _plural(PREEMPTION): 0}
    for line in _lines(parts):
        for name in totals:  # each line has the totals of its time
            totals[name] = max(totals[name], int(line.metrics.get(f"num_{name}", 0)))
    return totals


def _plural(kind: str) -> str:
    return f"{kind.replace(' ', '_')}s"


def _lines(parts: Parts) -> list[MetricLine]:
    paths = sorted((parts.folder / "attempts").glob(f"*/{RESTARTS_FILE}"))
    return [line for path in paths for line in metric_lines(path)]
