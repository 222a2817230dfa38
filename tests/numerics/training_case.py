"""One rank that goes through whole trainings, one after another: checkpoints, resumes, faults.

`python -m tests.numerics.training_case MODEL FOLDER SCENARIO...`, each scenario a JSON object:
`name` (folder of the stage), `attempt`, `zero_stage`, `dtype`; `stop_after` a step (as a kill would end it);
`nan_at`, `nan_gradient_at` or `hang_at` a step and the `rank` it befalls; `sleep_s` a pack;
`validate_every` so many steps, each noted in `validated-<rank>.txt` with the attempt; `tamper` the
last checkpoint's facts with these, `probe_loss` being a factor.
"""

import json
import sys
import time
from pathlib import Path

import torch

from cluster.site import TrainSettings
from stages.parts import Parts
from stages.training.checkpoints import FACTS_FILE, CheckpointDiffers, checkpoints
from stages.training.engine import Engine, init_distributed
from stages.training.engine_settings import engine_settings
from stages.training.faults import Diverged, Preempted
from stages.training.loop import TrainingPlan, train
from stages.training.optimizer import OptimizerConfig
from stages.training.parameter_groups import parameter_groups
from stages.training.throughput import measure_throughput
from tests.numerics.consistency_case import PACKS_PER_STEP, RATES, SEED, consistency_task, pack
from vico.packing import PackedBatch, packed_batch
from vico.prompt import load_prompt_format

NUM_STEPS, CHECKPOINT_EVERY = 20, 5
FLOAT32 = OptimizerConfig(learning_rate=1e-3, weight_decay=0.05, grad_clip=1.0)


class Stopped(Exception):
    """The scenario ends here, as a kill would have ended it."""


class Packs:
    """Packs by (step, number); what goes wrong happens where a pack is read."""

    num_steps = NUM_STEPS

    def __init__(self, model_folder: Path, rank: int, scenario: dict):
        self._format, self._scenario = load_prompt_format(model_folder), scenario
        self._befalls = rank == scenario.get("rank")

    def packs(self, step: int) -> list[tuple[int, int]]:
        return [(step, number) for number in range(PACKS_PER_STEP)]

    def batch(self, place: tuple[int, int]) -> PackedBatch:
        step, number = place
        time.sleep(self._scenario.get("sleep_s", 0))
        made = pack(self._format, step % 10, number)
        if self._befalls and step == self._scenario.get("hang_at"):
            time.sleep(3600)
        if self._befalls and step == self._scenario.get("nan_at"):
            made.weights_A.fill_(float("nan"))
        return made

    def empty(self) -> PackedBatch:
        return packed_batch([], [], self._format.settings, "sample")


def engine_of(model_folder: Path, site: TrainSettings, optimizer: OptimizerConfig) -> Engine:
    task = consistency_task(model_folder, getattr(torch, optimizer.dtype))
    settings = engine_settings(optimizer, PACKS_PER_STEP, site)
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


def train_scenario(model_folder: Path, folder: Path, scenario: dict) -> None:
    """Trains; rank 0 writes `weights-<attempt>.pt` at the end, a rank that fails `outcome-<rank>.txt`."""
    stage, attempt = scenario["zero_stage"], scenario["attempt"]
    # ZeRO-3 partitions every parameter, however small: the case that fails first
    zero = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    site = TrainSettings(
        zero_stage=stage,
        deepspeed=zero,
        checkpoint_every_steps=CHECKPOINT_EVERY,
        hang_timeout_s=scenario.get("hang_timeout_s", 1800),
        **scenario.get("site", {}),
    )
    optimizer = FLOAT32.model_copy(update={"dtype": scenario.get("dtype", "float32")})
    parts = Parts(folder, attempt)
    if site.throughput_steps:
        measured = engine_of(model_folder, site, optimizer)
        plan = plan_of(parts, site)
        source = Packs(model_folder, measured.rank, scenario)
        measure_throughput(measured, source, source.empty, plan, lambda engine: None)
        measured.close()
    engine = engine_of(model_folder, site, optimizer)
    source = Packs(model_folder, engine.rank, scenario)
    plan = plan_of(parts, site, scenario.get("validate_every", NUM_STEPS))
    found = checkpoints(parts)
    step = found[-1][0] if found else 0

    def summary(sums: dict) -> dict[str, float]:
        nonlocal step
        step += 1
        (folder / f"rank-{engine.rank}-step.txt").write_text(str(step))
        if step == scenario.get("stop_after"):
            engine.wait_for_checkpoint()  # so that the next step publishes it on every rank
        if step - 1 == scenario.get("stop_after"):
            raise Stopped
        return {"samples": sums["samples"]}

    def validate(engine: Engine, step: int) -> dict[str, float]:
        with (folder / f"validated-{engine.rank}.txt").open("a") as file:
            file.write(f"{attempt} {step}\n")
        return {"step": float(step)}

    if scenario.get("tamper") and engine.rank == 0:
        facts = found[-1][1] / FACTS_FILE
        content = json.loads(facts.read_text())
        changed = {**scenario["tamper"]}
        changed["probe_loss"] = changed.get("probe_loss", 1.0) * content["probe_loss"]
        facts.write_text(json.dumps({**content, **changed}))
    if "nan_gradient_at" in scenario and engine.rank == scenario["rank"]:
        bias = engine.module.policy.base.model.vision_tower.encoder.layer[0].attention.projection_layer.bias
        bias.register_hook(lambda grad: grad * float("nan") if step == scenario["nan_gradient_at"] else grad)
    engine.barrier()
    try:
        train(engine, source, source.empty, plan, summary, validate)
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
        wanted = json.loads(text)
        place = Path(out) / wanted["name"]
        place.mkdir(parents=True, exist_ok=True)
        train_scenario(Path(model), place, wanted)
    torch.distributed.destroy_process_group()  # its threads would be there when the process ends
