"""Ray Train behind one door: one function on every rank, started again when a worker dies."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.node_metrics import NodeSampler
from stages.context import Context
from stages.training import read_metrics

logger = logging.getLogger(__name__)


def run_workers(function: Callable[[Any], None], settings: Any, context: Context, *, num_steps: int) -> None:
    """Runs `function(settings)` on `resources.workers` ranks with a process group and waits for all of them.

    A dead worker restarts them all, at most `train.max_failures` times. Each rank logs to the attempt's
    `rank-<r>.log`. While they run, the context hears of progress, counted in steps of the attempt's
    metrics file.
    """
    site = context.site
    use_gpu = site.resources.gpus_per_worker > 0
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "function": function,
            "settings": settings,
            "attempt_folder": str(context.parts.attempt_folder),
        },
        scaling_config=ScalingConfig(
            num_workers=site.resources.workers,
            use_gpu=use_gpu,
            resources_per_worker=site.resources.per_process,
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=600),
        run_config=RunConfig(
            name="ray-train",
            storage_path=str(context.parts.attempt_folder),
            failure_config=FailureConfig(max_failures=site.train.max_failures),
        ),
    )
    ended = threading.Event()
    follower = threading.Thread(target=_follow, args=(context, num_steps, ended), daemon=True)
    follower.start()
    try:
        trainer.fit()
    finally:
        ended.set()
        follower.join()


def _follow(context: Context, num_steps: int, ended: threading.Event) -> None:
    while not ended.wait(1.0):
        done = read_metrics(context.parts)
        context.progress(done[-1][0] if done else 0, num_steps, "steps")
    context.progress(num_steps, num_steps, "steps")


def _worker(loop: dict) -> None:
    rank = ray.train.get_context().get_world_rank()
    folder = Path(loop["attempt_folder"])
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    sampler = None
    if ray.train.get_context().get_local_rank() == 0:
        sampler = NodeSampler(folder)
        sampler.start()
    try:
        loop["function"](loop["settings"])
    except BaseException:
        logger.exception("this rank stops")
        raise
    finally:
        if sampler:
            sampler.stop()
        root.removeHandler(handler)
        handler.close()
