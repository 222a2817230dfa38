"""The consistency step against a plain SFT step of the same model and pack, and against the FLOPs of both.

`python -m benchmarks.train_step --json`. Both steps are forward, backward and AdamW in one process, taken in
turns. The SFT step is InternVL's own: one row, all tiles at the full rate, cross entropy at the answer
positions, no reference. The floor of the ratio of times is the ratio of FLOPs by `vico/objectives/flops.py` (the
optimizer is in the times of both and in neither count). On a CPU a middle-sized random model in float32;
`--device cuda` takes InternVL3.5-1B's published sizes in bfloat16, and adds by kernel where the device's time
goes (`profile`, one more step of each) and by part of the step (`seconds_by_part`, waiting at each part).
`--compile` compiles the layers of all three models; `--zero-stage` adds the consistency step as a training
takes it, under DeepSpeed on one rank (float32 master weights and sums of gradients, one pack an update).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F
from transformers import InternVLConfig, InternVLForConditionalGeneration

from cluster.site import TrainSettings
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
    # 25M parameters, a third of them vision tower: large enough that products take most of the time
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


def random_model(size: dict, device: str, dtype: torch.dtype) -> VicoModel:
    """An InternVL of `size` with random weights."""
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


def random_pack(size: dict, settings: ModelSettings) -> PackedBatch:
    """`samples` samples of `tiles` tiles each (a 32 token question, an answer of 96), half of the tiles
    compressed."""
    random = np.random.default_rng(0)
    samples, rates = [], []
    for number in range(size["samples"]):
        text = random.integers(10, size["vocab_size"], 32 + 96)
        ids = np.concatenate([np.full(size["tiles"], IMAGE_TOKEN_ID), text]).astype(np.int64)
        answer = np.arange(len(ids)) >= len(ids) - 96
        pixels = random.standard_normal((size["tiles"], 3, settings.tile_size, settings.tile_size))
        skeleton = Skeleton(ids, answer, size["tiles"])
        samples.append(EncodedSample(str(number), number, skeleton, pixels.astype(np.float32)))
        rates.append(np.arange(size["tiles"]) % 2 == 0)
    return packed_batch(samples, rates, settings, "sample")


def sft_loss(model: VicoModel, pack: PackedBatch) -> torch.Tensor:
    """Cross entropy of the answers, all tiles at the full rate, with the pretrained connector alone."""
    features = model.vision_features(pack.pixel_values)
    full = model.full_tokens(features[pack.reference.full_tiles])
    hidden = model.answer_hidden_states(pack.reference, full, None)
    return F.cross_entropy(model.lm_head(hidden).float(), pack.reference.answer_ids)


def seconds_of(loss_of: Callable[[], torch.Tensor], optimizer, phases: Phases) -> tuple[float, float]:
    """(wall, CPU) seconds of one update."""
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


def measured(
    device: str, repeats: int, compiled: bool, zero_stage: int
) -> tuple[list[dict], dict[str, float]]:
    """Rows of the steps and the ratios of their medians."""
    size, dtype = SIZES[device], torch.bfloat16 if device == "cuda" else torch.float32
    plain, policy, reference = (random_model(size, device, dtype) for _ in range(3))
    policy.add_compressed_connector(0)
    plain.train(), policy.train()
    if compiled:
        for model in (plain, policy, reference):
            compile_layers(model)
    task = ConsistencyTask(policy, reference, kl_chunk_rows=256)
    pack = random_pack(size, policy.settings).to(device)
    config = policy.base.config
    rows = {
        "sft": sft_flops(config, pack.num_tiles, row_work(pack.reference)),
        "consistency": consistency_flops(
            config, pack.num_tiles, row_work(pack.policy), row_work(pack.reference)
        ),
    }
    tokens = {"sft": sum(pack.reference.lengths)}
    tokens["consistency"] = tokens["sft"] + sum(pack.policy.lengths)
    steps = {"sft": lambda: sft_loss(plain, pack), "consistency": lambda: task(pack)[0]}
    optimizers = {
        "sft": torch.optim.AdamW(plain.parameters(), lr=1e-5),
        "consistency": torch.optim.AdamW(task.parameters(), lr=1e-5),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in rows}

    def turn(phases: bool) -> dict[str, tuple[float, float]]:
        taken = {}
        for name in rows:
            task.phases = Phases(enabled=phases)
            taken[name] = seconds_of(steps[name], optimizers[name], task.phases)
            if phases:
                parts[name].append(task.phases.taken())
        return taken

    together = device == "cpu"  # on CUDA a part waits for the device, which the times are not to hold
    turn(phases=False)  # warms up
    for _ in range(repeats):
        for name, spent in turn(phases=together).items():
            times[name].append(spent)
    if not together:
        turn(phases=True)
    found = _rows(rows, tokens, pack.num_tiles, times, parts)
    if device == "cuda":
        for row, name in zip(found[0], rows, strict=True):
            row["profile"] = kernels_of(lambda name=name: seconds_of(steps[name], optimizers[name], Phases()))
    if zero_stage:
        del plain
        steps.clear(), optimizers.clear()
        under_zero = {"flops": rows["consistency"], "tokens": tokens["consistency"], "tiles": pack.num_tiles}
        found[0].append(engine_row(task, pack, zero_stage, dtype, repeats, under_zero))
    return found


def engine_row(task, pack, zero_stage, dtype, repeats, counts: dict[str, float]) -> dict:
    """The consistency step under DeepSpeed in a process group of this process alone."""
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update({**here, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    init_distributed(timeout_s=1800)
    optimizer = OptimizerConfig(learning_rate=1e-5, dtype=str(dtype).removeprefix("torch."))
    layers = len(task.policy.base.model.vision_tower.encoder.layer)
    groups = parameter_groups(task, optimizer, consistency_rates(ConsistencyConfig(), layers))
    task.phases = Phases()
    engine = Engine(task, groups, engine_settings(optimizer, 1, TrainSettings(zero_stage=zero_stage)))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        started = time.perf_counter()
        loss, _ = engine(pack)
        engine.backward(loss, pack.loss_weight)
        engine.step(1e-5, 0)
        loss.item()  # waits for the device
        return time.perf_counter() - started

    step()  # warms up
    spent = [step() for _ in range(repeats)]
    middle = statistics.median(spent)
    row = {
        "step": f"consistency, ZeRO-{zero_stage}",
        "flops": counts["flops"],
        "seconds": middle,
        "seconds_min": min(spent),
        "seconds_max": max(spent),
        "tokens_per_second": counts["tokens"] / middle,
        "tiles_per_second": counts["tiles"] / middle,
        "tflops_per_second": counts["flops"] / middle / 1e12,
    }
    if torch.cuda.is_available():
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    engine.close()
    torch.distributed.destroy_process_group()
    return row


# What a CUDA kernel does, by words of its name; the first that fits.
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


def kernels_of(step: Callable[[], object]) -> list[dict]:
    """Device seconds of one step by kind of kernel, longest first, and each kind's longest kernel; `idle` is
    what is left of the step's wall time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        wall, _ = step()
    seconds: dict[str, float] = {}
    longest: dict[str, tuple[float, str]] = {}
    for event in profiler.key_averages():
        spent, name = event.self_device_time_total / 1e6, event.key
        kind = next((k for k, words in _KERNELS if any(w in name.lower() for w in words)), "other")
        seconds[kind] = seconds.get(kind, 0.0) + spent
        longest[kind] = max(longest.get(kind, (0.0, "")), (spent, name[:120]))
    seconds["idle"] = wall - sum(seconds.values())
    return [
        {
            "kernels": kind,
            "seconds": spent,
            "share": spent / wall,
            **({"longest": longest[kind][1], "longest_seconds": longest[kind][0]} if kind in longest else {}),
        }
        for kind, spent in sorted(seconds.items(), key=lambda one: -one[1])
    ]


