"""Loading samples with the same decode: our reader in plan order, webdataset, and ray.data beside them; and
the time of a seek in a large synthetic index.

    python -m benchmarks.loading --only seek --json          # first: builds the index of 50 million, minutes
    python -m benchmarks.loading --json                      # epochs of 20,000 JPEGs each way, 17 minutes
    python -m benchmarks.loading --num-samples 300 --turn 50 --index-samples 100000 --json

Decoding is the same code in all ways: the picture, its tiles as float32, the token ids of the text. Ours and
webdataset decode in this process, in turns of --turn samples until both have loaded every sample once, and
the ratio is of the whole epochs: packs that follow one another hold pictures of like size, so that parts of
an epoch are not worth the same. Beside that, both as a training uses them: --workers threads of ours, or as
many processes of torch's DataLoader over webdataset, decode ahead of this process, one way after the other.
ray.data uses as many cores as the session has, loads --ray-samples, last, and is cut off after --ray-minutes
with its rate so far.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import ray
import webdataset
from torch.utils.data import DataLoader

from benchmarks.decoding import decoded, tensor_of_sample
from benchmarks.jpeg_records import write_jpeg_records
from benchmarks.planning import SETTINGS
from benchmarks.reports import report, row
from benchmarks.synthetic_index import write_synthetic_index
from cluster.ray_session import ray_session
from data_prep.packs.plan import PackPlan
from data_prep.packs.plan_cache import cached_plan
from data_prep.shards.reader import SampleReader
from stages.shard.config import ShardConfig
from stages.shard.stage import run
from tests.integration.shard_run import context_of
from tests.tiny_model import make_tiny_model
from vico.prompt import load_prompt_format

MAX_TILES = 6
SEEK_STEP = 1_000_000
_RAY_SHARDS = 4  # more than this machine has cores


class Ways:
    """The ways on one folder of shards; each gives the number of tiles of one sample after another."""

    def __init__(self, folder: Path, num_samples: int):
        self.scratch = Path(tempfile.mkdtemp(dir=folder))
        self.model = make_tiny_model(self.scratch / "model", tile_size=448)
        self.context = context_of(self.scratch, self.model, write_jpeg_records(folder, num_samples))

    def write_shards(self) -> None:
        """All samples are for training, so that one epoch is every sample in every way."""
        config = ShardConfig(
            samples_per_shard=1000, verify="header", max_tiles=MAX_TILES, calib_share=0, test_share=0
        )
        run(config, self.context)
        self.folder = self.context.parts.output
        self.urls = sorted(map(str, self.folder.glob("*.tar")))
        self.reader = SampleReader(self.folder, load_prompt_format(self.model))

    def plan(self, epoch: int) -> PackPlan:
        """As the training opens it: with its summary, made of all epochs before the first step."""
        return cached_plan(self.folder, "train", self.scratch / "plan", **{**SETTINGS, "epoch": epoch})

    def ours(self, epoch: int) -> Iterator[int]:
        """The packs of an epoch in the order of training, the coming one announced."""
        plan = self.plan(epoch)
        packs = (plan.pack(number).rows.tolist() for number in range(plan.num_packs))
        for rows, coming in pairwise(chain(packs, [[]])):
            self.reader.announce(coming)
            yield from (len(self.reader.sample(row).pixels) for row in rows)

    def webdataset(self, epoch: int) -> Iterator[int]:
        """Shards and samples shuffled, the buffer as long as a window of the plan."""
        dataset = webdataset.WebDataset(self.urls, shardshuffle=len(self.urls), seed=epoch).shuffle(1024)
        for sample in dataset:
            yield decoded(sample["jpg"], sample["json"], str(self.model))

    def ours_ahead(self, epoch: int, workers: int) -> Iterator[int]:
        """As a training reads: threads decode a pack while the one before it is used."""
        plan = self.plan(epoch)
        reader = SampleReader(self.folder, load_prompt_format(self.model), threads=workers)
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(reader.samples, plan.pack(0).rows.tolist())
            for number in range(plan.num_packs):
                samples = coming.result()
                coming = ahead.submit(reader.samples, plan.pack(number + 1).rows.tolist())
                yield from (len(sample.pixels) for sample in samples)

    def webdataset_ahead(self, epoch: int, workers: int) -> Iterator[int]:
        """torch's DataLoader over webdataset, its worker processes decoding ahead."""
        dataset = webdataset.WebDataset(self.urls, shardshuffle=len(self.urls), seed=epoch).shuffle(1024)
        dataset = dataset.map(partial(tensor_of_sample, model=str(self.model)))
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context="spawn")
        yield from (len(pixels) for pixels in loader)

    def ray_data(self, num_samples: int, limit_s: float) -> dict:
        """Some shards, read and decoded by Ray's tasks until enough samples have come: its row, cut off after
        `limit_s`.
        """
        data = ray.data.read_webdataset(self.urls[:_RAY_SHARDS], decoder=None)
        model = str(self.model)

        def tiles(row: dict) -> dict:
            return {"tiles": np.int32(decoded(row["jpg"], row["json"], model))}

        num_tiles = 0

        def count() -> None:
            nonlocal num_tiles
            for one in islice(data.map(tiles).iter_rows(), num_samples):
                num_tiles += int(one["tiles"])

        started, counting = time.perf_counter(), threading.Thread(target=count, daemon=True)
        counting.start()
        counting.join(limit_s)
        seconds = time.perf_counter() - started
        cut_off = {"cut_off_after_s": limit_s} if counting.is_alive() else {}
        return {
            **row("ray.data.read_webdataset", [num_tiles / seconds], "tiles"),
            "tiles": num_tiles,
            **cut_off,
        }


