"""Ray Train behind one door: one function on every rank, started again when a worker dies.

A rank that ends in an exception of its own leaves it in the attempt's folder: that is not tried again, the
death of a worker is.
"""

import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import (
    DEFAULT_WORKER_GROUP_START_TIMEOUT_S,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from cluster.node_metrics import NodeSampler
from cluster.placement_groups import free_places, note_places
from stages.context import Context
from stages.stops import Interrupted
from stages.training.checkpoints import remove_half_deleted
from stages.training.faults import remove_notices, remove_stacks, stop_notice, write_notice
from stages.training.follower import Follower
from stages.training.rank_failures import (
    FAILURE,
    PREEMPTION,
    Restarts,
    WorkersFailed,
    cause,
    leave_failure,
    remove_failures,
)
from stages.training.universal import convert_last_checkpoint
from vico.errors import UserError

logger = logging.getLogger(__name__)
_NOTICE_POLL_S = 0.5
_SAY_AGAIN_S = 600.0
_PLACES_FILE = "placement-group.txt"


def run_workers(
    function: Callable[[Any], None],
    settings: Any,
    context: Context,
    *,
    num_steps: int,
    name: str = "ray-train",
    last_part: str | None = None,
) -> None:
    """Runs `function(settings)` on `resources.workers` ranks with a process group and waits for all of them.

    They start again after a death or a hang (at most `train.max_failures` times) and after a preemption (at
    most `train.max_preemptions` times), from the last checkpoint, converted where other ranks wrote it; but
    not once `last_part`, the last that rank 0 publishes, is there: a rank that dies then takes nothing with
    it. A start waits for places up to `train.start_timeout_s`. Each rank logs to the attempt's
    `rank-<r>.log`; Ray keeps files of its own in `name`-<start>. While they run, the context hears of
    progress, counted in steps of the attempt's metrics file, and is asked whether to stop: the ranks then
    end their step and publish a checkpoint, as after a preemption; so they do when a signal interrupts this.
    Raises what `context.check` raised, what a rank raised where the user can mend it (UserError) or the
    numbers went wrong (Diverged, CheckpointDiffers), WorkersFailed else.
    """
    site, folder = context.site, context.parts.attempt_folder
    if site.resources.gpus_per_worker not in (0, 1):
        raise UserError(
            f"resources.gpus_per_worker={site.resources.gpus_per_worker:g}: a rank of a training has one GPU "
            "or none; set 1 or 0, and more resources.workers for more GPUs"
        )
    folder.mkdir(parents=True, exist_ok=True)
    left = {FAILURE: site.train.max_failures, PREEMPTION: site.train.max_preemptions}
    restarts, places = Restarts(context.parts), _WaitForPlaces(context)
    with Follower(context, num_steps) as follower:
        for number in itertools.count():
            convert_last_checkpoint(
                context.parts,
                site.resources.workers,
                site.train.zero_stage,
                site.train.offload,
                note=context.note,
                check=follower.raise_what_stopped,
            )
            for remove in (remove_failures, remove_notices, remove_stacks):
                remove(folder)
            remove_half_deleted(context.parts)
            try:
                trainer = _trainer(function, settings, context, name=f"{name}-{number}")
                fit(trainer, context, is_kept=last_part is not None)
                free_places(folder / _PLACES_FILE)
                if last_part is None or not context.parts.done(last_part):  # else all is there already
                    follower.raise_what_stopped()
                return
            except ray.train.TrainingFailedError as error:
                free_places(folder / _PLACES_FILE)
                if last_part is not None and context.parts.done(last_part):
                    reason = str(error).splitlines()[-1]
                    logger.warning("a rank ended badly after %s was published: %s", last_part, reason)
                    return
                follower.raise_what_stopped()
                if places.missing(error):
                    continue
                node_taken = isinstance(error, ray.train.PreemptionError)
                kind, reason = cause(folder, error, f"{name}-{number}", node_taken=node_taken)
                restarts.add(kind)
                logger.warning("%s: %s; %d more of the kind are allowed", kind, reason, left[kind])
                if not left[kind]:
                    setting = "max_failures" if kind == FAILURE else "max_preemptions"
                    raise WorkersFailed(
                        f"{kind}: {reason}; train.{setting}={getattr(site.train, setting)} is used up"
                    ) from error
                left[kind] -= 1


def fit(trainer: TorchTrainer, context: Context, *, is_kept: bool) -> None:
    """Trains in a thread, where Ray takes no signal for itself. One that interrupts the wait leaves the
    ranks, which the Follower tells, the time to end their step and publish a checkpoint, where they do
    (`is_kept`)."""
    ended: Future = Future()

    def train() -> None:
        try:
            ended.set_result(trainer.fit())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=train, name="ray-train", daemon=True).start()
    try:
        ended.result()
    except Interrupted as stop:
        begun = (context.parts.attempt_folder / _PLACES_FILE).exists()
        if is_kept and begun and not ended.done():
            context.note(f"{stop}: the ranks end their step and publish a checkpoint; again: all end at once")
            wait([ended], timeout=context.site.train.hang_timeout_s)
        raise