def _rows(flops, tokens, num_tiles, times, parts) -> tuple[list[dict], dict[str, float]]:
    rows = []
    for name, spent in times.items():
        wall, cpu = ([one[i] for one in spent] for i in (0, 1))
        middle = statistics.median(wall)
        rows.append(
            {
                "step": name,
                "flops": flops[name],
                "seconds": middle,
                "seconds_min": min(wall),
                "seconds_max": max(wall),
                "cpu_seconds": statistics.median(cpu),
                "tokens_per_second": tokens[name] / middle,
                "tiles_per_second": num_tiles / middle,
                "tflops_per_second": flops[name] / middle / 1e12,
                "seconds_by_part": {
                    part: statistics.median(one[part] for one in parts[name]) for part in parts[name][0]
                },
            }
        )
    sft, ours = rows
    floor = ours["flops"] / sft["flops"]
    ratios = {
        "time_vs_sft": ours["seconds"] / sft["seconds"],
        "cpu_time_vs_sft": ours["cpu_seconds"] / sft["cpu_seconds"],
        "flops_vs_sft": floor,
        "time_vs_floor": ours["seconds"] / sft["seconds"] / floor,
        "cpu_time_vs_floor": ours["cpu_seconds"] / sft["cpu_seconds"] / floor,
    }
    return rows, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layers, as train.compile does")
    parser.add_argument("--zero-stage", type=int, default=0, choices=[0, 1, 2, 3], help="0: no such row")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device: adds `mfu` to the rows")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none")
    torch.set_num_threads(1)
    if options.compile and options.zero_stage == 3:
        parser.error("--compile does not go with --zero-stage 3")
    rows, ratios = measured(options.device, options.repeats, options.compile, options.zero_stage)
    for row in rows:
        if options.peak_tflops:
            row["mfu"] = row["tflops_per_second"] / options.peak_tflops
        print(row, file=sys.stderr)
    print(json.dumps({"name": "train_step", "device": options.device, "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    main()
