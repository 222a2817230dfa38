"""Measure some updates before a long training (`train.profiling.throughput_steps`): speed, memory, duration.

Their results are discarded: they run in processes of their own, which then end.
"""

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.metric_lines import MetricsWriter, last_metric_line
from stages.context import Context
from stages.training.checkpoints import checkpoints
from stages.training.engine import Engine
from stages.training.loop import TrainingPlan
from stages.training.speed.profiling import speed_metrics
from stages.training.step import Prefetch, StepSource, train_step
from vico.errors import UserError

logger = logging.getLogger(__name__)
Settings = TypeVar("Settings")
THROUGHPUT_FILE = "throughput.jsonl"
"""In the attempt's folder; sent to MLflow like all metric files there."""


def measure_throughput(
    engine: Engine, source: StepSource[Any], plan: TrainingPlan, validate: Callable[[], object]
) -> None:
    """Measure the first `throughput_steps` updates as the training makes them, after one for warm-up, and one
    validation. Rank 0 writes the metrics into the attempt's folder. Every rank calls it."""
    steps = _measured_steps(engine, source, plan)
    memory = torch.tensor([steps[-1].pop("peak_memory_bytes")], dtype=torch.float64, device=engine.device)
    torch.distributed.all_reduce(memory, torch.distributed.ReduceOp.MAX)
    started = time.monotonic()
    validate()
    seconds_validation = time.monotonic() - started
    if engine.rank == 0:
        measured = steps[1:] or steps
        metrics = {name: statistics.median(step[name] for step in measured) for name in steps[-1]}
        mean_s = statistics.mean(step["seconds_step"] for step in measured)
        metrics |= {"num_steps": len(measured), "peak_memory_bytes": float(memory)}
        metrics |= {"seconds_validation": seconds_validation}
        metrics["seconds_predicted"] = mean_s * plan.num_steps + seconds_validation * _num_validations(plan)
        report = MetricsWriter(plan.parts.attempt_folder / THROUGHPUT_FILE)
        report.append(0, {f"throughput_{name}": value for name, value in metrics.items()})
    engine.barrier()


def _measured_steps(engine: Engine, source: StepSource[Any], plan: TrainingPlan) -> list[dict[str, float]]:
    """Make the updates and return the metrics of each."""
    profiling = plan.site.profiling
    num_steps = min(profiling.throughput_steps + 1, plan.num_steps)
    prefetch = Prefetch(source, engine.rank, engine.world_size)
    steps = []
    try:
        for step in range(num_steps):
            started = time.monotonic()
            batches = prefetch.batches(step, num_steps)
            seconds_data_wait = time.monotonic() - started
            sums = train_step(engine, batches, plan.update(step))
            seconds = time.monotonic() - started
            speed = speed_metrics(sums, seconds, engine.world_size, profiling.peak_tflops)
            steps.append({"seconds_step": seconds, "seconds_data_wait": seconds_data_wait, **speed})
    finally:
        prefetch.close()
    return steps


def _num_validations(plan: TrainingPlan) -> int:
    """Return how often the training validates: every so many steps, and after the last."""
    return -(-plan.num_steps // plan.validate_every_steps)


def run_throughput(
    measure: Callable[[Settings], None], settings: Settings, context: Context, *, num_steps: int
) -> dict[str, float]:
    """Run `measure(settings)` on all ranks if the site asks for it and the training has not begun, report the
    result in one line, and return it; empty if nothing was measured."""
    if not context.site.train.profiling.throughput_steps or checkpoints(context.parts):
        return {}
    from stages.training.ranks.workers import (
        run_workers,
    )  # imports Ray, which the ranks' own part does without

    run_workers(measure, settings, context, num_steps=num_steps, name="throughput")
    metrics = throughput_of(context.parts.attempt_folder)
    context.note(throughput_line(metrics, num_steps))
    return metrics


def throughput_of(attempt_folder: Path) -> dict[str, float]:
    """Return what was measured in an attempt; UserError if its file is missing or cut short."""
    path = attempt_folder / THROUGHPUT_FILE
    try:
        line = last_metric_line(path)
    except OSError as error:
        raise UserError(f"{path} is not readable ({error}); run the same command again") from error
    if line is None:
        raise UserError(f"{path} is not readable (it has no whole line); run the same command again")
    return {name.removeprefix("throughput_"): value for name, value in line.metrics.items()}


def throughput_line(metrics: Mapping[str, float], num_steps: int) -> str:
    """Return the metrics as a line for people."""
    speeds = [
        f"{metrics[name]:,.{digits}f} {unit}"
        for name, digits, unit in (("tokens_per_second", 0, "tokens/s"), ("tiles_per_second", 1, "tiles/s"))
        if name in metrics
    ]
    seconds = metrics["seconds_predicted"]
    hours, minutes = divmod(round(seconds / 60), 60)
    duration = f"{hours} h {minutes:02d} min" if hours else f"{seconds / 60:.1f} min"
    return (
        f"measured over {metrics['num_steps']:.0f} updates: {', '.join(speeds)}, "
        f"{metrics['seconds_step']:.2f} s per update ({metrics['seconds_data_wait']:.2f} s of it waiting for "
        f"data), at most {metrics['peak_memory_bytes'] / 1e9:.2f} GB per rank; all {num_steps} updates with "
        f"validation, without checkpoints: about {duration}"
    )
