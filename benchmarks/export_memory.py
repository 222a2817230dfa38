"""Memory of writing both layouts from a synthetic sharded checkpoint of 2 GB, relative to its largest shard.

    python benchmarks/export_memory.py --json

A process of its own writes each layout. Its peak is the highest resident set (VmHWM, reset after the
imports) above the level after the imports, so the kernel's file cache does not count. Needs 4.5 GB of disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARD_BYTES = 500_000_000
TEXT: dict[str, Any] = {"model_type": "qwen3", "hidden_size": 1536, "intermediate_size": 4608}
TEXT |= {
    "num_hidden_layers": 24,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 60_000,
}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16}
VISION |= {"image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True}


def write_checkpoint(folder: Path, num_layers: int = TEXT["num_hidden_layers"]) -> None:
    """Write a routed model in Hugging Face layout, bfloat16, in shards; every weight is 0.5.

    `num_layers` are those of the language model.
    """
    import torch
    from safetensors.torch import save_file

    from vico.checkpoints.expected_tensors import OWN_PARTS, expected_shapes

    folder.mkdir()
    config: dict[str, Any] = {
        "model_type": "internvl",
        "vision_config": {"model_type": "internvl_vision", **VISION},
        "text_config": TEXT | {"num_hidden_layers": num_layers},
        "image_token_id": 59_000,
        "tie_word_embeddings": False,
        "vico": {"compressed_connector": True, "router": True, "absolute_threshold": 0.5},
    }
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in expected_shapes(config, OWN_PARTS).items():
        size = 2 * torch.Size(shape).numel()
        if filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def resident_bytes(field: str) -> int:
    """Return a field of /proc/self/status in bytes, such as VmRSS (now) or VmHWM (the highest so far)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def export_row(source: Path, out: Path, layout: str) -> dict[str, Any]:
    """Write one layout in this process; return its row."""
    from vico.checkpoints.write import write_hf_folder, write_published_folder

    write = {"hf": write_hf_folder, "flash": write_published_folder}[layout]
    out.mkdir()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    baseline, started = resident_bytes("VmRSS"), time.monotonic()
    write(source, out, shard_bytes=SHARD_BYTES)
    shards = [path.stat().st_size for path in source.glob("*.safetensors")]
    peak = resident_bytes("VmHWM") - baseline
    return {
        "layout": layout,
        "checkpoint_bytes": sum(shards),
        "num_shards": len(shards),
        "largest_shard_bytes": max(shards),
        "baseline_bytes": baseline,
        "peak_above_baseline_bytes": peak,
        "peak_over_largest_shard": peak / max(shards),
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint (default: a temporary one)")
    parser.add_argument("--export", nargs=3, metavar=("SOURCE", "OUT", "LAYOUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        source, out, layout = options.export
        print(json.dumps(export_row(Path(source), Path(out), layout)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        source = Path(work) / "checkpoint"
        write_checkpoint(source)
        for layout in ("hf", "flash"):
            command = [sys.executable, __file__, "--export", str(source), f"{work}/{layout}", layout]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
            rows.append(json.loads(child.stdout.splitlines()[-1]))
            subprocess.run(["rm", "-r", f"{work}/{layout}"], check=True)
    if not options.json:
        for row in rows:
            peak, largest = row["peak_above_baseline_bytes"] / 1e6, row["largest_shard_bytes"] / 1e6
            print(f"{row['layout']}: {peak:.0f} MB above the imports, largest shard {largest:.0f} MB")
        return
    ratios = {f"{row['layout']}_peak_over_largest_shard": row["peak_over_largest_shard"] for row in rows}
    print(json.dumps({"name": "export_memory", "rows": rows, "ratios": ratios}))


if __name__ == "__main__":
    main()
