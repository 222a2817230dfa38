"""Ray Train behind one door: start a function on every rank once, and wait for the end."""

import logging
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig
from ray.train.v2._internal.constants import (
    DEFAULT_WORKER_GROUP_START_TIMEOUT_S,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from cluster.node_metrics import NodeSampler
from cluster.passwords import MaskingFormatter
from cluster.placement_groups import record_placement_group, release_placement_group
from cluster.process_environment import process_environment
from cluster.sources.by_value import pickled
from cluster.sources.driver import driver_code
from cluster.sources.in_worker import leave_report, run_rank
from cluster.sources.reports import accept_files
from stages.context import Context
from stages.stops import Interrupted
from stages.training.faults import stop_notice, write_notice
from stages.training.ranks.rank_failures import leave_failure
from vico.own_files import LogFile

logger = logging.getLogger(__name__)
_NOTICE_POLL_S = 0.5
_PLACEMENT_GROUP_FILE = "placement-group.txt"


@dataclass(frozen=True)
class Job:
    """What the ranks run: `function(settings)`.

    `name` is that of Ray's files. `last_part` is the last part that rank 0 publishes; with None the function
    writes no checkpoints.
    """

    function: Callable[[Any], None]
    settings: Any
    name: str
    last_part: str | None


class StartFailed(Exception):
    """A start ended in an error of Ray Train, which is the cause (`__cause__`) of this exception."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error
        self.node_taken = isinstance(error, ray.train.PreemptionError)
        """Whether Ray ended the ranks because their node goes away."""
        failure = getattr(error, "controller_failure", None)
        self.no_resources = isinstance(failure, WorkerGroupStartupTimeoutError)
        """Whether the cluster had no free resources for the ranks."""


def start_ranks(job: Job, context: Context, *, name: str) -> None:
    """Start the ranks, wait until all have ended, and release their resources.

    Raises StartFailed, or UserError if a rank imports other code than this process.
    """
    folder = context.parts.attempt_folder
    try:
        _fit(_trainer(job, context, name=name), context, is_kept=job.last_part is not None)
    except ray.train.TrainingFailedError as error:
        release_placement_group(folder / _PLACEMENT_GROUP_FILE)
        accept_files(folder)
        raise StartFailed(error) from error
    release_placement_group(folder / _PLACEMENT_GROUP_FILE)
    accept_files(folder)


def start_patience_s() -> float:
    """Return how long Ray waits for free resources in one start, in seconds."""
    return float(os.environ.get(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, DEFAULT_WORKER_GROUP_START_TIMEOUT_S))


def _fit(trainer: TorchTrainer, context: Context, *, is_kept: bool) -> None:
    """Train in a thread, so that Ray installs no signal handlers of its own.

    If a signal interrupts the wait and the ranks write checkpoints (`is_kept`), wait until they have finished
    their step and published one: the Follower tells them to.
    """
    ended: Future[None] = Future()

    def train() -> None:
        try:
            trainer.fit()
            ended.set_result(None)
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=train, name="ray-train", daemon=True).start()
    try:
        ended.result()
    except Interrupted as stop:
        has_started = (context.parts.attempt_folder / _PLACEMENT_GROUP_FILE).exists()
        if is_kept and has_started and not ended.done():
            context.note(f"{stop}: the ranks end their step and publish a checkpoint; again: all end at once")
            wait([ended], timeout=context.site.train.restarts.hang_timeout_s)
        raise


def _trainer(job: Job, context: Context, *, name: str) -> TorchTrainer:
    site, folder = context.site, context.parts.attempt_folder
    use_gpu = site.resources.gpus_per_worker > 0
    loop = {"function": job.function, "settings": job.settings, "attempt_folder": str(folder)}
    expected = driver_code()["digest"]
    return TorchTrainer(
        run_rank,
        train_loop_config={
            "folder": str(folder),
            "expected": expected,
            "call": pickled((_run_rank, loop)),
        },
        scaling_config=ScalingConfig(
            num_workers=site.resources.workers,
            use_gpu=use_gpu,
            resources_per_worker=site.resources.per_process,
        ),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo",
            timeout_s=math.ceil(site.train.restarts.collective_timeout_s),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            worker_runtime_env={"env_vars": process_environment(site.resources)},
            # Ray would retry a bug like a death, and retry forever after a preemption or without resources
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
            # Ray Train calls internal callbacks in this list too; its type names only the public ones
            callbacks=[_StartRecorder(folder, expected)],  # type: ignore[list-item]
        ),
    )


class _StartRecorder(WorkerGroupCallback):
    """Records a start's placement group, and the code of Ray Train's controller, which calls it, before the
    ranks do anything."""

    def __init__(self, folder: Path, expected: str):
        self._folder, self._expected = folder, expected

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        record_placement_group(workers[0].execute_async, self._folder / _PLACEMENT_GROUP_FILE)
        leave_report(self._folder, self._expected)
        return {}


def _run_rank(loop: dict[str, Any]) -> None:
    """Run the job's function on this rank, with its log, stop notices and node metrics."""
    rank = ray.train.get_context().get_world_rank()
    folder = Path(loop["attempt_folder"])
    handler = LogFile(folder / f"rank-{rank}.log")
    handler.setFormatter(MaskingFormatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    ended = threading.Event()
    threading.Thread(target=_forward_notice, args=(folder, rank, ended), daemon=True).start()
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


def _forward_notice(folder: Path, rank: int, ended: threading.Event) -> None:
    """Write a stop notice when Ray says that a node of this training will be taken away. The notice is
    repeated, because the rank may not listen yet.

    `ray.train.get_preemption_info` says the same, but each call, in every step, waits for all ranks.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    preemption = get_train_context().preemption_context
    while not ended.wait(_NOTICE_POLL_S):
        if preemption.preemption_info is not None:
            nodes = ", ".join(preemption.preemption_info.preempted_node_ids)
            write_notice(folder, rank, f"Ray: node {nodes} will be taken away\n")
