"""The training loop of consistency and router: packs of a step over ranks, one update a step, checkpoints,
metrics.

What a step holds depends on the step alone (never on ranks), so a position in training is one number.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed import ReduceOp, all_reduce

from cluster.site import TrainSettings
from stages.engine import FACTS_FILE, Engine
from stages.parts import Parts
from vico.errors import UserError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


class StepSource(Protocol):
    """Where packs come from: both are functions of the step and of the pack alone."""

    num_steps: int

    def packs(self, step: int) -> Sequence[Any]:
        """The G packs of a step, empty ones included."""

    def batch(self, pack: Any) -> Any:
        """The pack decoded: something with `.to(device)` and `.loss_weight`."""


@dataclass(frozen=True)
class TrainingPlan:
    """What the loop needs beside engine and data: randomness, schedule, where and how often to save and
    report."""

    purpose: str
    seed: int
    num_steps: int
    learning_rate: Callable[[int], float]
    parts: Parts
    checkpoint_every_steps: int
    keep_checkpoints: int
    validate_every_steps: int


def training_plan(
    purpose: str, config: Any, num_steps: int, parts: Parts, site: TrainSettings
) -> TrainingPlan:
    """The plan of a stage's hashed config (with `seed`, `optimizer`, `validate_every_steps`) on this site."""
    return TrainingPlan(
        purpose=purpose,
        seed=config.seed,
        num_steps=num_steps,
        learning_rate=lambda step: config.optimizer.learning_rate_at(step, num_steps),
        parts=parts,
        checkpoint_every_steps=site.checkpoint_every_steps,
        keep_checkpoints=site.keep_checkpoints,
        validate_every_steps=config.validate_every_steps,
    )


