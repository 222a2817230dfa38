"""Compare our reader with webdataset and ray.data, all with the same decoding, and time a seek in the plan.

    python -m benchmarks.loading --only seek --json          # first: builds the index of 50 million, minutes
    python -m benchmarks.loading --json                      # epochs of 20,000 JPEGs per loader, 17 minutes
    python -m benchmarks.loading --num-samples 2000 --turn 50 --index-samples 100000 --json

All loaders decode with the same code: the picture, its tiles as float32, the token ids of the text. Ours and
webdataset decode in this process, in turns of --turn samples until both have loaded every sample once. The
ratio is of the whole epochs: consecutive packs have pictures of similar size, so parts of an epoch do not
compare. Then both run as a training uses them: --workers threads of ours, or as many processes of torch's
DataLoader over webdataset, decode ahead of this process, one loader after the other. ray.data is last. It
uses as many cores as the session has, loads --ray-samples, and is cut off after --ray-minutes with its rate
so far.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loaders import Loaders
from benchmarks.planning import SETTINGS
from benchmarks.reports import report, row
from benchmarks.synthetic_index import write_synthetic_index
from cluster.ray_session import ray_session
from data_prep.packs.plan_cache import cached_plan

SEEK_STEP = 1_000_000


def epochs_in_turns(loaders: dict[str, Iterator[int]], turn: int) -> list[dict[str, Any]]:
    """Return one row per loader; each loads all its samples, in short turns.

    So every loader runs in the same minutes of the machine. `repetitions` are the rates of its twentieths.
    """
    waiting = deque(loaders)
    turns: dict[str, list[tuple[float, ...]]] = {name: [] for name in loaders}
    while waiting:
        for name in tuple(waiting):
            started, cpu_started = time.perf_counter(), time.process_time()
            tiles = list(islice(loaders[name], turn))
            spent = time.perf_counter() - started, time.process_time() - cpu_started
            turns[name].append((len(tiles), sum(tiles), *spent))
            if len(tiles) < turn:
                waiting.remove(name)
        waiting.rotate(-1)
    rows = []
    for name, loader_turns in turns.items():
        num_samples, num_tiles, seconds, cpu_seconds = np.array(loader_turns).sum(0)
        parts = [part.sum(0) for part in np.array_split(np.array(loader_turns), 20)]
        rows.append(
            {
                **row(name, [part[1] / part[2] for part in parts], "tiles"),
                "tiles_per_s": round(num_tiles / seconds, 2),
                "samples": int(num_samples),
                "tiles": int(num_tiles),
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu_seconds, 2),
            }
        )
    return rows


def epochs_ahead(
    loaders: dict[str, Callable[[int, int], Iterator[int]]], workers: int
) -> list[dict[str, Any]]:
    """Return one row per loader, run one after the other, timed from its first sample to its last."""
    rows = []
    for name, loader in loaders.items():
        samples = loader(1, workers)
        next(samples)
        started = time.perf_counter()
        tiles = list(samples)
        seconds = time.perf_counter() - started
        about = {"workers": workers, "samples": len(tiles), "tiles": sum(tiles), "seconds": round(seconds, 2)}
        rows.append({**row(name, [sum(tiles) / seconds], "tiles"), **about})
    return rows


def seek_row(folder: Path, num_samples: int) -> dict[str, Any]:
    """Return the seconds to build columns and summary of a synthetic index, and to plan one step."""
    index = folder / f"index-{num_samples}"
    if not index.is_dir():
        write_synthetic_index(index, num_samples)
    started = time.perf_counter()
    plan = cached_plan(index, "train", index / "cache", SETTINGS)
    built_s, step = time.perf_counter() - started, min(SEEK_STEP, plan.num_steps - 1)
    note = index / "built.json"  # the time of the first call; later calls find the summary
    if not note.exists():
        note.write_text(json.dumps(built_s))
    built_s = json.loads(note.read_text())
    seek_times = []
    for _ in range(5):
        started = time.perf_counter()
        cached_plan(index, "train", index / "cache", SETTINGS).step(step)
        seek_times.append(time.perf_counter() - started)
    return {
        "samples": num_samples,
        "step": step,
        "summary_built_s": round(built_s, 1),
        "seek_s": statistics.median(seek_times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=20_000)
    parser.add_argument("--turn", type=int, default=20, help="samples per turn")
    parser.add_argument("--ray-samples", type=int, default=1024)
    parser.add_argument("--index-samples", type=int, default=50_000_000)
    parser.add_argument("--ray-minutes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2, help="threads of ours, processes of the DataLoader")
    parser.add_argument("--only", choices=["seek", "ahead"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vico-benchmarks")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    if options.only != "ahead":
        seek = seek_row(options.folder, options.index_samples)
        rows.append({"way": "seek", **seek})
        ratios["seek_s"] = round(seek["seek_s"], 4)
        print(f"step {seek['step']} of {seek['samples']} samples: {seek['seek_s']:.3f} s", flush=True)
    if options.only != "seek":
        loaders = Loaders(options.folder, options.num_samples)
        try:
            with ray_session(loaders.context.site):
                loading_rows, loading_ratios = compare_loaders(loaders, options)
        finally:
            shutil.rmtree(loaders.scratch)
        rows, ratios = [*loading_rows, *rows], {**loading_ratios, **ratios}
    report("loading", rows, ratios, options.json)


def compare_loaders(
    loaders: Loaders, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return rows and ratios of all loaders."""
    loaders.write_shards()
    for url in loaders.urls:  # page cache and imports are warm for all
        Path(url).read_bytes()
    started = time.perf_counter()
    loaders.plan(1)
    planned = {"way": "plan of an epoch", "seconds": round(time.perf_counter() - started, 3)}
    ahead = epochs_ahead(
        {"ours, ahead": loaders.ours_ahead, "webdataset in DataLoader": loaders.webdataset_ahead},
        options.workers,
    )
    ratios = {"loading_ahead_vs_dataloader": round(ahead[1]["seconds"] / ahead[0]["seconds"], 3)}
    if options.only == "ahead":
        return [*ahead, planned], ratios
    in_process = {"ours": loaders.ours, "webdataset.WebDataset": loaders.webdataset}
    for loader in in_process.values():
        list(islice(loader(0), 50))
    rows = epochs_in_turns({name: loader(1) for name, loader in in_process.items()}, options.turn)
    rows.append(loaders.ray_data(options.ray_samples, 60 * options.ray_minutes))
    ours, other, by_ray = rows
    assert ours["samples"] == other["samples"] and ours["tiles"] == other["tiles"], rows
    return [*rows, *ahead, planned], {
        "loading_vs_webdataset": round(other["seconds"] / ours["seconds"], 4),
        "loading_vs_webdataset_cpu": round(other["cpu_seconds"] / ours["cpu_seconds"], 4),
        "loading_vs_ray_data": round(ours["tiles_per_s"] / max(by_ray["tiles_per_s"], 0.01), 3),
        **ratios,
    }


if __name__ == "__main__":
    main()
