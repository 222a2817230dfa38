"""What one rank of the router stage does: labelled tiles of a step, the loop, scores of calib and test tiles
at the end."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from stages.parts import Parts
from stages.router.packs import RouterPacks, RouterSettings
from stages.training.engine import Engine, init_distributed
from stages.training.engine_settings import engine_settings
from stages.training.loop import (
    TrainingPlan,
    derived_seed,
    share_of_rank,
    sum_over_ranks,
    train,
    training_plan,
)
from stages.training.parameter_groups import parameter_groups
from stages.training.throughput import measure_throughput
from vico.checkpoints import load_model
from vico.objectives.router import RouterTask


def _begun(settings: RouterSettings) -> tuple[RouterPacks, Engine, TrainingPlan]:
    """Packs, the engine over a new router beside the frozen policy, and the plan, on this rank."""
    config = settings.config
    init_distributed(settings.train.collective_timeout_s)
    packs = RouterPacks(settings)
    policy = load_model(settings.policy_folder, getattr(torch, config.optimizer.dtype))
    policy.requires_grad_(False)
    if torch.cuda.is_available():
        policy.to("cuda")
    policy.add_router(derived_seed(config.seed, "router"))
    task = RouterTask(policy.router.train(), policy.vision_features)
    engine = Engine(
        task,
        parameter_groups(task, config.optimizer),
        engine_settings(config.optimizer, config.packs_per_step, settings.train),
    )
    return packs, engine, training_plan("router", config, packs.num_steps, settings.parts, settings.train)


def measure_router(settings: RouterSettings) -> None:
    """Some updates of the stage on one rank, for their speed; nothing of them stays."""
    packs, engine, plan = _begun(settings)
    measure_throughput(engine, packs, packs.empty, plan, lambda engine: validation(engine, packs))


def train_router(settings: RouterSettings) -> None:
    """The whole stage on one rank; rank 0 publishes the router and the scores of calib and test tiles."""
    packs, engine, plan = _begun(settings)
    train(engine, packs, packs.empty, plan, summary, lambda engine, _: validation(engine, packs))
    state = engine.whole_state()
    found = [row for split in ("calib", "test") for row in scores(engine, packs, split)]
    everyone: list[Any] = [None] * engine.world_size
    torch.distributed.all_gather_object(everyone, found)
    if engine.rank == 0:
        publish(settings.parts, state, [row for part in everyone for row in part])
    torch.distributed.barrier()


def summary(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a step from its sums over ranks."""
    tiles = max(sums["labelled_tiles"], 1.0)
    return {
        "labelled_tiles": sums["labelled_tiles"],
        "accuracy": sums["correct"] / tiles,
        "share_keep": sums["keep"] / tiles,
    }


@torch.no_grad()
def validation(engine: Engine, packs: RouterPacks) -> dict[str, float]:
    """Cross entropy and accuracy over calibration tiles."""
    engine.module.router.eval()
    sums: dict[str, Any] = {"loss": 0.0, "correct": 0.0, "labelled_tiles": 0.0}
    for _, pack in share_of_rank(packs.validation_packs, engine.rank, engine.world_size):
        batch = packs.empty() if pack is None else packs.batch(pack)
        loss, counts = engine(batch.to(engine.device))
        found = {"loss": loss, **counts}
        sums = {name: value + found[name] for name, value in sums.items()}
    engine.module.router.train()
    total = sum_over_ranks(sums, engine.device)
    tiles = max(total["labelled_tiles"], 1.0)
    return {"loss": total["loss"] / tiles, "accuracy": total["correct"] / tiles}


@torch.no_grad()
def scores(engine: Engine, packs: RouterPacks, split: str) -> list[dict[str, Any]]:
    """This rank's share of the split's tiles and their probability of compress: rows of `scores.parquet`."""
    task: RouterTask = engine.module
    task.router.eval()
    rows = []
    for _, pack in share_of_rank(packs.of_split(split), engine.rank, engine.world_size):
        batch, places = (packs.empty(), []) if pack is None else packs.tiles(pack)
        features = task._vision_features(batch.pixel_values.to(engine.device))
        probability = task.router.compress_probability(features).tolist()
        labels = batch.labels_N.tolist()
        for place, p_compress, label in zip(places, probability, labels, strict=False):
            rows.append({**place, "split": split, "p_compress": p_compress, "label": label})
    task.router.train()
    return rows


def publish(parts: Parts, state: Mapping[str, torch.Tensor], rows: list[dict[str, Any]]) -> None:
    """Publishes the router's tensors and, at once, the scores of all ranks in the order of their keys: a
    router trained again would score a little differently on CUDA."""
    names = ["scores.parquet"]
    if not parts.done("router.safetensors"):
        names.insert(0, "router.safetensors")
        save_file({name: t.contiguous() for name, t in state.items()}, parts.partial("router.safetensors"))
    rows = sorted(rows, key=lambda row: (row["split"], row["key"], row["image"], row["tile"]))
    columns = {
        "key": pa.string(),
        "split": pa.string(),
        "image": pa.int16(),
        "tile": pa.int16(),
        "p_compress": pa.float64(),
        "label": pa.int16(),
    }
    pq.write_table(
        pa.Table.from_pylist(rows, pa.schema(list(columns.items()))), parts.partial("scores.parquet")
    )
    parts.publish(*names)
