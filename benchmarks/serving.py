"""What compressed tiles save when a model is served, beside the bound by FLOPs; built-in engine and vLLM.

    python -m benchmarks.serving serving.json --vllm-python /opt/vllm/bin/python --minutes 20

measures every part that `serving.json` lacks and writes it there; the same command goes on after a stop, and
with higher `--repetitions` it adds some. A part is an engine at a size, with 0, 1/3, 1/2 and 2/3 of the tiles
compressed, asked one request at a time (batch 1) or `--requests` at once. Sizes are the demo model and the
widths of InternVL3.5-1B and -8B with random weights and the same share of the layers of vision tower and
language model: 1/4 at 1B (6 of 24 and 7 of 28), 1/12 at 8B (2 of 24 and 3 of 36), or `--layers`. Requests
are those of `benchmarks/serving_requests.py`; each size and engine is a process of its own with `--threads`
threads, whose vLLM has as many.

The table at the end, also in the file, has the medians over repetitions:

- `first_token_s`, `first_tokens_per_s`, `requests_per_s`, `tokens_per_s`; `decoded_tokens_per_s` while all
  requests of a batch decode.
- `gain`: first tokens per second over those at share 0 of the same repetition. `bound`: what FLOPs allow.
- `router_share`, `connectors_share`: of the time to the first token. `parts_share_all_layers`: both
  together if tower and language model had all their layers, which take the rest of the time.
- `bound_all_layers`: the bound of the whole model.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.serving_models import SIZES, request_flops, written_model
from benchmarks.serving_requests import LIMITS, SHARES, Requests, Timed

ROOT = Path(__file__).parents[1]
_SEQUENTIAL = 4
"""Requests of a repetition at batch 1."""
_ROUNDS = {"demo": 8}
"""How often a repetition asks all of its requests: those of the demo model are over soon."""
_RATES = ("first_token_s", "first_tokens_per_s", "requests_per_s", "tokens_per_s", "decoded_tokens_per_s")
_PARTS = ("router_share", "connectors_share")
_VLLM = ("--enforce-eager", "--no-enable-prefix-caching", "--gpu-memory-utilization=0.5")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path, help="JSON with all results; it is read first")
    parser.add_argument("--sizes", nargs="+", choices=("demo", *SIZES), default=["demo", *SIZES])
    parser.add_argument("--engines", nargs="+", choices=("builtin", "vllm"), default=["builtin", "vllm"])
    parser.add_argument("--vllm-python", help="Python of vLLM's environment; without it vLLM is left out")
    parser.add_argument(
        "--layers", type=float, help="share of the layers of both parts, instead of 1/4 at 1B, 1/12 at 8B"
    )
    parser.add_argument("--tiles", type=int, default=3, help="tiles per request, the thumbnail included")
    parser.add_argument("--requests", type=int, default=16, help="requests at once")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="start no part after so many minutes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--part", nargs=2, metavar=("SIZE", "ENGINE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what must be equal in all parts of a file."""
    names = ("tiles", "requests", "new_tokens", "threads", "device", "dtype", "layers")
    return {name: getattr(arguments, name) for name in names}


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the content of the file, or an empty one. Raises SystemExit if it has other settings."""
    if not arguments.file.exists():
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        )
        machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
        return {
            "commit": commit.stdout.strip(),
            "machine": machine,
            "settings": settings_of(arguments),
            "sizes": {},
            "parts": [],
        }
    content: dict[str, Any] = json.loads(arguments.file.read_text())
    if content["settings"] != settings_of(arguments):
        raise SystemExit(
            f"{arguments.file} has the settings {content['settings']}; give the same, or another file"
        )
    return content


def save(file: Path, content: dict[str, Any]) -> None:
    content["table"] = table(content)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)


def missing(content: dict[str, Any], size: str, engine: str, arguments: argparse.Namespace) -> list[Any]:
    """Return the (repetition, batch) of a size and engine that are not measured yet."""
    wanted = [(n, batch) for n in range(arguments.repetitions) for batch in sorted({1, arguments.requests})]
    done = {
        (part["repetition"], part["batch"])
        for part in content["parts"]
        if (part["size"], part["engine"]) == (size, engine)
    }
    return [key for key in wanted if key not in done]


def measure(size: str, engine: str, arguments: argparse.Namespace, deadline: float) -> None:
    """Measure the missing parts of one size and engine, in this process, and save each when it is done."""
    import torch

    from pipeline.serving.start.engine import Answering, running_engine
    from pipeline.serving.start.settings import ServerSettings, VllmOptions

    torch.set_num_threads(arguments.threads)
    content = load(arguments)
    layers = SIZES[size].measured_layers(arguments.layers) if size != "demo" else (0, 0)
    with tempfile.TemporaryDirectory() as folder:
        model = written_model(Path(folder), size, layers, getattr(torch, arguments.dtype))
        vllm = VllmOptions(arguments.vllm_python, _VLLM) if engine == "vllm" else None
        settings = ServerSettings("", 0, arguments.device, arguments.dtype, vllm=vllm)
        served = Answering(model, LIMITS).opened(settings)
        with running_engine(served, model, settings) as running:
            requests = Requests(running, arguments.tiles, arguments.new_tokens, arguments.device)
            content["sizes"][size] = described(requests, size)
            for repetition, batch in missing(content, size, engine, arguments):
                if time.time() > deadline:
                    print("the time is over; the same command goes on")
                    break
                started = time.time()
                timed = {name: Timed() for name in SHARES}
                for _ in range(_ROUNDS.get(size, 1)):
                    for name, share in SHARES.items():
                        requests.ask(batch if batch > 1 else _SEQUENTIAL, batch > 1, share, timed[name])
                part = {"size": size, "engine": engine, "batch": batch, "repetition": repetition}
                shares = {name: of_share.measures for name, of_share in timed.items()}
                content["parts"].append({**part, "shares": shares})
                save(arguments.file, content)
                print(f"{part}: {time.time() - started:.0f} s", flush=True)


def described(requests: Requests, size: str) -> dict[str, Any]:
    """Return layers and bounds of a size: the FLOPs of the requests at share 0 over those at a share."""
    model, whole = requests.engine.served.model, SIZES[size].layers if size != "demo" else None
    config = model.base.config
    measured = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    entry: dict[str, Any] = {"layers": measured, "of": whole or measured}
    for key, layers in (("bound", None), ("bound_all_layers", whole)):
        flops = {
            name: sum(
                request_flops(config, model.settings, prompt, layers) for prompt in requests.prompts(share)
            )
            for name, share in SHARES.items()
        }
        entry[key] = {name: round(flops["0"] / value, 3) for name, value in flops.items()}
    return entry


def table(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per size, engine, batch and share: medians over the repetitions."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for part in content["parts"]:
        groups.setdefault((part["size"], part["engine"], part["batch"]), []).append(part["shares"])
    rows = []
    for (size, engine, batch), repetitions in groups.items():
        about = content["sizes"][size]
        kept = about["layers"][0] / about["of"][0]
        for name in SHARES:
            row: dict[str, Any] = {"size": size, "engine": engine, "batch": batch, "share": name}
            row |= {
                key: float(f"{statistics.median(shares[name][key] for shares in repetitions):.4g}")
                for key in (*_RATES, *_PARTS)
                if all(key in shares[name] for shares in repetitions)
            }
            gains = [
                shares[name]["first_tokens_per_s"] / shares["0"]["first_tokens_per_s"]
                for shares in repetitions
            ]
            parts = sum(row[key] for key in _PARTS)
            row["parts_share_all_layers"] = round(parts / (parts + (1 - parts) / kept), 4)
            row["gain"], row["bound"] = round(statistics.median(gains), 3), about["bound"][name]
            row["gain_over_bound"] = round(row["gain"] / row["bound"], 3)
            row["bound_all_layers"] = about["bound_all_layers"][name]
            rows.append(row)
    return rows


def main() -> None:
    arguments = parsed()
    deadline = time.time() + 60 * arguments.minutes if arguments.minutes else float("inf")
    if arguments.part:
        measure(*arguments.part, arguments, float(os.environ["BENCHMARK_DEADLINE"]))
        return
    environment = os.environ | {
        "OMP_NUM_THREADS": str(arguments.threads),
        "BENCHMARK_DEADLINE": str(deadline),
    }
    if arguments.device == "cpu":
        environment |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    for size in arguments.sizes:
        for engine in arguments.engines:
            if engine == "vllm" and not arguments.vllm_python:
                print("vllm is left out: --vllm-python is not given")
            elif time.time() < deadline and missing(load(arguments), size, engine, arguments):
                command = [sys.executable, "-m", "benchmarks.serving", *sys.argv[1:], "--part", size, engine]
                if subprocess.run(command, env=environment, cwd=Path.cwd()).returncode:
                    print(f"{size} {engine} failed; the others go on")
    for row in load(arguments).get("table", ()):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