def derived_seed(*what: int | str) -> int:
    """A seed that depends on all of `what` (seed, purpose, step, pack, ...) and on nothing else; 63 bits."""
    digest = hashlib.sha256("/".join(str(part) for part in what).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def share_of_rank(packs: Sequence[Any], rank: int, world_size: int) -> list[tuple[int, Any]]:
    """(number in the step, pack) of each micro-step of this rank; the last may lie past the step's packs
    (None)."""
    num_micro_steps = -(-len(packs) // world_size)
    numbers = [micro * world_size + rank for micro in range(num_micro_steps)]
    return [(number, packs[number] if number < len(packs) else None) for number in numbers]


class Prefetch:
    """Decodes the packs of the coming step in a thread while the current one trains."""

    def __init__(self, source: StepSource, empty: Callable[[], Any], rank: int, world_size: int):
        self._source, self._empty, self._rank, self._world_size = source, empty, rank, world_size
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._coming: dict[int, Any] = {}

    def _batches(self, step: int) -> list[tuple[int, Any]]:
        mine = share_of_rank(self._source.packs(step), self._rank, self._world_size)
        return [(n, self._empty() if pack is None else self._source.batch(pack)) for n, pack in mine]

    def batches(self, step: int, last_step: int) -> list[tuple[int, Any]]:
        """The batches of `step`, waiting for them where need be; starts on those of the next step."""
        ready = self._coming.pop(step, None) or self._pool.submit(self._batches, step)
        found = ready.result()
        if step + 1 < last_step:
            self._coming[step + 1] = self._pool.submit(self._batches, step + 1)
        return found

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def sum_over_ranks(values: Mapping[str, float | torch.Tensor], device: torch.device) -> dict[str, float]:
    """Each value summed over ranks, float64; every rank must give the same names in the same order."""
    total = torch.stack(
        [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values.values()]
    )
    all_reduce(total, ReduceOp.SUM)
    return dict(zip(values, total.tolist(), strict=True))


def train_step(
    engine: Engine,
    batches: Sequence[tuple[int, Any]],
    plan: TrainingPlan,
    step: int,
    before_update: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """One optimizer update on this rank's packs; the loss is the weighted sum over the packs of all ranks.

    Returns sums over ranks (what the module counts, `loss`) and the gradient norm. `before_update` is
    called when the step's gradients are complete.
    """
    loss_weight = sum_over_ranks({"w": sum(batch.loss_weight for _, batch in batches)}, engine.device)["w"]
    sums: dict[str, torch.Tensor] = {}
    for micro_step, (number, batch) in enumerate(batches, start=1):
        torch.manual_seed(derived_seed(plan.seed, plan.purpose, step, number))
        loss_sum, counts = engine(batch.to(engine.device))
        engine.backward(loss_sum, denominator=max(loss_weight, 1e-12))
        if micro_step == len(batches):
            before_update()
        engine.step(plan.learning_rate(step))
        counts = {"loss": loss_sum.detach() / max(loss_weight, 1e-12), **counts}
        sums = {name: sums.get(name, 0) + value for name, value in counts.items()}
    return {**sum_over_ranks(sums, engine.device), "grad_norm": engine.grad_norm()}


def train(
    engine: Engine,
    source: StepSource,
    empty: Callable[[], Any],
    plan: TrainingPlan,
    summary: Callable[[Mapping[str, float]], Mapping[str, float]],
    validate: Callable[[Engine], Mapping[str, float]],
) -> None:
    """Trains from the last complete checkpoint to `plan.num_steps`, saving, validating and reporting on the
    way.

    `summary` turns the sums of a step into metrics, `validate` gives metrics of the calibration data.
    Metrics go to the attempt's file from rank 0.
    """
    step = resume(engine, plan)
    prefetch = Prefetch(source, empty, engine.rank, engine.world_size)
    report = MetricsFile(plan.parts.attempt_folder / "metrics.jsonl") if engine.rank == 0 else None
    skipped = engine.num_skipped_steps
    while step < plan.num_steps:
        started = time.monotonic()
        batches = prefetch.batches(step, plan.num_steps)
        waited = time.monotonic() - started
        sums = train_step(engine, batches, plan, step)
        step += 1
        metrics = {
            **summary(sums),
            "loss": sums["loss"],
            "grad_norm": sums["grad_norm"],
            "learning_rate": plan.learning_rate(step - 1),
            "skipped_steps": float(engine.num_skipped_steps - skipped),
            "seconds_data_wait": waited,
            "seconds_step": time.monotonic() - started,
        }
        if step % plan.validate_every_steps == 0 or step == plan.num_steps:
            metrics.update({f"validation_{name}": value for name, value in validate(engine).items()})
        if report:
            report.append(step, metrics)
        if step % plan.checkpoint_every_steps == 0 and step < plan.num_steps:
            save(engine, plan, step)
    prefetch.close()


def resume(engine: Engine, plan: TrainingPlan) -> int:
    """Loads the last complete checkpoint where there is one; the number of updates done."""
    found = checkpoints(plan.parts)
    if not found:
        return 0
    step, folder = found[-1]
    facts = json.loads((folder / FACTS_FILE).read_text())
    if facts["world_size"] != engine.world_size:
        raise UserError(
            f"{folder} was written by {facts['world_size']} ranks, this attempt has {engine.world_size}: set "
            f"resources.workers={facts['world_size']} in the site, or start anew with --force {plan.purpose}"
        )
    engine.load_checkpoint(folder)
    logger.info("goes on from step %d (%s)", step, folder)
    return step


def save(engine: Engine, plan: TrainingPlan, step: int) -> None:
    """Publishes the checkpoint of `step` and removes all but the newest `keep_checkpoints`."""
    name = f"{CHECKPOINTS}/step-{step:07d}"
    if not plan.parts.done(name):
        engine.save_checkpoint(plan.parts, name, {"step": step, "world_size": engine.world_size})
    if engine.rank == 0:
        for _, folder in checkpoints(plan.parts)[: -plan.keep_checkpoints]:
            shutil.rmtree(folder)


def checkpoints(parts: Parts) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first."""
    return sorted(
        (int(path.name.removeprefix("step-")), path) for path in parts.output.glob(f"{CHECKPOINTS}/step-*")
    )


class MetricsFile:
    """Appends metrics by step, one JSON object a line, each line in one write."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": time.time(), "metrics": dict(metrics)}) + "\n")


def read_metrics(parts: Parts) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of the whole training over all attempts, each step once (the first report counts)."""
    steps: dict[int, dict[str, float]] = {}
    attempts = sorted(
        (parts.folder / "attempts").glob("*/metrics.jsonl"), key=lambda path: int(path.parent.name)
    )
    for path in attempts:
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # a killed writer leaves half a line
                entry = json.loads(line)
                steps.setdefault(entry["step"], entry["metrics"])
    return sorted(steps.items())


CURVE_METRICS = ("loss", "grad_norm", "learning_rate", "kl_per_token", "share_compressed", "accuracy")


def publish_curve(parts: Parts) -> dict[str, float]:
    """Writes `curve.parquet` (step, name, value) of the figures that depend on the data alone; returns the
    last ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        (step, name, value)
        for step, metrics in read_metrics(parts)
        for name, value in metrics.items()
        if name in CURVE_METRICS or name.startswith("validation_")
    ]
    steps, names, values = zip(*rows, strict=True) if rows else ((), (), ())
    pq.write_table(pa.table({"step": steps, "name": names, "value": values}), parts.partial("curve.parquet"))
    parts.publish("curve.parquet", replace=True)
    return {f"last_{name}": value for _, name, value in rows}


def remove_checkpoints(parts: Parts) -> None:
    """Drops what only a resume needs, once the stage's result is published."""
    shutil.rmtree(parts.output / CHECKPOINTS, ignore_errors=True)