def epochs_in_turns(ways: dict[str, Iterator[int]], turn: int) -> list[dict]:
    """A row for each way, all of whose samples are loaded in short turns, so that every way sees the same
    minutes of the machine; `repetitions` are the rates of its twentieths.
    """
    waiting, turns = deque(ways), {name: [] for name in ways}
    while waiting:
        for name in tuple(waiting):
            started, cpu_started = time.perf_counter(), time.process_time()
            tiles = list(islice(ways[name], turn))
            spent = time.perf_counter() - started, time.process_time() - cpu_started
            turns[name].append((len(tiles), sum(tiles), *spent))
            if len(tiles) < turn:
                waiting.remove(name)
        waiting.rotate(-1)
    rows = []
    for name, found in turns.items():
        num_samples, num_tiles, seconds, cpu_seconds = np.array(found).sum(0)
        parts = [part.sum(0) for part in np.array_split(np.array(found), 20)]
        one = row(name, [part[1] / part[2] for part in parts], "tiles")
        one |= {
            "tiles_per_s": round(num_tiles / seconds, 2),
            "samples": int(num_samples),
            "tiles": int(num_tiles),
        }
        rows.append(one | {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)})
    return rows


def epochs_ahead(ways: dict[str, Callable[[int, int], Iterator[int]]], workers: int) -> list[dict]:
    """A row for each way, one after the other, from the first sample that comes to the last."""
    rows = []
    for name, way in ways.items():
        samples = way(1, workers)
        next(samples)
        started = time.perf_counter()
        tiles = list(samples)
        seconds = time.perf_counter() - started
        about = {"workers": workers, "samples": len(tiles), "tiles": sum(tiles), "seconds": round(seconds, 2)}
        rows.append({**row(name, [sum(tiles) / seconds], "tiles"), **about})
    return rows


def seeks(folder: Path, num_samples: int) -> dict:
    """Seconds to build columns and summary of a synthetic index, and to open the plan and plan one step."""
    index = folder / f"index-{num_samples}"
    if not index.is_dir():
        write_synthetic_index(index, num_samples)
    started = time.perf_counter()
    plan = cached_plan(index, "train", index / "cache", **SETTINGS)
    built, step = time.perf_counter() - started, min(SEEK_STEP, plan.num_steps - 1)
    note = index / "built.json"  # what the first call took, for those that find the summary there
    if not note.exists():
        note.write_text(json.dumps(built))
    built = json.loads(note.read_text())
    found = []
    for _ in range(5):
        started = time.perf_counter()
        cached_plan(index, "train", index / "cache", **SETTINGS).step(step)
        found.append(time.perf_counter() - started)
    return {
        "samples": num_samples,
        "step": step,
        "summary_built_s": round(built, 1),
        "seek_s": statistics.median(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=20_000)
    parser.add_argument("--turn", type=int, default=20, help="samples of a turn")
    parser.add_argument("--ray-samples", type=int, default=1024)
    parser.add_argument("--index-samples", type=int, default=50_000_000)
    parser.add_argument("--ray-minutes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2, help="threads of ours, processes of the DataLoader")
    parser.add_argument("--only", choices=["seek", "ahead"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vico-benchmarks")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows, ratios = [], {}
    if options.only != "ahead":
        seek = seeks(options.folder, options.index_samples)
        rows.append({"way": "seek", **seek})
        ratios["seek_s"] = round(seek["seek_s"], 4)
        print(f"step {seek['step']} of {seek['samples']} samples: {seek['seek_s']:.3f} s", flush=True)
    if options.only != "seek":
        ways = Ways(options.folder, options.num_samples)
        try:
            with ray_session(ways.context.site):
                loaded, found = loads(ways, options)
        finally:
            shutil.rmtree(ways.scratch)
        rows, ratios = [*loaded, *rows], {**found, **ratios}
    report("loading", rows, ratios, options.json)


def loads(ways: Ways, options: argparse.Namespace) -> tuple[list[dict], dict[str, float]]:
    """Rows and ratios of the ways to load."""
    ways.write_shards()
    for url in ways.urls:  # page cache and imports are warm for all
        Path(url).read_bytes()
    started = time.perf_counter()
    ways.plan(1)
    planned = {"way": "plan of an epoch", "seconds": round(time.perf_counter() - started, 3)}
    ahead = epochs_ahead(
        {"ours, ahead": ways.ours_ahead, "webdataset in DataLoader": ways.webdataset_ahead}, options.workers
    )
    ratios = {"loading_ahead_vs_dataloader": round(ahead[1]["seconds"] / ahead[0]["seconds"], 3)}
    if options.only == "ahead":
        return [*ahead, planned], ratios
    each = {"ours": ways.ours, "webdataset.WebDataset": ways.webdataset}
    for way in each.values():
        list(islice(way(0), 50))
    rows = epochs_in_turns({name: way(1) for name, way in each.items()}, options.turn)
    rows.append(ways.ray_data(options.ray_samples, 60 * options.ray_minutes))
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
