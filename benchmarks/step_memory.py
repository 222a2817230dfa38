"""Peak memory of a whole update under DeepSpeed, counted by torch's allocator, next to the memory model.

    python -m benchmarks.step_memory --json

One rank on a CPU, a small model with few activations: weights, optimizer, gradients and DeepSpeed's buffers
decide, which `benchmarks/saved_bytes.py` does not count. A CPU has only one memory, so what offloading keeps
in host memory counts, too; models are built in place, so nothing is read into host memory first. `ratio` is
the memory model over the count.
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.train_step import random_model, random_pack
from cluster.train_settings import TrainSettings
from stages.consistency.config import ConsistencyConfig
from stages.consistency.learning_rates import consistency_rates
from stages.training.engine import Engine, init_distributed
from stages.training.engine_settings import engine_settings
from stages.training.optimizer import OptimizerConfig
from stages.training.parameter_groups import parameter_groups
from stages.training.step import Update, train_step
from tests.ports import free_port
from vico.memory.model_sizes import model_sizes
from vico.memory.training_memory import GradientExchange, TrainingShape, rank_memory
from vico.objectives.consistency import ConsistencyTask

SIZE: dict[str, Any] = {
    "vision": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "heads": 2},
    "text": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "heads": 4},
    "keys": 2,
    "head_dim": 64,
    "vocab_size": 16_384,
    "tile_size": 56,
    "samples": 1,
    "tiles": 2,
}
_CHUNK_ROWS = 16
_UPDATES = 2
_COUNTED = "counted update"


@dataclass(frozen=True)
class Setting:
    """What differs between the rows; `fused` is the AdamW of CUDA."""

    zero_stage: int
    dtype: str = "bfloat16"
    packs: int = 2
    offload: str = "none"
    bucket_elements: int = 2 * 10**6
    gradient_sums: str = "float32"
    fused: bool = True


SETTINGS = (
    *(Setting(stage) for stage in (1, 2, 3)),
    *(Setting(stage, offload="optimizer") for stage in (1, 2, 3)),
    *(Setting(stage, dtype="float32") for stage in (1, 2, 3)),
    *(Setting(stage, fused=False) for stage in (1, 2, 3)),
    *(Setting(stage, bucket_elements=5 * 10**7) for stage in (1, 2, 3)),
    Setting(1, packs=1),
    Setting(2, packs=1, dtype="float32"),
    Setting(2, gradient_sums="bfloat16", bucket_elements=5 * 10**7),
)


def measured(setting: Setting) -> dict[str, Any]:
    """Return the row of a setting, in a process group that exists already."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        dtype = getattr(torch, setting.dtype)
        policy, reference = (random_model(SIZE, "cpu", dtype) for _ in range(2))
        policy.add_compressed_connector(0)
        task = ConsistencyTask(policy.train(), reference, _CHUNK_ROWS)
        pack = random_pack(SIZE, policy.settings)
        with engine_of(task, setting) as engine:
            for update in range(_UPDATES):
                with record_function(_COUNTED if update == _UPDATES - 1 else "update"):
                    packs = [(number, pack) for number in range(setting.packs)]
                    train_step(engine, packs, Update(update, 1e-5, 0, "benchmark"))
    counted = peak_bytes(profiler)
    sizes = model_sizes(policy.base.config.to_dict())
    shape = TrainingShape(
        tokens=sum(pack.policy.lengths),
        tiles=pack.num_tiles,
        num_ranks=1,
        weight_bytes=dtype.itemsize,
        zero_stage=setting.zero_stage,
        offload=setting.offload,
        reference="replicated",
        checkpointing="none",
        train_vision=True,
        kl_chunk_rows=_CHUNK_ROWS,
        packs_per_rank=setting.packs,
        exchange=GradientExchange(
            sum_bytes=getattr(torch, setting.gradient_sums).itemsize, bucket_elements=setting.bucket_elements
        ),
        fused=setting.fused,
    )
    memory, without = rank_memory(sizes, shape), rank_memory(sizes, replace(shape, offload="none"))
    computed = memory.device + memory.host - without.host  # the models are not read from files here
    return {**asdict(setting), "counted": counted, "computed": computed, "ratio": computed / counted}


@contextmanager
def engine_of(task: ConsistencyTask, setting: Setting) -> Iterator[Engine]:
    """Return the task under DeepSpeed on one rank, closed at the end."""
    optimizer = OptimizerConfig(learning_rate=1e-5, dtype=setting.dtype, gradient_sums=setting.gradient_sums)
    layers = len(task.policy.base.model.vision_tower.encoder.layer)
    groups = parameter_groups(task, optimizer, consistency_rates(ConsistencyConfig(seed=0), layers))
    site = {
        "memory": {"zero_stage": setting.zero_stage, "offload": setting.offload},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": setting.bucket_elements}},
    }
    settings = engine_settings(optimizer, setting.packs, TrainSettings.model_validate(site))
    engine = Engine(task, groups, replace(settings, fused=setting.fused))
    try:
        yield engine
    finally:
        engine.close()


def peak_bytes(profiler: profile) -> int:
    """Return the most bytes that were allocated during the counted update since the profiler started."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    update = next(event for event in events if event.name() == _COUNTED)
    begin, end = update.start_ns(), update.start_ns() + update.duration_ns()
    allocated = peak = 0
    for event in events:
        if event.name() == "[memory]":
            allocated += event.nbytes()
            if begin <= event.start_ns() <= end:
                peak = max(peak, allocated)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.parse_args()
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update({**address, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    init_distributed(timeout_s=1800)
    rows = []
    for setting in SETTINGS:
        rows.append(measured(setting))
        print(rows[-1], file=sys.stderr, flush=True)
    furthest = max(abs(row["ratio"] - 1) for row in rows)
    print(json.dumps({"name": "step_memory", "rows": rows, "ratios": {"furthest_from_1": furthest}}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