def _trainer(function, settings, context: Context, *, name: str) -> TorchTrainer:
    site, folder = context.site, context.parts.attempt_folder
    use_gpu = site.resources.gpus_per_worker > 0
    return TorchTrainer(
        _worker,
        train_loop_config={"function": function, "settings": settings, "attempt_folder": str(folder)},
        scaling_config=ScalingConfig(
            num_workers=site.resources.workers,
            use_gpu=use_gpu,
            resources_per_worker=site.resources.per_process,
        ),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo",
            timeout_s=math.ceil(site.train.collective_timeout_s),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            # Ray would try a bug again like a death, and after a preemption or without places without end
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
            callbacks=[_NotePlaces(folder / _PLACES_FILE)],
        ),
    )


class _NotePlaces(WorkerGroupCallback):
    """Notes a start's places before its ranks do anything; called by Ray Train's controller."""

    def __init__(self, file: Path):
        self._file = file

    def before_init_train_context(self, workers: list) -> dict:
        note_places(workers[0].execute_async, self._file)
        return {}


class _WaitForPlaces:
    """Says that a start found no places in the cluster, and ends the wait for them. Ray itself would try
    again without end and without a word."""

    def __init__(self, context: Context):
        self._context = context
        self._since: float | None = None
        self._said = -math.inf

    def missing(self, error: Exception) -> bool:
        """Whether this end of a start is for want of places; WorkersFailed when it was long enough."""
        failure = getattr(error, "controller_failure", None)
        if not isinstance(failure, WorkerGroupStartupTimeoutError):
            self._since, self._said = None, -math.inf
            return False
        site, now = self._context.site, time.monotonic()
        # what has just ended waited, too
        self._since = now - _start_patience_s() if self._since is None else self._since
        waited, allowed = now - self._since, site.train.start_timeout_s
        wanted = f"{site.resources.workers} ranks of {site.resources.per_process}"
        if waited >= allowed:
            raise WorkersFailed(
                f"the cluster had no places for {wanted} for {waited:.0f} s, train.start_timeout_s="
                f"{allowed:g} is used up; give the same command again when it has, or lower resources.workers"
            ) from error
        if now - self._said >= _SAY_AGAIN_S:
            self._context.note(
                f"no places for {wanted} in the cluster for {waited:.0f} s; waits for them, up to "
                f"train.start_timeout_s={allowed:g}"
            )
            self._said = now
        return True


def _start_patience_s() -> float:
    """How long Ray tries one start."""
    return float(os.environ.get(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, DEFAULT_WORKER_GROUP_START_TIMEOUT_S))


def _worker(loop: dict) -> None:
    rank = ray.train.get_context().get_world_rank()
    folder = Path(loop["attempt_folder"])
    handler = logging.FileHandler(folder / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    ended = threading.Event()
    threading.Thread(target=_pass_notice_on, args=(folder, rank, ended), daemon=True).start()
    sampler = None
    if ray.train.get_context().get_local_rank() == 0:
        sampler = NodeSampler(folder)
        sampler.start()
    try:
        with stop_notice(folder, rank):
            loop["function"](loop["settings"])
    except Exception as error:
        logger.exception("this rank stops")
        leave_failure(folder, rank, error)
        raise
    finally:
        ended.set()
        if sampler:
            sampler.stop()
        root.removeHandler(handler)
        handler.close()


def _pass_notice_on(folder: Path, rank: int, ended: threading.Event) -> None:
    """Passes Ray's word that a node of this training will be taken away on to the training, as often as it
    may have begun to listen.

    `ray.train.get_preemption_info` says the same, but waits for all ranks at every call, at every step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    heard = get_train_context().preemption_context
    while not ended.wait(_NOTICE_POLL_S):
        if heard.preemption_info is not None:
            nodes = ", ".join(heard.preemption_info.preempted_node_ids)
            write_notice(folder, rank, f"Ray: node {nodes} will be taken away\n")
