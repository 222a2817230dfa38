"""Some updates measured before a long training (`train.throughput_steps`): how fast it is, what memory it
takes and how long it will be. Nothing of them stays: they run in processes of their own, which then end.
"""

import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stages.context import Context
from stages.training.checkpoints import checkpoints
from stages.training.engine import Engine
from stages.training.loop import Prefetch, StepSource, TrainingPlan, train_step
from stages.training.metrics import MetricsFile
from stages.training.profiling import speed_metrics
from vico.errors import UserError

logger = logging.getLogger(__name__)
THROUGHPUT_FILE = "throughput.jsonl"
"""In the attempt's folder; MLflow gets it like every file of metrics there."""


def measure_throughput(
    engine: Engine,
    source: StepSource,
    empty: Callable[[], Any],
    plan: TrainingPlan,
    validate: Callable[[Engine], Any],
) -> None:
    """The first `throughput_steps` updates as the training takes them, after one that warms up, and one
    validation; rank 0 writes their figures into the attempt's folder. Call on every rank."""
    num_steps = min(plan.site.throughput_steps + 1, plan.num_steps)
    prefetch = Prefetch(source, empty, engine.rank, engine.world_size)
    rows = []
    try:
        for step in range(num_steps):
            started = time.monotonic()
            batches = prefetch.batches(step, num_steps)
            waited = time.monotonic() - started
            sums = train_step(engine, batches, plan, step)
            seconds = time.monotonic() - started
            speeds = speed_metrics(sums, seconds, engine.world_size, plan.site)
            rows.append({"seconds_step": seconds, "seconds_data_wait": waited, **speeds})
    finally:
        prefetch.close()
    memory = torch.tensor([rows[-1].pop("peak_memory_bytes")], dtype=torch.float64, device=engine.device)
    torch.distributed.all_reduce(memory, torch.distributed.ReduceOp.MAX)
    started = time.monotonic()
    validate(engine)
    seconds_validation = time.monotonic() - started
    if engine.rank == 0:
        measured = rows[1:] or rows
        figures = {name: statistics.median(row[name] for row in measured) for name in rows[-1]}
        mean_s = statistics.mean(row["seconds_step"] for row in measured)
        figures |= {"num_steps": len(measured), "peak_memory_bytes": float(memory)}
        figures |= {"seconds_validation": seconds_validation}
        figures["seconds_predicted"] = mean_s * plan.num_steps + seconds_validation * _validations(plan)
        report = MetricsFile(plan.parts.attempt_folder / THROUGHPUT_FILE)
        report.append(0, {f"throughput_{name}": value for name, value in figures.items()})
    engine.barrier()


def _validations(plan: TrainingPlan) -> int:
    """How often the training validates: every so many steps, and after the last."""
    return -(-plan.num_steps // plan.validate_every_steps)


def run_throughput(
    measure: Callable[[Any], None], settings: Any, context: Context, *, num_steps: int
) -> dict[str, float]:
    """Runs `measure(settings)` on all ranks where the site asks for it and the training has not begun, and
    tells the user in a line; the figures, empty where nothing was measured."""
    if not context.site.train.throughput_steps or checkpoints(context.parts):
        return {}
    from stages.training.workers import run_workers  # Ray, which the ranks' own part does without

    run_workers(measure, settings, context, num_steps=num_steps, name="throughput")
    figures = throughput_of(context.parts.attempt_folder)
    context.note(throughput_line(figures, num_steps))
    return figures


def throughput_of(attempt_folder: Path) -> dict[str, float]:
    """What was measured in an attempt; UserError where its file is missing or cut short."""
    path = attempt_folder / THROUGHPUT_FILE
    try:
        metrics = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["metrics"]
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); give the same command again") from error
    return {name.removeprefix("throughput_"): value for name, value in metrics.items()}


def throughput_line(figures: dict[str, float], num_steps: int) -> str:
    """The figures for people."""
    speeds = [
        f"{figures[name]:,.{digits}f} {unit}"
        for name, digits, unit in (("tokens_per_second", 0, "tokens/s"), ("tiles_per_second", 1, "tiles/s"))
        if name in figures
    ]
    hours, minutes = divmod(round(figures["seconds_predicted"] / 60), 60)
    took = f"{hours} h {minutes:02d} min" if hours else f"{figures['seconds_predicted'] / 60:.1f} min"
    return (
        f"measured over {figures['num_steps']:.0f} updates: {', '.join(speeds)}, "
        f"{figures['seconds_step']:.2f} s an update ({figures['seconds_data_wait']:.2f} s of it waiting for "
        f"data), at most {figures['peak_memory_bytes'] / 1e9:.2f} GB a rank; all {num_steps} updates with "
        f"validation, without checkpoints: about {took}"
    )
