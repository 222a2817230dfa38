"""The training loop of consistency and router: packs of a step over ranks, one update a step, checkpoints,
metrics.

What a step holds depends on the step alone (never on ranks), so a position in training is one number.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch.distributed import ReduceOp, all_reduce

from cluster.site import TrainSettings
from stages.parts import Parts
from stages.training.checkpoints import Checkpoints
from stages.training.engine import Engine
from stages.training.faults import Diverged, LossWatch, Preempted, Watchdog, stop_notice
from stages.training.metrics import MetricsFile
from stages.training.profiling import StepTrace, kernels_in_use, speed_metrics


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
    site: TrainSettings
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
        site=site,
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
    flags: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """One optimizer update on this rank's packs; the loss is the weighted sum over the packs of all ranks.

    Returns sums over ranks (what the module counts, `loss`, `flags`) and the gradient norm. `before_update`
    is called when the step's gradients are complete. Raises Diverged on every rank, before the update, when
    the loss of a pack is not finite.
    """
    loss_weight = sum_over_ranks({"w": sum(batch.loss_weight for _, batch in batches)}, engine.device)["w"]
    sums: dict[str, torch.Tensor] = {}
    losses: list[tuple[int, torch.Tensor]] = []
    for micro_step, (number, batch) in enumerate(batches, start=1):
        torch.manual_seed(derived_seed(plan.seed, plan.purpose, step, number))
        loss_sum, counts = engine(batch.to(engine.device))
        engine.backward(loss_sum, denominator=max(loss_weight, 1e-12))
        losses.append((number, loss_sum.detach()))
        counts = {"loss": loss_sum.detach() / max(loss_weight, 1e-12), **counts}
        sums = {name: sums.get(name, 0) + value for name, value in counts.items()}
        if micro_step == len(batches):
            before_update()
            totals = sum_over_ranks({**sums, **(flags or {})}, engine.device)
            if not math.isfinite(totals["loss"]):
                _raise_not_finite(step, losses)
        engine.step(plan.learning_rate(step), step)
    return {**totals, "grad_norm": engine.grad_norm()}


def _raise_not_finite(step: int, losses: Sequence[tuple[int, torch.Tensor]]) -> NoReturn:
    """Names, on every rank, the packs of the step whose loss is not finite."""
    mine = [(number, float(loss)) for number, loss in losses if not torch.isfinite(loss)]
    found: list[list[tuple[int, float]]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    packs = ", ".join(
        f"pack {number}: {loss}" for number, loss in sorted(one for rank in found for one in rank)
    )
    raise Diverged(
        f"step {step + 1}: the loss is not finite ({packs}), the update was not made; look at the samples of "
        "the step (vico audit RUN --step), lower optimizer.learning_rate, or train in float32"
    )


def probe_loss(engine: Engine, source: StepSource, step: int) -> float:
    """Loss sum of the first pack of the last of `step` updates, without dropout: the same on every rank."""
    batch = source.batch(source.packs(step - 1)[0])
    engine.module.eval()
    with torch.no_grad():
        loss, _ = engine(batch.to(engine.device))
    engine.module.train()
    return float(loss)


def train(
    engine: Engine,
    source: StepSource,
    empty: Callable[[], Any],
    plan: TrainingPlan,
    summary: Callable[[Mapping[str, float]], Mapping[str, float]],
    validate: Callable[[Engine, int], Mapping[str, float]],
) -> None:
    """Trains from the last complete checkpoint to `plan.num_steps`, saving, validating and reporting on the
    way.

    `summary` turns the sums of a step into metrics, `validate(engine, step)` gives those of calibration data.
    Metrics go to the attempt's file from rank 0. Raises Preempted after notice (`StopNotice`) to any rank,
    its checkpoint published; Diverged where the numbers go wrong.
    """
    folder = plan.parts.attempt_folder
    folder.mkdir(parents=True, exist_ok=True)
    watchdog = Watchdog(folder, engine.rank, plan.site.hang_timeout_s)
    prefetch = Prefetch(source, empty, engine.rank, engine.world_size)
    try:
        with stop_notice(folder, engine.rank) as notice:
            _steps(engine, source, plan, summary, validate, prefetch, notice, watchdog)
    finally:
        prefetch.close()
        watchdog.close()


def _steps(engine, source, plan, summary, validate, prefetch, notice, watchdog) -> None:
    def validation(step: int) -> dict[str, float]:
        return {f"validation_{name}": value for name, value in validate(engine, step).items()}

    report = MetricsFile(plan.parts.attempt_folder / "metrics.jsonl") if engine.rank == 0 else None
    checkpoints = Checkpoints(
        engine,
        plan.parts,
        plan.site.keep_checkpoints,
        lambda step: probe_loss(engine, source, step),
        kernels=kernels_in_use(plan.site),
        # of the steps in it: without them a machine that loses its power would leave a gap in the curve
        before_publishing=report.sync if report else lambda: None,
    )
    step, resumed, kept = checkpoints.restore()
    if kept.get("validation_due"):
        watchdog.step_done(step)
        figures = validation(step)
        if report:
            report.append(step, figures)
    watch = LossWatch(plan.site, kept.get("losses"), engine.num_skipped_steps)
    engine.phases.enabled = plan.site.profile
    trace = StepTrace(plan.parts.attempt_folder, engine.rank, plan.site.trace_steps)
    while step < plan.num_steps:
        watchdog.step_done(step)
        trace.begin(step + 1)
        engine.phases.taken()  # what validation left
        started = time.monotonic()
        batches = prefetch.batches(step, plan.num_steps)
        waited = time.monotonic() - started
        flags = {"stop": float(notice.given()), "written": float(checkpoints.written())}
        sums = train_step(engine, batches, plan, step, flags=flags)
        checkpoints.publish_if(sums["written"] == engine.world_size)
        step += 1
        seconds = time.monotonic() - started
        trace.end(step)
        counts = watch.counts(step, sums["loss"], sums["grad_norm"], engine.num_skipped_steps)
        metrics = {
            **summary(sums),
            **counts,
            **resumed,
            "loss": sums["loss"],
            "grad_norm": sums["grad_norm"],
            "learning_rate": plan.learning_rate(step - 1),
            "seconds_data_wait": waited,
            "seconds_step": seconds,
            **{f"seconds_{part}": spent for part, spent in engine.phases.taken().items()},
            **speed_metrics(sums, seconds, engine.world_size, plan.site),
        }
        resumed = {}
        stop = sums["stop"] > 0 and step < plan.num_steps
        validation_due = step % plan.validate_every_steps == 0 or step == plan.num_steps
        if validation_due and not stop:  # after notice there may be seconds: whoever goes on does it first
            metrics.update(validation(step))
        if step < plan.num_steps and (stop or step % plan.site.checkpoint_every_steps == 0):
            checkpoints.begin(step, {"losses": watch.state, "validation_due": validation_due and stop})
            metrics["seconds_checkpoint"] = checkpoints.seconds_stopped
        if report:
            report.append(step, metrics)
        if stop:
            checkpoints.finish()
            raise Preempted(
                "a rank got SIGTERM, or its node will be taken away; "
                f"step {step} is done and its checkpoint published"
            )
    trace.close(step)
    checkpoints.finish()
