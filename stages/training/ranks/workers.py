"""Run one function on every rank of a training, and start the ranks again when a worker dies.

A rank that ends in an exception of its own leaves it in the attempt's folder. That is not retried; the death
of a worker is.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable
from typing import TypeVar

from stages.context import Context
from stages.training.checkpoints import remove_half_deleted
from stages.training.faults import remove_notices, remove_stacks
from stages.training.kept.folders import remove_half_kept
from stages.training.ranks.follower import Follower
from stages.training.ranks.phases import remove_phase
from stages.training.ranks.rank_failures import (
    FAILURE,
    PREEMPTION,
    Restarts,
    WorkersFailed,
    cause,
    remove_failures,
)
from stages.training.ranks.ray_trainer import Job, StartFailed, start_patience_s, start_ranks
from stages.training.universal import convert_last_checkpoint
from vico.errors import UserError, last_line

logger = logging.getLogger(__name__)
Settings = TypeVar("Settings")
_NOTE_AGAIN_S = 600.0


def run_workers(
    function: Callable[[Settings], None],
    settings: Settings,
    context: Context,
    *,
    num_steps: int,
    name: str = "ray-train",
    last_part: str | None = None,
) -> None:
    """Run `function(settings)` on `resources.workers` ranks with a process group, and wait for all of them.

    They start again from the last checkpoint (converted if other ranks wrote it) after a death or a hang, at
    most `train.restarts.max_failures` times, and after a preemption, at most `train.restarts.max_preemptions`
    times. Once `last_part`, the last part that rank 0 publishes, exists, they do not: the death of a rank
    then loses nothing. A start waits up to `train.restarts.start_timeout_s` for free resources.

    Each rank logs to the attempt's `rank-<r>.log`; Ray keeps files of its own in `name`-<start>. Meanwhile
    the context hears of the progress, in steps of the attempt's metrics file or items of a phase, and is
    asked whether to stop. To stop, or when a signal interrupts this call, the ranks finish their step and
    publish a checkpoint, as after a preemption.

    Raises what `context.check` raised. Raises what a rank raised if the user can fix it (UserError) or the
    numbers went wrong (Diverged, CheckpointDiffers), otherwise WorkersFailed.
    """
    gpus = context.site.resources.gpus_per_worker
    if gpus not in (0, 1):
        raise UserError(
            f"resources.gpus_per_worker={gpus:g}: a rank of a training has one GPU or none; set 1 or 0, and "
            "more resources.workers for more GPUs"
        )
    context.parts.attempt_folder.mkdir(parents=True, exist_ok=True)
    starts = _Starts(Job(function, settings, name, last_part), context)
    with Follower(context, num_steps) as follower:
        for number in itertools.count():
            if starts.run(number, follower):
                return


class _Starts:
    """Starts the ranks one time after another, and counts the restarts that the site allows."""

    def __init__(self, job: Job, context: Context):
        self._job, self._context, self._folder = job, context, context.parts.attempt_folder
        limits = context.site.train.restarts
        self._left = {FAILURE: limits.max_failures, PREEMPTION: limits.max_preemptions}
        self._restarts, self._wait = Restarts(context.parts), _ResourceWait(context)

    def run(self, number: int, follower: Follower) -> bool:
        """Start the ranks and wait for their end; return whether the job is done. Raises as `run_workers`."""
        self._prepare(follower)
        name = f"{self._job.name}-{number}"
        try:
            start_ranks(self._job, self._context, name=name)
        except StartFailed as failed:
            return self._is_done_in_spite_of(failed, name, follower)
        if not self._last_part_is_published():
            follower.raise_what_stopped()
        return True

    def _prepare(self, follower: Follower) -> None:
        """Convert the last checkpoint if needed, and remove what an earlier start left."""
        site, parts = self._context.site, self._context.parts
        convert_last_checkpoint(
            parts,
            site.resources.workers,
            site.train.memory,
            note=self._context.note,
            check=follower.raise_what_stopped,
        )
        for remove in (remove_failures, remove_notices, remove_stacks, remove_phase):
            remove(self._folder)
        remove_half_deleted(parts)
        remove_half_kept(parts)

    def _last_part_is_published(self) -> bool:
        return self._job.last_part is not None and self._context.parts.done(self._job.last_part)

    def _is_done_in_spite_of(self, failed: StartFailed, name: str, follower: Follower) -> bool:
        """Return whether the job is done although a rank failed; False means to start again."""
        if self._last_part_is_published():
            reason = last_line(str(failed.error))
            logger.warning("a rank failed after %s was published: %s", self._job.last_part, reason)
            return True
        follower.raise_what_stopped()
        if failed.no_resources:
            self._wait.extend(failed)
            return False
        self._wait.end()
        self._count(failed, name)
        return False

    def _count(self, failed: StartFailed, name: str) -> None:
        """Count a failure or preemption; raise WorkersFailed if the site allows no further restart."""
        kind, reason = cause(self._folder, failed.error, name, node_taken=failed.node_taken)
        self._restarts.add(kind)
        logger.warning("%s: %s; %d more of this kind are allowed", kind, reason, self._left[kind])
        if not self._left[kind]:
            limits = self._context.site.train.restarts
            setting = (
                f"train.restarts.max_failures={limits.max_failures}"
                if kind == FAILURE
                else f"train.restarts.max_preemptions={limits.max_preemptions}"
            )
            raise WorkersFailed(f"{kind}: {reason}; {setting} is used up") from failed.error
        self._left[kind] -= 1


class _ResourceWait:
    """The wait for free resources in the cluster, over several starts: notes it and limits it. Ray itself
    would retry silently and forever."""

    def __init__(self, context: Context):
        self._context = context
        self._since: float | None = None
        self._noted = -math.inf

    def end(self) -> None:
        """Reset the wait after a start that found resources."""
        self._since, self._noted = None, -math.inf

    def extend(self, failed: StartFailed) -> None:
        """Wait further after a start that found none; raise WorkersFailed if the limit is reached."""
        site, now = self._context.site, time.monotonic()
        if self._since is None:
            self._since = now - start_patience_s()  # the start that has just ended was part of the wait
        waited, limit = now - self._since, site.train.restarts.start_timeout_s
        wanted = f"{site.resources.workers} ranks of {site.resources.per_process}"
        if waited >= limit:
            raise WorkersFailed(
                f"the cluster had no room for {wanted} for {waited:.0f} s, train.restarts.start_timeout_s="
                f"{limit:g} is used up; run the same command again when it has, or lower resources.workers"
            ) from failed.error
        if now - self._noted >= _NOTE_AGAIN_S:
            self._context.note(
                f"no room for {wanted} in the cluster for {waited:.0f} s; waits for them, up to "
                f"train.restarts.start_timeout_s={limit:g}"
            )
            self._noted = now
