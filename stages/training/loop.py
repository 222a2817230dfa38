"""The training loop of the stages consistency and router: one update per step, checkpoints, validation,
metrics.

A position in a training is one number, the step: what a step contains depends on nothing else.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.metric_lines import STEP_METRICS_FILE, MetricsWriter
from cluster.train_settings import TrainSettings
from stages.outputs import KERNELS_FILE
from stages.parts import Parts
from stages.training.checkpoints import Checkpoints
from stages.training.engine import Engine
from stages.training.faults import LossWatch, Preempted, StopNotice, Watchdog, stop_notice
from stages.training.kept_batches import KeptBatches
from stages.training.optimizer import OptimizerConfig
from stages.training.speed.profiling import StepTrace, kernels_in_use, speed_metrics
from stages.training.step import (
    Batch,
    NumberedBatch,
    Prefetch,
    StepSource,
    Update,
    probe_loss,
    train_step,
)

logger = logging.getLogger(__name__)
Metrics = Mapping[str, float]


class TrainingConfig(Protocol):
    """What the hashed config of a training stage must have."""

    @property
    def seed(self) -> int: ...

    @property
    def optimizer(self) -> OptimizerConfig: ...

    @property
    def validate_every_steps(self) -> int: ...


@dataclass(frozen=True)
class TrainingPlan:
    """What the loop needs besides engine and data: seeds, schedule, folders, and when to validate and
    save."""

    purpose: str
    seed: int
    num_steps: int
    learning_rate: Callable[[int], float]
    parts: Parts
    site: TrainSettings
    validate_every_steps: int

    def update(self, step: int) -> Update:
        """Return the update of a step, counted from 0."""
        return Update(step, self.learning_rate(step), self.seed, self.purpose)


def training_plan(
    purpose: str, config: TrainingConfig, num_steps: int, parts: Parts, site: TrainSettings
) -> TrainingPlan:
    """Return the plan of a stage's hashed config on this site."""
    return TrainingPlan(
        purpose=purpose,
        seed=config.seed,
        num_steps=num_steps,
        learning_rate=lambda step: config.optimizer.learning_rate_at(step, num_steps),
        parts=parts,
        site=site,
        validate_every_steps=config.validate_every_steps,
    )


@dataclass(frozen=True)
class StageTask:
    """What a stage adds to the loop: its data, and the metrics of a step and of a validation."""

    source: StepSource[Any]
    summary: Callable[[Metrics], Metrics]
    """Turns the sums of a step over all ranks into metrics."""
    validate: Callable[[Engine, int], Metrics]
    """Returns the metrics of calibration data after so many updates; every rank calls it."""
    finished: Callable[[int], bool] = lambda step: False
    """Returns whether the training ends after so many updates, before its last step; alike on every rank."""


@dataclass(frozen=True)
class FinishedStep:
    """One step: sums over all ranks, and the seconds that this rank spent, also those waiting for data."""

    sums: dict[str, float]
    seconds: float
    seconds_data_wait: float


