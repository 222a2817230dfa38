"""The consistency step of InternVL3.5-1B in several settings, each with its time, MFU and peak memory.

    python -m benchmarks.device_steps --group compiled --device cuda --out rows.jsonl

A group is a list of settings that one process measures one after another; a row is written as soon as it is
measured, so that a process that is stopped leaves the rows before. A setting that fails (out of memory, a
kernel that is not installed) gives a row with the reason. Rows under DeepSpeed also have the memory that
`vico/memory/` computes for them. On a CPU the model is a tiny one, which shows only that every setting runs.
"""

import argparse
import gc
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.host_time import SIZE
from benchmarks.reports import append_row
from benchmarks.train_step import SIZES, engine_of, random_model, random_pack
from vico.errors import UserError, one_line
from vico.memory.model_sizes import model_sizes
from vico.memory.training_memory import TrainingShape, rank_memory
from vico.model.attention_kernels import row_kernel, use_attention
from vico.model.compiled import compile_layers
from vico.model.recomputed import recompute_layers
from vico.objectives.consistency import ConsistencyTask
from vico.objectives.flops import consistency_flops, row_work
from vico.objectives.phases import Phases
from vico.packing import PackedBatch


@dataclass(frozen=True)
class Setting:
    """What differs between the steps of a group. `zero_stage` 0: torch alone."""

    samples: int = 6
    """Samples of 8 tiles each on CUDA: 6 are a pack of 48 tiles, 12 one of 96."""
    checkpointing: str = "none"
    compiled: bool = False
    zero_stage: int = 0
    rows: str = "auto"
    vision: str = "auto"
    kl_chunk_rows: int = 1024


_CPU_SIZE = SIZE | {
    "vision": SIZE["vision"] | {"num_hidden_layers": 2},
    "text": SIZE["text"] | {"num_hidden_layers": 2},
}

GROUPS: dict[str, list[Setting]] = {
    "compiled": [
        Setting(compiled=True),
        Setting(12, "selective", compiled=True),
        Setting(12, "full", compiled=True),
    ],
    "deepspeed": [
        Setting(compiled=True, zero_stage=2),
        Setting(12, "selective", compiled=True, zero_stage=2),
        Setting(zero_stage=1),
    ],
    "plain": [Setting(), Setting(12), Setting(12, "selective"), Setting(12, "full"), Setting(6, "selective")],
    "attention": [
        *(Setting(rows=name) for name in ("flash-attn-4", "flash-attn-3", "flash-attn-2", "torch")),
        *(Setting(vision=name) for name in ("cudnn", "flash", "efficient")),
    ],
}


@dataclass
class Case:
    """A setting with its model and pack on the device."""

    setting: Setting
    task: ConsistencyTask
    pack: PackedBatch
    dtype: torch.dtype

    @classmethod
    def of(cls, setting: Setting, device: str, backend: str) -> "Case":
        size = (SIZES["cuda"] if device == "cuda" else _CPU_SIZE) | {"samples": setting.samples}
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        use_attention(setting.rows, setting.vision)
        if device == "cuda":  # refuses a kernel that is not there before a model is made
            row_kernel(torch.cuda.get_device_capability()[0], size["head_dim"], dropout=0.0)
        policy, reference = random_model(size, device, dtype), random_model(size, device, dtype)
        policy.add_compressed_connector(0)
        policy.train()
        if setting.compiled:
            for model in (policy, reference):
                compile_layers(model, backend)
        recompute_layers(policy, setting.checkpointing)
        pack = random_pack(size, policy.settings).to(device)
        return cls(setting, ConsistencyTask(policy, reference, setting.kl_chunk_rows), pack, dtype)

    @property
    def flops(self) -> float:
        pack, config = self.pack, self.task.policy.base.config
        return consistency_flops(config, pack.num_tiles, row_work(pack.policy), row_work(pack.reference))

    @property
    def tokens(self) -> int:
        return sum(self.pack.policy.lengths) + sum(self.pack.reference.lengths)

    def computed_bytes(self) -> int:
        """Return the device memory that the memory model gives for the step under DeepSpeed."""
        shape = TrainingShape(
            tokens=sum(self.pack.policy.lengths),
            tiles=self.pack.num_tiles,
            num_ranks=1,
            weight_bytes=self.dtype.itemsize,
            zero_stage=self.setting.zero_stage,
            offload="none",
            reference="replicated",
            checkpointing=self.setting.checkpointing,
            train_vision=True,
            kl_chunk_rows=self.setting.kl_chunk_rows,
            packs_per_rank=1,
        )
        return rank_memory(model_sizes(self.task.policy.base.config.to_dict()), shape).device


