"""How a start of the ranks ended: what each rank leaves of its own end in the attempt's folder, and what the
driver makes of it. A fault of the machine or of another rank is mended by another start; a rank's own is not.
"""

import errno
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from stages.parts import Parts
from stages.stops import LeaseLost
from stages.training.checkpoints import CheckpointDiffers
from stages.training.faults import Diverged, Preempted, hung_ranks, noticed_ranks
from stages.training.metrics import MetricsFile
from vico.errors import Unreachable, UserError

logger = logging.getLogger(__name__)
_FOR_THE_USER = {error.__name__: error for error in (UserError, LeaseLost, Unreachable)}
_OF_THE_TRAINING = {error.__name__: error for error in (Diverged, CheckpointDiffers)}
_LOST_PEER, _MACHINE, _OWN = "lost peer", "machine", "own"
_MACHINE_ERRORS = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENETDOWN)
"""What a disk or a file server that fails gives; a file that is missing or forbidden stays so."""


class WorkersFailed(RuntimeError):
    """Training ended in an exception of a rank, or in more failures or preemptions than the site allows."""


def leave_failure(folder: Path, rank: int, error: Exception) -> None:
    """Writes `failure-<rank>.json` for `cause`, with the ranks that have had notice by now."""
    names = [kind.__name__ for kind in type(error).__mro__]
    known = [name for name in names if name in _FOR_THE_USER or name in _OF_THE_TRAINING]
    path = folder / f"failure-{rank}.json"
    partial = path.with_name(f".{path.name}.partial")
    try:  # whole or not at all: this process may be killed at it
        failure = {
            "rank": rank,
            "type": (known or names)[0],
            "message": " ".join(str(error).split()),
            "kind": _kind(error),
            "noticed": noticed_ranks(folder),
        }
        partial.write_text(json.dumps(failure))
        os.replace(partial, path)
    except OSError:
        logger.exception("%s cannot be written", path)  # the disk may be full, and that be the failure


def _kind(error: Exception) -> str:
    text = str(error)
    if isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection"))
    ):
        return _LOST_PEER
    if isinstance(error, torch.AcceleratorError):  # memory that runs out is another class
        return _OWN if "device-side assert" in text else _MACHINE
    if isinstance(error, ConnectionError | TimeoutError):
        return _MACHINE
    return _MACHINE if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS else _OWN


def remove_failures(folder: Path) -> None:
    """Removes what the ranks of an earlier start left."""
    for path in folder.glob("failure-*.json"):
        path.unlink()


def cause(
    folder: Path, error: Exception, start: str = "start", *, node_taken: bool = False
) -> tuple[str, str]:
    """(kind, reason) of an end that another start mends; raises for a rank's own exception. `start` names the
    stacks of ranks that hung; `node_taken`: Ray says that it ended the ranks for a node that goes away."""
    failures = [json.loads(path.read_text()) for path in sorted(folder.glob("failure-*.json"))]
    preempted = [failure for failure in failures if failure["type"] == Preempted.__name__]
    # Ray takes the process group away from under the ranks that still run: whatever those raise then, of any
    # type, comes from that end and is not its cause. A start that failed (ControllerError) names no ranks.
    ended = getattr(error, "worker_failures", {})
    first = [failure for failure in failures if failure not in preempted and failure["rank"] in ended]
    for failure in first:
        if failure["kind"] == _OWN:
            _raise_own(failure, folder, error)
    if preempted:
        return PREEMPTION, preempted[0]["message"]
    if node_taken or any(getattr(end, "preempted", False) for end in ended.values()):
        return PREEMPTION, str(error).splitlines()[-1]
    for failure in first:
        if failure["kind"] == _MACHINE:
            return FAILURE, _told(failure, folder)
    told = {failure["rank"] for failure in failures}
    for rank in sorted(_noticed_ranks(ended, first, folder) - told):  # no time was left to say so
        return PREEMPTION, f"rank {rank} got SIGTERM, or its node was taken away, and ended before its step"
    hung = hung_ranks(folder, start)
    if hung:
        return FAILURE, "; ".join(hung)
    return FAILURE, f"a worker died ({str(error).splitlines()[-1]})"


def _noticed_ranks(ended: Iterable[int], first: list[dict[str, Any]], folder: Path) -> set[int]:
    """Ranks that had notice, other than Ray's SIGTERM when it clears away what is left of a start.

    `ended` are those that Ray's poll found ended: that may be only a peer, which lost the connection to a
    rank whose node was taken. What the peer saw then counts, not what is there now.
    """
    seen_by_peers = (rank for failure in first for rank in failure["noticed"])
    return {*set(ended).intersection(noticed_ranks(folder)), *seen_by_peers}


def _told(failure: dict[str, Any], folder: Path) -> str:
    rank = failure["rank"]
    return f"rank {rank}: {failure['type']}: {failure['message']}; see {folder}/rank-{rank}.log"


def _raise_own(failure: dict[str, Any], folder: Path, error: Exception) -> None:
    kind = failure["type"]
    if kind in _FOR_THE_USER:
        raise _FOR_THE_USER[kind](failure["message"]) from error
    raise _OF_THE_TRAINING.get(kind, WorkersFailed)(_told(failure, folder)) from error


FAILURE, PREEMPTION = "worker failure", "preemption"
RESTARTS_FILE = "restarts.jsonl"
"""In an attempt's folder: a line of metrics for each failure and preemption, numbered over all attempts."""


class Restarts:
    """Counts failures and preemptions of ranks; what earlier attempts had is counted along."""

    def __init__(self, parts: Parts):
        self._totals, self._number = restart_counts(parts), len(_lines(parts))
        self._file = MetricsFile(parts.attempt_folder / RESTARTS_FILE)

    def add(self, kind: str) -> None:
        """One more; reported at once, also where it is the last that the site allows."""
        self._totals[_name(kind)] += 1
        self._number += 1
        counts = {f"num_{name}": float(count) for name, count in self._totals.items() if count}
        self._file.append(self._number, counts)


def restart_counts(parts: Parts) -> dict[str, int]:
    """`worker_failures` and `preemptions` of all attempts so far."""
    totals = {_name(FAILURE): 0, _name(PREEMPTION): 0}
    for line in _lines(parts):
        for name in totals:  # each line has the totals of its time
            totals[name] = max(totals[name], int(json.loads(line)["metrics"].get(f"num_{name}", 0)))
    return totals


def _name(kind: str) -> str:
    return f"{kind.replace(' ', '_')}s"


def _lines(parts: Parts) -> list[str]:
    files: list[Path] = sorted((parts.folder / "attempts").glob(f"*/{RESTARTS_FILE}"))
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    return [line for line in lines if line.endswith("\n")]  # a killed writer leaves half a line
