"""Ray Train behind one door: one function on every rank, started again when a worker dies.

A rank that ends in an exception of its own leaves it in the attempt's folder: that is not tried again, the
death of a worker is.
"""

import itertools
import json
import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from cluster.node_metrics import NodeSampler
from cluster.places import free_places, note_places
from stages.context import Context, LeaseLost
from stages.parts import Parts
from stages.train_faults import STACKS_FILE, Preempted, hung_ranks, write_notice
from stages.training_metrics import MetricsFile, read_metrics
from stages.universal import convert_last_checkpoint
from vico.errors import UserError

logger = logging.getLogger(__name__)

_KNOWN = {error.__name__: error for error in (UserError, LeaseLost)}


_NOTICE_POLL_S = 0.5
_MARGIN_S = 60
_FAILURE, _PREEMPTION = "worker failure", "preemption"
_PLACES_FILE = "placement-group.txt"


class WorkersFailed(RuntimeError):
    """Training ended in an exception of a rank, or in more failures or preemptions than the site allows."""


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
    it. Each rank logs to the attempt's `rank-<r>.log`; Ray keeps files of its own in `name`-<start>. While
    they run, the context hears of progress, counted in steps of the attempt's metrics file. Raises what a
    rank raised where the user can mend it (UserError), WorkersFailed else.
    """
    site, folder = context.site, context.parts.attempt_folder
    if site.resources.gpus_per_worker not in (0, 1):
        raise UserError(
            f"resources.gpus_per_worker={site.resources.gpus_per_worker:g}: a rank of a training has one GPU "
            "or none; set 1 or 0, and more resources.workers for more GPUs"
        )
    folder.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()
    follower = threading.Thread(target=_follow, args=(context, num_steps, ended), daemon=True)
    follower.start()
    report, counts = MetricsFile(folder / "restarts.jsonl"), {_FAILURE: 0, _PREEMPTION: 0}
    left = {_FAILURE: site.train.max_failures, _PREEMPTION: site.train.max_preemptions}
    try:
        for number in itertools.count():
            convert_last_checkpoint(
                context.parts, site.resources.workers, site.train.zero_stage, site.train.offload
            )
            for pattern in ("failure-*.json", STACKS_FILE.format(rank="*")):
                for left_over in folder.glob(pattern):
                    left_over.unlink()
            try:
                _trainer(function, settings, context, name=f"{name}-{number}").fit()
                free_places(folder / _PLACES_FILE)
                return
            except ray.train.TrainingFailedError as error:
                free_places(folder / _PLACES_FILE)
                if last_part is not None and context.parts.done(last_part):
                    reason = str(error).splitlines()[-1]
                    logger.warning("a rank ended badly after %s was published: %s", last_part, reason)
                    return
                kind, reason = _cause(folder, error)
                logger.warning("%s: %s; %d more of the kind are allowed", kind, reason, left[kind])
                if not left[kind]:
                    setting = "max_failures" if kind == _FAILURE else "max_preemptions"
                    raise WorkersFailed(
                        f"{kind}: {reason}; train.{setting}={getattr(site.train, setting)} is used up"
                    ) from error
                left[kind] -= 1
                counts[kind] += 1
                report.append(number + 1, {f"num_{kind.replace(' ', '_')}s": float(counts[kind])})
    finally:
        ended.set()
        follower.join()


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
            # the watchdog, which says who hung where, comes before the time-out of whoever waits for that
            timeout_s=math.ceil(site.train.hang_timeout_s) + _MARGIN_S,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            # Ray would try a bug again like a death, and after a preemption without end
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
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


def _cause(folder: Path, error: Exception) -> tuple[str, str]:
    """(kind, reason) of an end that another start mends; raises for a rank's own exception."""
    failures = [json.loads(path.read_text()) for path in sorted(folder.glob("failure-*.json"))]
    preempted = [failure for failure in failures if failure["type"] == Preempted.__name__]
    # Ray takes the process group away from under the ranks that still run: whatever those raise then, of any
    # type, comes from that end and is not its cause. A start that failed (ControllerError) names no ranks.
    ended = getattr(error, "worker_failures", {})
    own = [
        failure
        for failure in failures
        if not failure["lost_peer"] and failure not in preempted and failure["rank"] in ended
    ]
    if own:
        first = own[0]
        if first["type"] in _KNOWN:
            raise _KNOWN[first["type"]](first["message"]) from error
        raise WorkersFailed(
            f"rank {first['rank']}: {first['type']}: {first['message']}; "
            f"see {folder}/rank-{first['rank']}.log"
        ) from error
    if preempted:
        return _PREEMPTION, preempted[0]["message"]
    if isinstance(error, ray.train.PreemptionError) or any(
        getattr(end, "preempted", False) for end in ended.values()
    ):
        return _PREEMPTION, str(error).splitlines()[-1]
    hung = hung_ranks(folder)
    if hung:
        return _FAILURE, "; ".join(hung)
    return _FAILURE, f"a worker died ({str(error).splitlines()[-1]})"


def _follow(context: Context, num_steps: int, ended: threading.Event) -> None:
    reported = -1
    while not ended.wait(1.0):
        done = _last_step(context.parts)
        if done != reported:
            context.progress(done, num_steps, "steps")
            reported = done


def _last_step(parts: Parts) -> int:
    done = read_metrics(parts)
    return done[-1][0] if done else 0


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
        loop["function"](loop["settings"])
    except Exception as error:
        logger.exception("this rank stops")
        _leave_failure(folder, rank, error)
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


def _leave_failure(folder: Path, rank: int, error: Exception) -> None:
    text = str(error)
    lost_peer = isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "Connection"))
    )
    failure = {
        "rank": rank,
        "type": type(error).__name__,
        "message": " ".join(text.split()),
        "lost_peer": lost_peer,
    }
    (folder / f"failure-{rank}.json").write_text(json.dumps(failure))