class TrainingLoop:
    """Trains from the last complete checkpoint to the last step of the plan. Every rank runs the same loop.

    Metrics go to the attempt's file from rank 0. `run` raises Preempted after a stop notice to any rank, when
    the checkpoint is published, and Diverged if the numbers go wrong.
    """

    def __init__(self, engine: Engine, task: StageTask, plan: TrainingPlan):
        folder, rank = plan.parts.attempt_folder, engine.rank
        folder.mkdir(parents=True, exist_ok=True)
        self._engine, self._task, self._plan = engine, task, plan
        self._done = 0  # updates
        self._last_checkpoint_s = time.monotonic()  # or the start, as long as there is none
        self._resume_metrics: Metrics = {}
        self._loss_watch = LossWatch(plan.site.divergence)
        self._watchdog = Watchdog(folder, rank, plan.site.restarts.hang_timeout_s)
        self._prefetch = Prefetch(task.source, rank, engine.world_size)
        self._trace = StepTrace(folder, rank, plan.site.profiling.trace_steps)
        self._report = MetricsWriter(folder / STEP_METRICS_FILE) if rank == 0 else None
        kernels = kernels_in_use(compiled=plan.site.compile)
        if rank == 0:
            logger.info("computes with %s", kernels)
            (folder / KERNELS_FILE).write_text(f"{kernels}\n", encoding="utf-8")
        probed = KeptBatches[Batch]()
        self._checkpoints = Checkpoints(
            engine,
            plan.parts,
            plan.site.checkpoints.keep,
            lambda step: probe_loss(engine, task.source, step, probed),
            kernels=kernels,
            # the metrics of its steps: without them, a power failure would leave a gap in the curve
            before_publishing=self._report.sync if self._report else lambda: None,
        )
        engine.phases.enabled = plan.site.profiling.profile

    def run(self) -> int:
        """Train to the end, from the last checkpoint if there is one; return the number of updates."""
        try:
            with stop_notice(self._plan.parts.attempt_folder, self._engine.rank) as notice:
                self._resume()
                while self._done < self._plan.num_steps and not self._task.finished(self._done):
                    self._step(notice)
                self._trace.close(self._done)
                self._checkpoints.finish()
        finally:
            self._prefetch.close()
            self._watchdog.close()
        return self._done

    def _resume(self) -> None:
        """Load the last checkpoint and make the validation that was postponed when it was written."""
        start = self._checkpoints.restore()
        self._done, self._resume_metrics = start.step, start.metrics
        if start.kept.get("validation_due"):
            self._watchdog.step_done(self._done)
            self._append(self._validation())
        self._loss_watch = LossWatch(
            self._plan.site.divergence, start.kept.get("losses"), self._engine.num_skipped_steps
        )

    def _step(self, notice: StopNotice) -> None:
        """Make one update and what is due after it."""
        step = self._update(notice)
        metrics = self._metrics(step)
        stop = step.sums["stop"] > 0 and self._done < self._plan.num_steps
        validate = self._validation_due()
        if validate and not stop:  # after a notice only seconds may be left: the resume validates first
            metrics |= self._validation()
        if self._checkpoint_due(stop, by_time=step.sums["checkpoint_due"] > 0):
            self._last_checkpoint_s = time.monotonic()
            kept = {"losses": self._loss_watch.state, "validation_due": validate and stop}
            self._checkpoints.begin(self._done, kept)
            metrics["seconds_checkpoint"] = self._checkpoints.seconds_stopped
        self._append(metrics)
        if stop:
            self._stop()

    def _update(self, notice: StopNotice) -> FinishedStep:
        """Load the batches, make the update, and publish a checkpoint that all ranks have written."""
        self._watchdog.step_done(self._done)
        self._trace.begin(self._done + 1)
        self._engine.phases.pop_seconds()  # discards the seconds of a validation
        started = time.monotonic()
        batches = self._batches()
        seconds_data_wait = time.monotonic() - started
        flags = {
            "stop": float(notice.given()),
            "written": float(self._checkpoints.written()),
            "checkpoint_due": float(self._time_is_due()),
        }
        sums = train_step(self._engine, batches, self._plan.update(self._done), flags=flags)
        self._checkpoints.publish_if(sums["written"] == self._engine.world_size)
        self._done += 1
        seconds = time.monotonic() - started
        self._trace.end(self._done)
        return FinishedStep(sums, seconds, seconds_data_wait)

    def _batches(self) -> Sequence[NumberedBatch]:
        return self._prefetch.batches(self._done, self._plan.num_steps)

    def _metrics(self, step: FinishedStep) -> dict[str, float]:
        """Return the metrics of a step; raise Diverged if there were too many faults."""
        sums, engine, resumed = step.sums, self._engine, self._resume_metrics
        self._resume_metrics = {}  # only with the first step
        faults = self._loss_watch.counts(
            self._done, sums["loss"], sums["grad_norm"], engine.num_skipped_steps
        )
        return {
            **self._task.summary(sums),
            **faults,
            **resumed,
            "loss": sums["loss"],
            "grad_norm": sums["grad_norm"],
            "learning_rate": self._plan.learning_rate(self._done - 1),
            "seconds_data_wait": step.seconds_data_wait,
            "seconds_step": step.seconds,
            **{f"seconds_{phase}": seconds for phase, seconds in engine.phases.pop_seconds().items()},
            **speed_metrics(sums, step.seconds, engine.world_size, self._plan.site.profiling.peak_tflops),
        }

    def _validation_due(self) -> bool:
        return self._done % self._plan.validate_every_steps == 0 or self._done == self._plan.num_steps

    def _validation(self) -> dict[str, float]:
        metrics = self._task.validate(self._engine, self._done)
        return {f"validation_{name}": value for name, value in metrics.items()}

    def _checkpoint_due(self, stop: bool, *, by_time: bool) -> bool:
        is_last = self._done == self._plan.num_steps  # then the result itself is written
        by_steps = self._done % self._plan.site.checkpoints.every_steps == 0
        return not is_last and (stop or by_steps or by_time)

    def _time_is_due(self) -> bool:
        """Return whether a checkpoint is due by rank 0's clock; the ranks have to agree, so others say no."""
        every_s = self._plan.site.checkpoints.every_s
        passed_s = time.monotonic() - self._last_checkpoint_s
        return self._engine.rank == 0 and every_s is not None and passed_s >= every_s

    def _append(self, metrics: Metrics) -> None:
        if self._report:
            self._report.append(self._done, metrics)

    def _stop(self) -> None:
        """Publish the checkpoint of this step and raise Preempted."""
        self._checkpoints.finish()
        raise Preempted(
            "a rank got SIGTERM, or its node will be taken away; "
            f"step {self._done} is done and its checkpoint published"
        )
