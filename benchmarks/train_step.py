"""The consistency step compared with a plain SFT step of the same model and pack, in time and in FLOPs.

    python -m benchmarks.train_step --json

Both steps are forward, backward and AdamW in one process, alternating. The SFT step is InternVL's own: one
row, all tiles at the full rate, cross entropy at the answer positions, no reference. The lower bound of the
ratio of times is the ratio of FLOPs by `vico/objectives/flops.py` (the optimizer is part of both times and
of neither count).

On a CPU the model is a random one of medium size in float32. `--device cuda` uses InternVL3.5-1B's
published sizes in bfloat16, and adds where the device's time goes by kernel (`profile`, one more step of
each) and by part of the step (`seconds_by_part`, waiting at each part). On a CPU, `host_cpu_vs_torch_zero_1`
is the CPU time of an update under DeepSpeed divided by that of torch alone, at tiny widths
(`benchmarks/host_time.py`; ZeRO-1 and ZeRO-2, or `--zero-stage`). `--compile` compiles the layers
of all three models. `--zero-stage` adds the consistency step as a training runs it, under DeepSpeed on one
rank (float32 master weights and sums of gradients, one pack per update).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import InternVLConfig, InternVLForConditionalGeneration

from benchmarks.host_time import HOST_MICRO_STEPS, host_cpu_vs_torch
from cluster.train_settings import MemorySettings, TrainSettings
from stages.consistency.config import ConsistencyConfig
from stages.consistency.learning_rates import consistency_rates
from stages.training.engine import Engine, init_distributed
from stages.training.engine_settings import engine_settings
from stages.training.optimizer import OptimizerConfig
from stages.training.parameter_groups import parameter_groups
from tests.ports import free_port
from vico.model.compiled import compile_layers
from vico.model.internvl import VicoModel
from vico.objectives.consistency import ConsistencyTask
from vico.objectives.flops import consistency_flops, row_work, sft_flops
from vico.objectives.phases import Phases
from vico.packing import EncodedSample, PackedBatch, packed_batch
from vico.prompt import Skeleton
from vico.settings import ModelSettings

IMAGE_TOKEN_ID = 5
SIZES = {
    # 25M parameters, a third of them vision tower: large enough for products to take most of the time
    "cpu": {
        "vision": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 5, "heads": 6},
        "text": {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "heads": 6},
        "keys": 3,
        "head_dim": 64,
        "vocab_size": 16_384,
        "tile_size": 224,
        "samples": 6,
        "tiles": 2,
    },
    # InternVL3.5-1B as published: InternViT-300M and Qwen3-0.6B
    "cuda": {
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "heads": 16},
        "text": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "heads": 16},
        "keys": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tile_size": 448,
        "samples": 6,
        "tiles": 8,
    },
}


def random_model(size: dict[str, Any], device: str, dtype: torch.dtype) -> VicoModel:
    """Return an InternVL of `size` with random weights."""
    vision, text = dict(size["vision"]), dict(size["text"])
    tile, side = size["tile_size"], size["tile_size"] // 14
    config = InternVLConfig(
        vision_config={
            "num_attention_heads": vision.pop("heads"),
            "image_size": [tile, tile],
            "patch_size": [14, 14],
            "attention_bias": True,
            **vision,
        },
        text_config={
            "model_type": "qwen3",
            "num_attention_heads": text.pop("heads"),
            "num_key_value_heads": size["keys"],
            "head_dim": size["head_dim"],
            "vocab_size": size["vocab_size"],
            "tie_word_embeddings": True,
            **text,
        },
        image_token_id=IMAGE_TOKEN_ID,
        image_seq_length=(side // 2) ** 2,
        tie_word_embeddings=True,
    )
    settings = ModelSettings(
        tile_size=tile,
        tokens_full=(side // 2) ** 2,
        tokens_compressed=(side // 4) ** 2,
        vision_tokens=side * side,
        image_token_id=IMAGE_TOKEN_ID,
        min_tiles=1,
        max_tiles=12,
        use_thumbnail=True,
        vocab_size=size["vocab_size"],
    )
    torch.manual_seed(0)
    with torch.device(device):
        base = InternVLForConditionalGeneration(config).to(dtype)
    return VicoModel(base, settings)


def random_pack(size: dict[str, Any], settings: ModelSettings) -> PackedBatch:
    """Return a pack of `samples` samples with `tiles` tiles each, half of them compressed.

    Questions have 32 tokens, answers 96.
    """
    random = np.random.default_rng(0)
    samples, rates = [], []
    for number in range(size["samples"]):
        text = random.integers(10, size["vocab_size"], 32 + 96)
        ids = np.concatenate([np.full(size["tiles"], IMAGE_TOKEN_ID), text]).astype(np.int64)
        answer = np.arange(len(ids)) >= len(ids) - 96
        pixels = random.integers(0, 256, (size["tiles"], 3, settings.tile_size, settings.tile_size), np.uint8)
        skeleton = Skeleton(ids, answer, size["tiles"])
        samples.append(EncodedSample(str(number), number, skeleton, pixels))
        rates.append(np.arange(size["tiles"]) % 2 == 0)
    return packed_batch(samples, rates, settings, "sample")


def sft_loss(model: VicoModel, pack: PackedBatch) -> torch.Tensor:
    """Return the cross entropy of the answers, all tiles at the full rate, without the new connector."""
    features = model.vision_features(pack.tiles)
    full = model.full_tokens(features[pack.reference.full_tiles])
    hidden = model.answer_hidden_states(pack.reference, full, None)
    return F.cross_entropy(model.lm_head(hidden).float(), pack.reference.answer_ids)


def timed_update(
    loss_of: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, phases: Phases
) -> tuple[float, float]:
    """Run one update; return its (wall, CPU) seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started, cpu_started = time.perf_counter(), time.process_time()
    loss = loss_of()
    with phases.phase("backward"):
        loss.backward()
    with phases.phase("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - cpu_started


@dataclass
class Step:
    """One kind of step and its measurements: (wall, CPU) seconds per update, seconds by part per update."""

    loss_of: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer
    flops: float
    tokens: int
    num_tiles: int
    times: list[tuple[float, float]]
    parts: list[dict[str, float]]

    def row(self, name: str) -> dict[str, Any]:
        """Return the medians of the measurements."""
        wall, cpu = zip(*self.times, strict=True)
        median = statistics.median(wall)
        return {
            "step": name,
            "flops": self.flops,
            "seconds": median,
            "seconds_min": min(wall),
            "seconds_max": max(wall),
            "cpu_seconds": statistics.median(cpu),
            "tokens_per_second": self.tokens / median,
            "tiles_per_second": self.num_tiles / median,
            "tflops_per_second": self.flops / median / 1e12,
            "seconds_by_part": {
                part: statistics.median(seconds[part] for seconds in self.parts) for part in self.parts[0]
            },
        }


def steps_of(plain: VicoModel, task: ConsistencyTask, pack: PackedBatch) -> dict[str, Step]:
    """Return both steps by name, not measured yet."""
    config = task.policy.base.config
    policy_work, reference_work = row_work(pack.policy), row_work(pack.reference)
    sft_tokens = sum(pack.reference.lengths)
    return {
        "sft": Step(
            loss_of=lambda: sft_loss(plain, pack),
            optimizer=torch.optim.AdamW(plain.parameters(), lr=1e-5),
            flops=sft_flops(config, pack.num_tiles, reference_work),
            tokens=sft_tokens,
            num_tiles=pack.num_tiles,
            times=[],
            parts=[],
        ),
        "consistency": Step(
            loss_of=lambda: task(pack)[0],
            optimizer=torch.optim.AdamW(task.parameters(), lr=1e-5),
            flops=consistency_flops(config, pack.num_tiles, policy_work, reference_work),
            tokens=sft_tokens + sum(pack.policy.lengths),
            num_tiles=pack.num_tiles,
            times=[],
            parts=[],
        ),
    }


def measure_steps(steps: dict[str, Step], task: ConsistencyTask, device: str, repeats: int) -> None:
    """Run the steps alternating, after a warm-up, and add their measurements."""

    def alternate(by_part: bool) -> dict[str, tuple[float, float]]:
        seconds = {}
        for name, step in steps.items():
            task.phases = Phases(enabled=by_part)
            seconds[name] = timed_update(step.loss_of, step.optimizer, task.phases)
            if by_part:
                step.parts.append(task.phases.pop_seconds())
        return seconds

    together = device == "cpu"  # on CUDA a part waits for the device, and the times must not include that
    alternate(by_part=False)  # warm-up
    for _ in range(repeats):
        for name, seconds in alternate(by_part=together).items():
            steps[name].times.append(seconds)
    if not together:
        alternate(by_part=True)


def add_profiles(rows: list[dict[str, Any]], steps: dict[str, Step]) -> None:
    """Add the device seconds by kernel of one more update to the row of each step."""
    for row, step in zip(rows, steps.values(), strict=True):
        row["profile"] = kernels_of(lambda step=step: timed_update(step.loss_of, step.optimizer, Phases()))


def measured(
    device: str, repeats: int, compiled: bool, zero_stage: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return the rows of the steps and the ratios of their medians."""
    size, dtype = SIZES[device], torch.bfloat16 if device == "cuda" else torch.float32
    plain, policy, reference = (random_model(size, device, dtype) for _ in range(3))
    policy.add_compressed_connector(0)
    plain.train(), policy.train()
    if compiled:
        for model in (plain, policy, reference):
            compile_layers(model)
    task = ConsistencyTask(policy, reference, kl_chunk_rows=256)
    pack = random_pack(size, policy.settings).to(device)
    steps = steps_of(plain, task, pack)
    measure_steps(steps, task, device, repeats)
    rows = [step.row(name) for name, step in steps.items()]
    ratios = ratios_of(*rows)
    if device == "cuda":
        add_profiles(rows, steps)
    if zero_stage:
        consistency = steps["consistency"]
        counts = {"flops": consistency.flops, "tokens": consistency.tokens, "tiles": pack.num_tiles}
        del plain, consistency
        steps.clear()  # frees the plain model and both optimizers
        rows.append(engine_row(task, pack, zero_stage, dtype, repeats, counts))
    return rows, ratios


def engine_row(
    task: ConsistencyTask,
    pack: PackedBatch,
    zero_stage: int,
    dtype: torch.dtype,
    repeats: int,
    counts: dict[str, float],
) -> dict[str, Any]:
    """Return the row of the consistency step under DeepSpeed, in a process group of this process alone.

    The group stays: DeepSpeed remembers it, and takes no other in the same process.
    """
    engine = engine_of(task, zero_stage, dtype)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def timed_step() -> float:
        started = time.perf_counter()
        loss, _ = engine(pack)
        engine.backward(loss, pack.loss_weight)
        engine.step(1e-5, 0)
        loss.item()  # waits for the device
        return time.perf_counter() - started

    timed_step()  # warm-up
    seconds = [timed_step() for _ in range(repeats)]
    median = statistics.median(seconds)
    row = {
        "step": f"consistency, ZeRO-{zero_stage}",
        "flops": counts["flops"],
        "seconds": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "tokens_per_second": counts["tokens"] / median,
        "tiles_per_second": counts["tiles"] / median,
        "tflops_per_second": counts["flops"] / median / 1e12,
    }
    if torch.cuda.is_available():
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    engine.close()
    return row


def engine_of(task: ConsistencyTask, zero_stage: int, dtype: torch.dtype) -> Engine:
    """Return the task under DeepSpeed on one rank."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update({**address, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    init_distributed(timeout_s=1800)
    optimizer = OptimizerConfig(learning_rate=1e-5, dtype=str(dtype).removeprefix("torch."))
    layers = len(task.policy.base.model.vision_tower.encoder.layer)
    groups = parameter_groups(task, optimizer, consistency_rates(ConsistencyConfig(seed=0), layers))
    task.phases = Phases()
    settings = TrainSettings(memory=MemorySettings(zero_stage=zero_stage))
    return Engine(task, groups, engine_settings(optimizer, 1, settings))


# What a CUDA kernel does, by words in its name; the first match counts.
_KERNELS = (
    ("attention", ("flash", "fmha", "cudnn_generated")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk")),
    ("KL of a chunk", ("_kl_rows",)),
    ("AdamW", ("adam", "multi_tensor_apply", "foreach")),
    ("layer norm", ("layer_norm", "layernorm", "gammabeta")),
    ("GELU, SiLU", ("gelu", "silu")),
    ("copies and casts", ("copy", "memcpy", "memset", "fill", "cat")),
    ("indexing", ("index", "gather", "scatter")),
    ("sums", ("reduce",)),
    ("other elementwise", ("elementwise",)),
)


def kernels_of(step: Callable[[], tuple[float, float]]) -> list[dict[str, Any]]:
    """Return the device seconds of one step by kind of kernel, longest first, and the longest kernel of each.

    `idle` is the rest of the step's wall time.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wall, _ = step()
    seconds: dict[str, float] = {}
    longest: dict[str, tuple[float, str]] = {}
    for event in profiler.key_averages():
        kernel_seconds, name = event.self_device_time_total / 1e6, event.key
        kind = next((k for k, words in _KERNELS if any(w in name.lower() for w in words)), "other")
        seconds[kind] = seconds.get(kind, 0.0) + kernel_seconds
        longest[kind] = max(longest.get(kind, (0.0, "")), (kernel_seconds, name[:120]))
    seconds["idle"] = wall - sum(seconds.values())
    return [
        {
            "kernels": kind,
            "seconds": kind_seconds,
            "share": kind_seconds / wall,
            **({"longest": longest[kind][1], "longest_seconds": longest[kind][0]} if kind in longest else {}),
        }
        for kind, kind_seconds in sorted(seconds.items(), key=lambda pair: -pair[1])
    ]


def ratios_of(sft: dict[str, Any], consistency: dict[str, Any]) -> dict[str, float]:
    """Return the ratios of the consistency step to the SFT step; `floor` is the ratio of FLOPs."""
    floor = consistency["flops"] / sft["flops"]
    time_ratio = consistency["seconds"] / sft["seconds"]
    cpu_time_ratio = consistency["cpu_seconds"] / sft["cpu_seconds"]
    return {
        "time_vs_sft": time_ratio,
        "cpu_time_vs_sft": cpu_time_ratio,
        "flops_vs_sft": floor,
        "time_vs_floor": time_ratio / floor,
        "cpu_time_vs_floor": cpu_time_ratio / floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers, as train.compile does")
    parser.add_argument("--zero-stage", type=int, default=0, choices=[0, 1, 2, 3], help="0: omit this row")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device: adds `mfu` to the rows")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none")
    torch.set_num_threads(1)
    if options.compile and options.zero_stage == 3:
        parser.error("--compile cannot be combined with --zero-stage 3")
    rows, ratios = measured(options.device, options.repeats, options.compile, options.zero_stage)
    if options.device == "cpu":
        for stage in [options.zero_stage] if options.zero_stage else [1, 2]:
            host = host_cpu_vs_torch(stage, HOST_MICRO_STEPS, options.repeats)
            rows.append({"step": "host", **host})
            ratios[f"host_cpu_vs_torch_zero_{stage}"] = host["host_cpu_vs_torch"]
    for row in rows:
        if options.peak_tflops:
            row["mfu"] = row.get("tflops_per_second", 0.0) / options.peak_tflops
        print(row, file=sys.stderr)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    print(json.dumps({"name": "train_step", "device": options.device, "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    main()