def step_seconds(case: Case, repeats: int) -> list[float]:
    """Return the seconds of updates by torch alone, after two to warm up."""
    optimizer = torch.optim.AdamW(case.task.parameters(), lr=1e-5, fused=True)
    case.task.phases = Phases()

    def update() -> None:
        case.task(case.pack)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(update, repeats)


def engine_seconds(case: Case, repeats: int) -> list[float]:
    """Return the seconds of updates under DeepSpeed, in a process group of this process alone.

    The group stays for the next setting: DeepSpeed remembers it, and takes no other in the same process.
    """
    engine = engine_of(case.task, case.setting.zero_stage, case.dtype)

    def update() -> None:
        loss, _ = engine(case.pack)
        engine.backward(loss, case.pack.loss_weight)
        engine.step(1e-5, 0)

    try:
        return timed(update, repeats)
    finally:
        engine.close()


def timed(update: Any, repeats: int) -> list[float]:
    """Return the seconds of `repeats` updates, after two to warm up."""
    seconds = []
    for _ in range(repeats + 2):
        synchronise()
        started = time.perf_counter()
        update()
        synchronise()
        seconds.append(time.perf_counter() - started)
    return seconds[2:]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a setting, or why it could not be measured."""
    device, repeats, peak_tflops = options.device, options.repeats, options.peak_tflops
    row: dict[str, Any] = asdict(setting)
    held_gb = torch.cuda.memory_allocated() / 1e9 if device == "cuda" else 0.0  # of the settings before
    try:
        case = Case.of(setting, device, options.backend)
        row["tiles"] = case.pack.num_tiles
        if device == "cuda":
            row["held_before_gb"] = held_gb
            torch.cuda.reset_peak_memory_stats()
        seconds = engine_seconds(case, repeats) if setting.zero_stage else step_seconds(case, repeats)
    except (UserError, RuntimeError, ValueError, AssertionError) as error:  # out of memory is a RuntimeError
        return {**row, "skipped": one_line(f"{type(error).__name__}: {error}", max_chars=300)}
    median = statistics.median(seconds)
    row |= {
        "seconds": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "tokens_per_second": case.tokens / median,
        "tiles_per_second": case.pack.num_tiles / median,
        "tflops_per_second": case.flops / median / 1e12,
    }
    if peak_tflops:
        row["mfu"] = row["tflops_per_second"] / peak_tflops
    if device == "cuda":
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if setting.zero_stage:
        row["computed_memory_gb"] = case.computed_bytes() / 1e9
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", choices=list(GROUPS), required=True)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--out", type=Path, help="file that gets one line of JSON per row")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--backend", default="inductor", help="compiler of compiled layers; eager for a try")
    parser.add_argument(
        "--ends-s", type=float, help="start no setting after this time of the monotonic clock"
    )
    parser.add_argument("--peak-tflops", type=float, help="peak of the device: adds `mfu`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for setting in GROUPS[options.group]:
        if options.ends_s is not None and time.monotonic() > options.ends_s:
            row = {**asdict(setting), "skipped": "no time left"}
        else:
            row = measured(setting, options)
        print(row, file=sys.stderr, flush=True)
        append_row(options.out, row)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
