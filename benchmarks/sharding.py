"""Compare sharding of JPEGs with webdataset's ShardWriter and with a plain PIL decode, all in Ray tasks.

    python -m benchmarks.sharding --json                     # 20,000 JPEGs
    python -m benchmarks.sharding --num-samples 500 --repetitions 1 --json

All ways run in Ray tasks of the same session: one task per block of lines, as many at a time as cores.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import webdataset
from PIL import Image

from benchmarks.jpeg_records import write_jpeg_records
from benchmarks.reports import interleaved, ratio, report
from cluster.ray_session import ray_session
from cluster.tasks import map_tasks
from stages.shard.config import ShardConfig
from stages.shard.stage import run
from tests.integration.shard_run import context_of
from tests.tiny_model import make_tiny_model

SAMPLES_PER_SHARD = 1000
SHARD_BYTES_NEVER_REACHED = 1 << 40


def write_with_shardwriter(
    lines: tuple[int, int], images: Path, annotation: Path, out: Path, safe: bool
) -> int:
    """Write a block of lines as one shard; `safe` adds the sha256 of pictures and tar, and the fsync."""
    first, last = lines
    pattern = str(out / f"{first:08d}-%06d.tar")
    with (
        open(annotation, encoding="utf-8") as file,
        webdataset.ShardWriter(
            pattern, maxcount=SAMPLES_PER_SHARD, maxsize=SHARD_BYTES_NEVER_REACHED, verbose=0
        ) as sink,
    ):
        for line in itertools.islice(file, first, last):
            row = json.loads(line)
            data = (images / row["image"]).read_bytes()
            if safe:
                row["sha256"] = hashlib.sha256(data).hexdigest()
            sink.write({"__key__": f"{row['id']:08d}", "jpg": data, "json": row})
    if safe:
        for path in out.glob(f"{first:08d}-*.tar"):
            with open(path, "rb") as file:
                hashlib.file_digest(file, "sha256")
                os.fsync(file.fileno())
    return last - first


def decode_with_pil(lines: tuple[int, int], images: Path, annotation: Path) -> int:
    """Read every picture of a block of lines and decode it to RGB."""
    first, last = lines
    with open(annotation, encoding="utf-8") as file:
        for line in itertools.islice(file, first, last):
            data = (images / json.loads(line)["image"]).read_bytes()
            Image.open(io.BytesIO(data)).convert("RGB").load()
    return last - first


class Ways:
    """The compared ways on one set of records; each returns the number of samples it processed."""

    def __init__(self, folder: Path, num_samples: int) -> None:
        self.num_samples = num_samples
        self.records = write_jpeg_records(folder, num_samples)
        self.images, self.annotation = (
            Path(str(self.records.path)).parent / n for n in ("images", "set.jsonl")
        )
        self.scratch = Path(tempfile.mkdtemp(dir=folder))
        self.model = make_tiny_model(self.scratch / "model", tile_size=448)
        self.site = context_of(self.scratch, self.model, self.records).site

    def ours(self, verify: Literal["decode", "header"]) -> int:
        out = self.empty_folder()
        config = ShardConfig(samples_per_shard=SAMPLES_PER_SHARD, verify=verify, max_tiles=6)
        counts = run(config, context_of(out, self.model, self.records))
        assert int(counts["written"]) + int(counts["quarantined"]) == self.num_samples, counts
        return self.num_samples

    def shardwriter(self, safe: bool) -> int:
        function = partial(
            write_with_shardwriter,
            images=self.images,
            annotation=self.annotation,
            out=self.empty_folder(),
            safe=safe,
        )
        return self.mapped(function)

    def pil(self) -> int:
        return self.mapped(partial(decode_with_pil, images=self.images, annotation=self.annotation))

    def mapped(self, function: Callable[[tuple[int, int]], int]) -> int:
        starts = range(0, self.num_samples, SAMPLES_PER_SHARD)
        blocks = [(first, min(first + SAMPLES_PER_SHARD, self.num_samples)) for first in starts]
        return sum(done for _, done in map_tasks(function, blocks, site=self.site))

    def empty_folder(self) -> Path:
        out = self.scratch / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "vico-benchmarks")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    ways = Ways(options.folder, options.num_samples)
    try:
        with ray_session(ways.site):
            ways.ours("header")  # starts the workers and loads the tokenizer in them
            rows = interleaved(
                {
                    "ours, headers": partial(ways.ours, "header"),
                    "ShardWriter, sha256 and fsync": partial(ways.shardwriter, True),
                    "ShardWriter": partial(ways.shardwriter, False),
                    "ours, full decode": partial(ways.ours, "decode"),
                    "PIL decode": ways.pil,
                },
                options.repetitions,
            )
    finally:
        shutil.rmtree(ways.scratch)
    ratios = {
        "sharding_vs_shardwriter": ratio(rows, "ours, headers", "ShardWriter, sha256 and fsync"),
        "sharding_vs_bare_shardwriter": ratio(rows, "ours, headers", "ShardWriter"),
        "sharding_checked_vs_pil": ratio(rows, "ours, full decode", "PIL decode"),
    }
    report("sharding", rows, ratios, options.json)


if __name__ == "__main__":
    main()
