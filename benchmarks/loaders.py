"""The loaders that `benchmarks/loading.py` compares, on one folder of shards with the same decoding.

Each is an iterator over the number of tiles of one sample after another.
"""

import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
import webdataset
from torch.utils.data import DataLoader

from benchmarks.decoding import num_decoded_tiles, sample_tensor
from benchmarks.jpeg_records import write_jpeg_records
from benchmarks.planning import SETTINGS
from benchmarks.reports import row
from data_prep.packs.plan import PackPlan
from data_prep.packs.plan_cache import cached_plan
from data_prep.shards.reader import SampleReader
from stages.shard.config import ShardConfig
from stages.shard.stage import run
from tests.integration.shard_run import context_of
from tests.tiny_model import make_tiny_model
from vico.prompt import load_prompt_format

MAX_TILES = 6
_RAY_SHARDS = 4  # more than this machine has cores


class Loaders:
    """The loaders on the shards of `num_samples` JPEGs, written in a scratch folder in `folder`."""

    def __init__(self, folder: Path, num_samples: int) -> None:
        self.scratch = Path(tempfile.mkdtemp(dir=folder))
        self.model = make_tiny_model(self.scratch / "model", tile_size=448)
        self.context = context_of(self.scratch, self.model, write_jpeg_records(folder, num_samples))
        self.folder = self.context.parts.output
        self.urls: list[str] = []

    def write_shards(self) -> None:
        """Write the shards with all samples in train, so that one epoch is every sample for every loader."""
        config = ShardConfig(
            samples_per_shard=1000, verify="header", max_tiles=MAX_TILES, calib_share=0, test_share=0
        )
        run(config, self.context)
        self.urls = sorted(map(str, self.folder.glob("*.tar")))

    @cached_property
    def reader(self) -> SampleReader:
        return SampleReader(self.folder, load_prompt_format(self.model))

    def plan(self, epoch: int) -> PackPlan:
        """Return the plan as the training opens it, with its summary, made before the first step."""
        return cached_plan(self.folder, "train", self.scratch / "plan", replace(SETTINGS, epoch=epoch))

    def ours(self, epoch: int) -> Iterator[int]:
        """Read the packs of an epoch in the order of training, announcing the next one."""
        plan = self.plan(epoch)
        packs = (plan.pack(number).rows.tolist() for number in range(plan.num_packs))
        for rows, next_rows in pairwise(chain(packs, [[]])):
            self.reader.announce(next_rows)
            yield from (len(self.reader.sample(row).pixels) for row in rows)

    def webdataset(self, epoch: int) -> Iterator[int]:
        """Read shuffled shards and samples; the shuffle buffer is as long as a window of the plan."""
        dataset = webdataset.WebDataset(self.urls, shardshuffle=len(self.urls), seed=epoch).shuffle(1024)
        for sample in dataset:
            yield num_decoded_tiles(sample["jpg"], sample["json"], str(self.model))

    def ours_ahead(self, epoch: int, workers: int) -> Iterator[int]:
        """Read as the training does: threads decode the next pack while one is used."""
        plan = self.plan(epoch)
        reader = SampleReader(self.folder, load_prompt_format(self.model), threads=workers)
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(reader.samples, plan.pack(0).rows.tolist())
            for number in range(plan.num_packs):
                samples = coming.result()
                coming = ahead.submit(reader.samples, plan.pack(number + 1).rows.tolist())
                yield from (len(sample.pixels) for sample in samples)

    def webdataset_ahead(self, epoch: int, workers: int) -> Iterator[int]:
        """Read with torch's DataLoader over webdataset; its worker processes decode ahead."""
        dataset = webdataset.WebDataset(self.urls, shardshuffle=len(self.urls), seed=epoch).shuffle(1024)
        dataset = dataset.map(partial(sample_tensor, model=str(self.model)))
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context="spawn")
        yield from (len(pixels) for pixels in loader)

    def ray_data(self, num_samples: int, limit_s: float) -> dict[str, Any]:
        """Return the row of ray.data: it reads and decodes some shards until it has `num_samples`.

        After `limit_s` seconds it is cut off, with its rate so far.
        """
        data = ray.data.read_webdataset(self.urls[:_RAY_SHARDS], decoder=None)
        model = str(self.model)

        def tiles(sample: dict[str, Any]) -> dict[str, Any]:
            return {"tiles": np.int32(num_decoded_tiles(sample["jpg"], sample["json"], model))}

        num_tiles = 0

        def count() -> None:
            nonlocal num_tiles
            for counted in islice(data.map(tiles).iter_rows(), num_samples):
                num_tiles += int(counted["tiles"])

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
