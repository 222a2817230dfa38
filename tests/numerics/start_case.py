"""One rank that starts consistency trainings under ZeRO-3 as the stage does, from models that are read whole
and from unread ones.

`python -m tests.numerics.start_case MODEL START OUT CASE...`, each case a JSON object: `name`, `way` (`whole`
or `unread`), `config` (fields of the consistency stage), `site` (its `train` block), `joint` (the policy
starts from START), `resume`. Every case makes two updates, with `resume` writes a checkpoint, loads it into a
new start and makes a third one, and writes the policy's folder and its losses into `OUT/<name>-<way>`.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cluster.train_settings import TrainSettings
from stages.consistency import worker
from stages.consistency.config import ConsistencyConfig
from stages.consistency.packs import ConsistencySettings, JointInputs
from stages.parts import Parts
from stages.training.engine import Engine, init_distributed
from stages.training.step import Update, share_of_rank, train_step
from tests.numerics.consistency_case import PACKS_PER_STEP, SEED, pack
from vico.checkpoints import load_model
from vico.checkpoints.save import save_model
from vico.model.unread import UnreadParameter
from vico.packing import packed_batch
from vico.prompt import load_prompt_format


class Held:
    """Records the most elements of parameters that this rank has read and not yet spread."""

    def __init__(self) -> None:
        self.most, self._filled, self._fill = 0, [], UnreadParameter.fill
        held = self

        def fill(parameter: UnreadParameter, values: torch.Tensor) -> None:
            held._fill(parameter, values)
            held._filled.append(parameter)
            held.most = max(held.most, sum(p.data.numel() for p in held._filled))

        UnreadParameter.fill = fill


def settings_of(model: Path, start: Path, folder: Path, case: dict[str, Any]) -> ConsistencySettings:
    config = ConsistencyConfig.model_validate(
        {"seed": SEED, "packs_per_step": PACKS_PER_STEP, **case["config"]}
    )
    # ZeRO-3 partitions every parameter, however small
    zero = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    memory = {"zero_stage": 3, "reference": "sharded"}
    site = TrainSettings.model_validate({"memory": memory, "deepspeed": zero, **case.get("site", {})})
    joint = JointInputs(start, folder) if case.get("joint") else None
    return ConsistencySettings(config, folder, model, Parts(folder, 1), site, joint)


def update(engine: Engine, model: Path, step: int) -> list[float]:
    """Make one update; return its loss and the norm of its gradient."""
    prompt_format = load_prompt_format(model)
    packs = [pack(prompt_format, step, number) for number in range(PACKS_PER_STEP)]
    empty = packed_batch([], [], prompt_format.settings, "sample")
    share = [
        (number, empty if batch is None else batch)
        for number, batch in share_of_rank(packs, engine.rank, engine.world_size)
    ]
    sums = train_step(engine, share, Update(step, 1e-3, SEED, "start"))
    return [sums["loss"], sums["grad_norm"]]


def state_of(engine: Engine, folder: Path, name: str) -> None:
    """Write the policy's whole tensors, with its buffers, from rank 0."""
    state = worker.policy_state(engine)
    if state is not None:
        buffers = {f"buffer.{key}": value for key, value in engine.module.named_buffers()}
        tensors = {key: value.clone().contiguous() for key, value in {**state, **buffers}.items()}
        save_file(tensors, folder / name)


def run(model: Path, start: Path, out: Path, case: dict[str, Any], held: Held) -> None:
    folder = out / f"{case['name']}-{case['way']}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(model, start, folder, case)
    held.most, held._filled = 0, []
    engine = worker.build_engine(settings)
    (folder / f"held-{engine.rank}.txt").write_text(str(held.most))
    state_of(engine, folder, "start.safetensors")
    numbers = [update(engine, model, step) for step in range(2)]
    if case["resume"]:
        engine.write_checkpoint(folder / "checkpoint", "state")
        engine.wait_for_checkpoint()
        engine.barrier()
        engine.close()
        engine = worker.build_engine(settings)
        engine.load_checkpoint(folder / "checkpoint", "state", universal=False)
        numbers.append(update(engine, model, 2))
    state = worker.policy_state(engine)
    if state is not None:
        save_model(state, model, folder / "policy")
        (folder / "numbers.json").write_text(json.dumps(numbers))
    engine.close()


def refused(*_: object) -> None:
    raise AssertionError("a model was read whole")


if __name__ == "__main__":
    model_folder, start_folder, out_folder, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    init_distributed(timeout_s=1800)
    recorded, open_unread = Held(), worker.open_unread
    worker.compile_layers = partial(worker.compile_layers, backend="aot_eager")
    for text in cases:
        content = json.loads(text)
        whole = content["way"] == "whole"
        worker.open_unread = load_model if whole else open_unread
        reads_policy = content.get("site", {}).get("memory", {}).get("zero_stage", 3) < 3
        worker.load_model = load_model if whole or reads_policy else refused
        run(Path(model_folder), Path(start_folder), Path(out_folder), content, recorded)
    torch.distributed.destroy_process_group()  # otherwise its threads still run when the process ends
