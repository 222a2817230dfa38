"""CPU time of the host per update: the consistency step under DeepSpeed compared with torch alone.

    python -m benchmarks.host_time --zero-stage 2 --micro-steps 4 --json

The model has the layers of InternVL3.5-1B (about 760 parameters) at widths so small that computing takes
almost no time: what is left is the work of the host, which a GPU would wait for. Both ways make the same
updates of the same packs in float32, on one thread, alternating: forward and backward of `--micro-steps`
packs, clipping, AdamW (torch's fused one). Times are CPU seconds of this process, so other processes on the
machine do not count.
"""

import argparse
import cProfile
import json
import os
import pstats
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from cluster.train_settings import TrainSettings
from stages.consistency.config import ConsistencyConfig
from stages.consistency.learning_rates import consistency_rates
from stages.training.engine import Engine, init_distributed
from stages.training.engine_settings import engine_settings
from stages.training.optimizer import OptimizerConfig
from stages.training.parameter_groups import ParameterGroup, parameter_groups
from stages.training.step import Update, train_step
from tests.ports import free_port
from vico.objectives.consistency import ConsistencyTask
from vico.packing import PackedBatch

SIZE: dict[str, Any] = {
    "vision": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 24, "heads": 2},
    "text": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 28, "heads": 2},
    "keys": 1,
    "head_dim": 8,
    "vocab_size": 128,
    "tile_size": 56,
    "samples": 1,
    "tiles": 2,
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-5)
HOST_MICRO_STEPS = 4
"""Packs of one rank per update, when this measurement is part of another benchmark."""
Packs = Sequence[PackedBatch]


def task_and_groups() -> tuple[ConsistencyTask, list[ParameterGroup], PackedBatch]:
    """Return the task of a small model with many parameters, its parameter groups, and a pack."""
    from benchmarks.train_step import random_model, random_pack

    policy, reference = (random_model(SIZE, "cpu", torch.float32) for _ in range(2))
    policy.add_compressed_connector(0)
    task = ConsistencyTask(policy.train(), reference, kl_chunk_rows=256)
    layers = len(policy.base.model.vision_tower.encoder.layer)
    groups = parameter_groups(task, OPTIMIZER, consistency_rates(ConsistencyConfig(seed=0), layers))
    return task, groups, random_pack(SIZE, policy.settings)


def torch_update(task: ConsistencyTask, groups: Sequence[ParameterGroup], packs: Packs) -> Callable[[], None]:
    """Return an update of the packs with torch alone."""
    parameters = [parameter for group in groups for parameter in group.parameters]
    optimizer = torch.optim.AdamW(
        [{"params": list(group.parameters), "weight_decay": group.weight_decay} for group in groups],
        lr=OPTIMIZER.learning_rate,
        fused=True,
    )
    weight = sum(pack.loss_weight for pack in packs)

    def update() -> None:
        for pack in packs:
            (task(pack)[0] / weight).backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def engine_update(engine: Engine, packs: Packs) -> Callable[[], None]:
    """Return an update of the packs as a training makes it."""
    numbered = list(enumerate(packs))
    return lambda: void(train_step(engine, numbered, Update(0, OPTIMIZER.learning_rate, 0, "benchmark")))


def void(_: object) -> None:
    """Return nothing."""


def engine_of(
    task: ConsistencyTask,
    groups: Sequence[ParameterGroup],
    zero_stage: int,
    packs: int,
    keys: Mapping[str, Any],
) -> Engine:
    """Return the task under DeepSpeed on one rank; `keys` are a site's keys of `zero_optimization`."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update({**address, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    if not torch.distributed.is_initialized():
        init_distributed(timeout_s=1800)
    site = {"memory": {"zero_stage": zero_stage}, "deepspeed": {"zero_optimization": keys}}
    settings = TrainSettings.model_validate(site)
    return Engine(task, groups, engine_settings(OPTIMIZER, packs, settings))


def cpu_seconds(update: Callable[[], None]) -> float:
    """Return the CPU seconds of one update."""
    started = time.process_time()
    update()
    return time.process_time() - started


def host_cpu_vs_torch(
    zero_stage: int,
    micro_steps: int,
    repeats: int,
    keys: Mapping[str, Any] = MappingProxyType({}),
    profile: bool = False,
) -> dict[str, Any]:
    """Return one row: CPU seconds per update of both ways (medians) and their ratio.

    `keys` are a site's keys of `zero_optimization`.
    """
    torch.set_num_threads(1)
    task, groups, pack = task_and_groups()
    packs = [pack] * micro_steps
    alone = torch_update(task, groups, packs)
    own_task, own_groups, _ = task_and_groups()
    engine = engine_of(own_task, own_groups, zero_stage, micro_steps, keys)
    under_engine = engine_update(engine, packs)
    pairs = [(cpu_seconds(alone), cpu_seconds(under_engine)) for _ in range(repeats + 1)][1:]
    if profile:
        profiler = cProfile.Profile()
        profiler.runcall(under_engine)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(35)
    num_parameters = sum(len(group.parameters) for group in groups)
    engine.close()
    return {
        "way": f"ZeRO-{zero_stage}" + "".join(f", {key}: {value}" for key, value in keys.items()),
        "micro_steps": micro_steps,
        "parameters": num_parameters,
        "torch_cpu_seconds": statistics.median(seconds for seconds, _ in pairs),
        "engine_cpu_seconds": statistics.median(seconds for _, seconds in pairs),
        "host_cpu_vs_torch": statistics.median(under / seconds for seconds, under in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--zero-stage", type=int, nargs="+", default=[1, 2], choices=[1, 2, 3])
    parser.add_argument("--micro-steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--keys", type=json.loads, nargs="+", default=[{}], help="JSON of zero_optimization")
    parser.add_argument("--profile", action="store_true", help="print where the host's time goes")
    options = parser.parse_args()
    rows = [
        host_cpu_vs_torch(stage, micro_steps, options.repeats, keys, options.profile)
        for keys in options.keys
        for stage in options.zero_stage
        for micro_steps in options.micro_steps
    ]
    ratios = {f"{row['way']}_{row['micro_steps']}_micro_steps": row["host_cpu_vs_torch"] for row in rows}
    print(json.dumps({"name": "host_time", "rows": rows, "ratios": ratios}) if options.json else rows)


if __name__ == "__main__":
    main()
