"""The consistency step against a plain SFT step of the same model and pack, and against the FLOPs of both.

`python -m benchmarks.train_step --json`. Both steps are forward, backward and AdamW in one process, taken in
turns. The SFT step is InternVL's own: one row, all tiles at the full rate, cross entropy at the answer
positions, no reference. The floor of the ratio of times is the ratio of FLOPs by `vico/flops.py` (the
optimizer is in the times of both and in neither count). On a CPU a middle-sized random model in float32;
`--device cuda` takes InternVL3.5-1B's published sizes in bfloat16; it was not run yet, no CUDA device was
at hand.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F
from transformers import InternVLConfig, InternVLForConditionalGeneration

from vico.consistency import ConsistencyTask
from vico.flops import consistency_flops, row_work, sft_flops
from vico.model import VicoModel
from vico.packing import EncodedSample, PackedBatch, packed_batch
from vico.phases import Phases
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
        "samples": 12,
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
    base = InternVLForConditionalGeneration(config).to(device=device, dtype=dtype)
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


def measured(device: str, repeats: int) -> tuple[list[dict], dict[str, float]]:
    """Rows of both steps and the ratios of their medians."""
    size, dtype = SIZES[device], torch.bfloat16 if device == "cuda" else torch.float32
    plain, policy, reference = (random_model(size, device, dtype) for _ in range(3))
    policy.add_compressed_connector(0)
    plain.train(), policy.train()
    task = ConsistencyTask(policy, reference, kl_chunk_rows=256)
    pack = random_pack(size, policy.settings).to(device)
    config = policy.base.config
    rows = {
        "sft": sft_flops(config, pack.num_tiles, row_work(pack.reference)),
        "consistency": consistency_flops(
            config, pack.num_tiles, row_work(pack.policy), row_work(pack.reference)
        ),
    }
    steps = {"sft": lambda: sft_loss(plain, pack), "consistency": lambda: task(pack)[0]}
    optimizers = {
        "sft": torch.optim.AdamW(plain.parameters(), lr=1e-5),
        "consistency": torch.optim.AdamW(task.parameters(), lr=1e-5),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for repeat in range(repeats + 1):  # the first one warms up
        for name, loss_of in steps.items():
            task.phases = Phases(enabled=device == "cpu")  # on CUDA it would wait and so slow the step
            taken = seconds_of(loss_of, optimizers[name], task.phases)
            if repeat:
                times[name].append(taken)
                parts[name].append(task.phases.taken())
    return _rows(rows, times, parts)


def _rows(flops, times, parts) -> tuple[list[dict], dict[str, float]]:
    rows = []
    for name, spent in times.items():
        wall, cpu = ([one[i] for one in spent] for i in (0, 1))
        rows.append(
            {
                "step": name,
                "flops": flops[name],
                "seconds": statistics.median(wall),
                "seconds_min": min(wall),
                "seconds_max": max(wall),
                "cpu_seconds": statistics.median(cpu),
                "tflops_per_second": flops[name] / statistics.median(wall) / 1e12,
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
    parser.add_argument("--peak-tflops", type=float, help="peak of the device: adds `mfu` to the rows")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none")
    torch.set_num_threads(1)
    rows, ratios = measured(options.device, options.repeats)
    for row in rows:
        if options.peak_tflops:
            row["mfu"] = row["tflops_per_second"] / options.peak_tflops
        print(row, file=sys.stderr)
    print(json.dumps({"name": "train_step", "device": options.device, "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    main()
