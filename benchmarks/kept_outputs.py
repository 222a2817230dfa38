"""A consistency training that keeps what its frozen parts compute, next to one that computes it.

    python -m benchmarks.kept_outputs --json

One rank on a CPU, `models/small-internvl` and the settings of `configs/quickstart.yaml` on demo records. Both
ways take the same updates, decoding included, in turns. `step_speedup` is the time of an update that runs
vision tower and reference over that of one that reads what they computed, `validation_speedup` that of a
validation; `passes_to_gain` is how many passes over the samples pay for computing and writing it once. With
`--train-vision` only the reference's hidden states are kept.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml

from cluster.train_settings import TrainSettings
from data_prep.records.blocks import record_blocks
from data_prep.records.config import RecordsConfig
from data_prep.records.sets import record_sets
from data_prep.shards.checks import RowRules
from data_prep.shards.folder import write_index
from data_prep.shards.names import shard_name
from data_prep.shards.split import Shares
from data_prep.shards.write import ShardSettings, write_shard
from stages.consistency import worker
from stages.consistency.config import ConsistencyConfig
from stages.consistency.kept import keep_outputs
from stages.consistency.packs import ConsistencyPacks, ConsistencySettings
from stages.parts import Parts
from stages.training.engine import Engine, init_distributed
from stages.training.step import Update, train_step
from tests.ports import free_port
from vico.prompt import load_prompt_format

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "small-internvl"
WAYS = ("computed", "kept")


def shards(folder: Path, num_records: int) -> Path:
    """Write shards of demo records."""
    records = RecordsConfig(format="demo", num_samples=num_records, seed=0)
    rules = ShardSettings(RowRules(12, 10**7, 4096, True), Shares(0.1, 0))
    prompt_format = load_prompt_format(MODEL)
    blocks = record_blocks(record_sets(records), 200)
    contents = [write_shard(folder / shard_name(b.number), b, rules, prompt_format) for b in blocks]
    write_index(folder / "index.parquet", (content.table for content in contents))
    return folder


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def one_update(engine: Engine, source: ConsistencyPacks, step: int) -> None:
    batches = list(enumerate(map(source.batch, source.packs(step))))
    train_step(engine, batches, Update(step, 1e-6, 0, "benchmark"))


def measured(folder: Path, num_records: int, repeats: int, *, train_vision: bool) -> dict[str, float]:
    """Return the seconds of a step and of a validation in both ways, and of computing what is kept."""
    block = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())["consistency"]
    (folder / "shards").mkdir()
    settings = ConsistencySettings(
        ConsistencyConfig(seed=0, **{**block, "epochs": 2, "train_vision": train_vision}),
        shards(folder / "shards", num_records),
        MODEL,
        Parts(folder / "stage", 1),
        TrainSettings(),
    )
    packs = ConsistencyPacks(settings)
    engines = {way: worker.build_engine(settings) for way in WAYS}
    first = seconds_of(lambda: keep_outputs(settings, packs, engines["kept"]))
    sources = {"computed": ConsistencyPacks(settings), "kept": packs}
    seconds: dict[str, dict[str, list[float]]] = {way: {"step": [], "validation": []} for way in WAYS}
    for repeat in range(repeats + 1):
        for way in WAYS if repeat % 2 else WAYS[::-1]:
            update = partial(one_update, engines[way], sources[way], repeat % packs.num_steps)
            seconds[way]["step"].append(seconds_of(update))
            if repeat <= 3:
                validate = partial(worker.validation, engines[way], sources[way])
                seconds[way]["validation"].append(seconds_of(validate))
            print(f"{repeat}/{repeats} {way}: {seconds[way]['step'][-1]:.2f} s a step", flush=True)
    result = {
        f"{name}_{way}": statistics.median(values[1:])
        for way in WAYS
        for name, values in seconds[way].items()
    }
    for engine in engines.values():
        engine.close()
    return {**result, "first": first, "steps_per_pass": packs.num_steps / 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--train-vision", action="store_true", help="the vision tower is not frozen")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update({**address, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    init_distributed(timeout_s=1800)
    with tempfile.TemporaryDirectory() as folder:
        row = measured(
            Path(folder), arguments.records, arguments.repeats, train_vision=arguments.train_vision
        )
    saved_per_pass = row["steps_per_pass"] * (row["step_computed"] - row["step_kept"])
    ratios = {
        "step_speedup": round(row["step_computed"] / row["step_kept"], 3),
        "validation_speedup": round(row["validation_computed"] / row["validation_kept"], 3),
        "passes_to_gain": round(row["first"] / saved_per_pass, 2),
    }
    for name, value in {**row, **ratios}.items():
        print(f"{name}: {value:.3f}")
    if arguments.json:
        print(json.dumps({"name": "kept_outputs", "rows": [row], "ratios": ratios}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
