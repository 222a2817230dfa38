"""One rank that runs whole trainings, one after another: checkpoints, resumes, faults.

`python -m tests.numerics.training_case MODEL FOLDER SCENARIO...`, each scenario a JSON object:
`name` (folder of the stage), `attempt`, `zero_stage`, `dtype`; `fused` (AdamW as on CUDA); `site` (blocks of
the site's `train` settings); `stop_after` a step (as a kill would end it); `nan_at`, `nan_gradient_at` or
`hang_at` a step, on `rank`; `sleep_s` per pack; `validate_every` so many steps, each written to
`validated-<rank>.txt` with the attempt; `tamper`: changes to the metadata of the last checkpoint, with
`probe_loss` as a factor; `seconds_per_step`: for each rank, by how much the loop's clock advances with every
step.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cluster.train_settings import TrainSettings
from stages.parts import Parts
from stages.training import loop
from stages.training.checkpoints import METADATA_FILE, CheckpointDiffers, checkpoints, read_metadata
from stages.training.engine import Engine, init_distributed
from stages.training.engine_settings import engine_settings
from stages.training.faults import Diverged, Preempted
from stages.training.loop import StageTask, TrainingLoop, TrainingPlan
from stages.training.optimizer import OptimizerConfig
from stages.training.parameter_groups import parameter_groups
from stages.training.speed.throughput import measure_throughput
from tests.numerics.consistency_case import PACKS_PER_STEP, RATES, SEED, consistency_task, pack
from vico.packing import PackedBatch, packed_batch
from vico.prompt import load_prompt_format

NUM_STEPS, CHECKPOINT_EVERY = 20, 5
FLOAT32 = OptimizerConfig(learning_rate=1e-3, weight_decay=0.05, grad_clip=1.0)


class Stopped(Exception):
    """The scenario ends here, as a kill would have ended it."""


class Packs:
    """Packs by (step, number). A fault of the scenario happens when a pack is read."""

    num_steps = NUM_STEPS

    def __init__(self, model_folder: Path, rank: int, scenario: dict[str, Any]):
        self._format, self._scenario = load_prompt_format(model_folder), scenario
        self._has_faults = rank == scenario.get("rank")

    def packs(self, step: int) -> list[tuple[int, int]]:
        return [(step, number) for number in range(PACKS_PER_STEP)]

    def batch(self, step_and_number: tuple[int, int]) -> PackedBatch:
        step, number = step_and_number
        time.sleep(self._scenario.get("sleep_s", 0))
        batch = pack(self._format, step % 10, number)
        if self._has_faults and step == self._scenario.get("hang_at"):
            time.sleep(3600)
        if self._has_faults and step == self._scenario.get("nan_at"):
            batch.weights_A.fill_(float("nan"))
        return batch

    def empty(self) -> PackedBatch:
        return packed_batch([], [], self._format.settings, "sample")


def engine_of(
    model_folder: Path, site: TrainSettings, optimizer: OptimizerConfig, fused: bool = False
) -> Engine:
    task = consistency_task(model_folder, getattr(torch, optimizer.dtype))
    settings = engine_settings(optimizer, PACKS_PER_STEP, site)
    settings = replace(settings, fused=settings.fused or fused)
    engine = Engine(task, parameter_groups(task, optimizer, RATES), settings)
    task.phases = engine.phases
    return engine


def plan_of(parts: Parts, site: TrainSettings, validate_every: int = NUM_STEPS) -> TrainingPlan:
    return TrainingPlan(
        purpose="test",
        seed=SEED,
        num_steps=NUM_STEPS,
        learning_rate=lambda step: FLOAT32.learning_rate_at(step, NUM_STEPS),
        parts=parts,
        site=site,
        validate_every_steps=validate_every,
    )


def site_of(scenario: dict[str, Any]) -> TrainSettings:
    stage = scenario["zero_stage"]
    # ZeRO-3 partitions every parameter, however small: the case that fails first
    deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    blocks = scenario.get("site", {})
    return TrainSettings.model_validate(
        {
            **blocks,
            "memory": {"zero_stage": stage, **blocks.get("memory", {})},
            "checkpoints": {"every_steps": CHECKPOINT_EVERY, **blocks.get("checkpoints", {})},
            "deepspeed": deepspeed,
        }
    )


class Validation:
    """Writes which attempt validates which step."""

    def __init__(self, folder: Path, attempt: int):
        self._folder, self._attempt = folder, attempt

    def __call__(self, engine: Engine, step: int) -> dict[str, float]:
        with (self._folder / f"validated-{engine.rank}.txt").open("a") as file:
            file.write(f"{self._attempt} {step}\n")
        return {"step": float(step)}


class Clock:
    """Stands in for `time` in the loop: moves with the steps, and by a microsecond with every look at it."""

    def __init__(self, seconds_per_step: float):
        self._now, self._seconds_per_step = 0.0, seconds_per_step

    def monotonic(self) -> float:
        self._now += 1e-6
        return self._now

    def step(self) -> None:
        self._now += self._seconds_per_step


class StepWatch:
    """The metrics of a step; counts the steps, writes the count to `rank-<r>-step.txt`, and stops where the
    scenario says so."""

    def __init__(self, folder: Path, engine: Engine, step: int, stop_after: int | None, clock: Clock):
        self._folder, self._engine, self._stop_after = folder, engine, stop_after
        self.step, self._clock = step, clock

    def __call__(self, sums: Mapping[str, float]) -> dict[str, float]:
        self.step += 1
        self._clock.step()
        (self._folder / f"rank-{self._engine.rank}-step.txt").write_text(str(self.step))
        if self.step == self._stop_after:
            self._engine.wait_for_checkpoint()  # so that the next step publishes it on every rank
        if self.step - 1 == self._stop_after:
            raise Stopped
        return {"samples": sums["samples"]}


def tamper(checkpoint: Path, changes: dict[str, Any]) -> None:
    """Change the metadata of a checkpoint; `probe_loss` is a factor."""
    metadata = read_metadata(checkpoint)
    probe_loss = changes.get("probe_loss", 1.0) * metadata["probe_loss"]
    (checkpoint / METADATA_FILE).write_text(json.dumps({**metadata, **changes, "probe_loss": probe_loss}))


def measure(model_folder: Path, scenario: dict[str, Any], parts: Parts, optimizer: OptimizerConfig) -> None:
    """Measure some updates, as before a training."""
    engine = engine_of(model_folder, site_of(scenario), optimizer)
    source = Packs(model_folder, engine.rank, scenario)
    measure_throughput(engine, source, plan_of(parts, site_of(scenario)), lambda: None)
    engine.close()


def train_scenario(model_folder: Path, folder: Path, scenario: dict[str, Any]) -> None:
    """Train; rank 0 writes `weights-<attempt>.pt` at the end, a rank that fails `outcome-<rank>.txt`."""
    attempt, site = scenario["attempt"], site_of(scenario)
    optimizer = FLOAT32.model_copy(update={"dtype": scenario.get("dtype", "float32")})
    parts = Parts(folder, attempt)
    if site.profiling.throughput_steps:
        measure(model_folder, scenario, parts, optimizer)
    engine = engine_of(model_folder, site, optimizer, scenario.get("fused", False))
    written = checkpoints(parts)
    clock = Clock(scenario.get("seconds_per_step", [0.0] * engine.world_size)[engine.rank])
    watch = StepWatch(folder, engine, written[-1][0] if written else 0, scenario.get("stop_after"), clock)
    if "tamper" in scenario and engine.rank == 0:
        tamper(written[-1][1], scenario["tamper"])
    if "nan_gradient_at" in scenario and engine.rank == scenario["rank"]:
        at = scenario["nan_gradient_at"]
        bias = engine.module.policy.base.model.vision_tower.encoder.layer[0].attention.projection_layer.bias
        bias.register_hook(lambda grad: grad * float("nan") if watch.step == at else grad)
    engine.barrier()
    task = StageTask(Packs(model_folder, engine.rank, scenario), watch, Validation(folder, attempt))
    plan = plan_of(parts, site, scenario.get("validate_every", NUM_STEPS))
    try:
        with mock.patch.object(loop, "time", clock if "seconds_per_step" in scenario else time):
            TrainingLoop(engine, task, plan).run()
        state = engine.whole_state()
        if state is not None:
            torch.save(state, folder / f"weights-{attempt}.pt")
    except Stopped:
        pass
    except (CheckpointDiffers, Diverged, Preempted) as error:
        (folder / f"outcome-{engine.rank}.txt").write_text(f"{type(error).__name__}: {error}")
    engine.close()


if __name__ == "__main__":
    model, out, *scenarios = sys.argv[1:]
    torch.set_num_threads(1)
    init_distributed(timeout_s=1800)
    for text in scenarios:
        content = json.loads(text)
        stage_folder = Path(out) / content["name"]
        stage_folder.mkdir(parents=True, exist_ok=True)
        train_scenario(Path(model), stage_folder, content)
    torch.distributed.destroy_process_group()  # otherwise its threads still run when the process ends
