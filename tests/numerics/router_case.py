"""One rank that trains routers, one scenario after another: `python -m tests.numerics.router_case FOLDER
SCENARIO...`.

FOLDER is made by `write_case`: a model, shards of demo records and labels by the detail in a tile's pixels. A
scenario is a JSON object: `name` (folder of the stage), `attempt`, `config` (fields of RouterConfig), `site`
(blocks of the site's `train` settings).
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.train_settings import TrainSettings
from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.sets import record_sets
from data_prep.shards.checks import RowRules
from data_prep.shards.folder import write_index
from data_prep.shards.names import shard_name
from data_prep.shards.reader import SampleReader
from data_prep.shards.split import Shares
from data_prep.shards.write import ShardSettings, write_shard
from stages.outputs import LABELS_FILE
from stages.parts import Parts
from stages.router.config import RouterConfig
from stages.router.packs import RouterSettings
from vico.prompt import load_prompt_format

MODEL = Path(__file__).parents[2] / "models" / "small-internvl"
NUM_RECORDS = 150


def write_case(folder: Path) -> Path:
    """Write shards of demo records and the labels of their tiles: the half with the most detail is kept."""
    prompt_format = load_prompt_format(MODEL)
    settings = ShardSettings(RowRules(12, 10**7, 4096, True), Shares(0.2, 0.2))
    shards = folder / "shards"
    shards.mkdir()
    blocks = record_blocks(record_sets(RecordsConfig(format="demo", num_samples=NUM_RECORDS, seed=3)), 50)
    contents = [
        write_shard(shards / shard_name(block.number), block, settings, prompt_format) for block in blocks
    ]
    write_index(shards / "index.parquet", (content.table for content in contents))
    reader = SampleReader(shards, prompt_format)
    rows = []
    for indexed in reader.index.table(["key", "split", "tiles", "num_tiles"]).to_pylist():
        if not indexed["num_tiles"]:
            continue
        pixels = reader.sample(indexed["row"]).pixels.astype(np.float64)
        detail = (np.diff(pixels, axis=3) ** 2).mean(axis=(1, 2, 3))
        tiles = [(image, tile) for image, count in enumerate(indexed["tiles"]) for tile in range(count)]
        for (image, tile), value in zip(tiles, detail.tolist(), strict=True):
            position = {"key": indexed["key"], "split": indexed["split"], "image": image, "tile": tile}
            rows.append({**position, "ratio": 1 + value})
    tau = float(np.median([row["ratio"] for row in rows]))
    labels = [{**row, "tau": tau, "label": int(row["ratio"] > tau)} for row in rows]
    (folder / "labels").mkdir()
    pq.write_table(pa.Table.from_pylist(labels), folder / "labels" / LABELS_FILE)
    return folder


def settings_of(folder: Path, scenario: dict) -> RouterSettings:
    config = {
        "seed": 5,
        "optimizer": {"learning_rate": 1e-3},
        "tiles_per_pack": 16,
        "packs_per_step": 2,
        "epochs": 2,
        "candidates": 2,
        "validate_every_steps": 4,
        **scenario.get("config", {}),
    }
    site = {"checkpoints": {"every_steps": 3}, **scenario.get("site", {})}
    return RouterSettings(
        config=RouterConfig.model_validate(config),
        shard_folder=folder / "shards",
        policy_folder=MODEL,
        label_folder=folder / "labels",
        parts=Parts(folder / scenario["name"], scenario.get("attempt", 1)),
        train=TrainSettings.model_validate(site),
    )


if __name__ == "__main__":
    from stages.router.worker import train_router

    torch.set_num_threads(1)
    for text in sys.argv[2:]:
        train_router(settings_of(Path(sys.argv[1]), json.loads(text)))
    torch.distributed.destroy_process_group()  # otherwise its threads still run when the process ends
