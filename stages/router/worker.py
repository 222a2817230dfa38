"""The code of one rank of the router stage: train, validate, then score calib and test tiles."""

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from stages.outputs import ROUTER_FILE, SCORES_FILE
from stages.parts import Parts
from stages.router.packs import RouterPacks, RouterSettings, TilePosition
from stages.training.engine import Engine, init_distributed
from stages.training.engine_settings import engine_settings
from stages.training.loop import StageTask, TrainingLoop, TrainingPlan, training_plan
from stages.training.parameter_groups import parameter_groups
from stages.training.step import derived_seed, share_of_rank, sum_over_ranks
from stages.training.throughput import measure_throughput
from vico.checkpoints import load_model
from vico.objectives.router import RouterTask

SCORES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("image", pa.int16()),
        ("tile", pa.int16()),
        ("p_compress", pa.float64()),
        ("label", pa.int16()),
    ]
)


_NO_POSITIONS: list[TilePosition] = []


class ScoreRow(TilePosition):
    """One row of `scores.parquet`."""

    split: str
    p_compress: float
    label: int


def _started(settings: RouterSettings) -> tuple[RouterPacks, Engine, TrainingPlan]:
    """Return the packs, the engine over a new router with the frozen policy, and the plan, on this rank."""
    config = settings.config
    init_distributed(settings.train.restarts.collective_timeout_s)
    packs = RouterPacks(settings)
    policy = load_model(settings.policy_folder, getattr(torch, config.optimizer.dtype))
    policy.requires_grad_(False)
    if torch.cuda.is_available():
        policy.to("cuda")
    policy.add_router(derived_seed(config.seed, "router"))
    assert policy.router is not None
    task = RouterTask(policy.router.train(), policy.vision_features)
    engine = Engine(
        task,
        parameter_groups(task, config.optimizer),
        engine_settings(config.optimizer, config.packs_per_step, settings.train),
    )
    return packs, engine, training_plan("router", config, packs.num_steps, settings.parts, settings.train)


def _task(engine: Engine) -> RouterTask:
    assert isinstance(engine.module, RouterTask)
    return engine.module


def measure_router(settings: RouterSettings) -> None:
    """Measure the speed of some updates on one rank; their results are discarded."""
    packs, engine, plan = _started(settings)
    measure_throughput(engine, packs, plan, lambda: validation(engine, packs))


def train_router(settings: RouterSettings) -> None:
    """Run the whole stage on one rank; rank 0 publishes the router and the scores of calib and test tiles."""
    packs, engine, plan = _started(settings)
    task = StageTask(packs, summary, lambda engine, _: validation(engine, packs))
    TrainingLoop(engine, task, plan).run()
    state = engine.whole_state()
    own_rows = [row for split in ("calib", "test") for row in scores(engine, packs, split)]
    rows_of_ranks: list[list[ScoreRow]] = [[]] * engine.world_size
    torch.distributed.all_gather_object(rows_of_ranks, own_rows)
    if state is not None:  # on rank 0
        publish(settings.parts, state, [row for rows in rows_of_ranks for row in rows])
    torch.distributed.barrier()


def summary(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a step from its sums over ranks."""
    tiles = max(sums["labelled_tiles"], 1.0)
    return {
        "labelled_tiles": sums["labelled_tiles"],
        "accuracy": sums["correct"] / tiles,
        "share_keep": sums["keep"] / tiles,
    }


@torch.no_grad()
def validation(engine: Engine, packs: RouterPacks) -> dict[str, float]:
    """Return the cross entropy and accuracy over calibration tiles."""
    router = _task(engine).router
    router.eval()
    sums: dict[str, float | torch.Tensor] = {"loss": 0.0, "correct": 0.0, "labelled_tiles": 0.0}
    for _, pack in share_of_rank(packs.validation_packs, engine.rank, engine.world_size):
        batch = packs.empty() if pack is None else packs.batch(pack)
        loss, counts = engine(batch.to(engine.device))
        values = {"loss": loss, **counts}
        sums = {name: total + values[name] for name, total in sums.items()}
    router.train()
    total = sum_over_ranks(sums, engine.device)
    tiles = max(total["labelled_tiles"], 1.0)
    return {"loss": total["loss"] / tiles, "accuracy": total["correct"] / tiles}


@torch.no_grad()
def scores(engine: Engine, packs: RouterPacks, split: str) -> list[ScoreRow]:
    """Return the tiles of this rank's share of the split, with their probability of compress."""
    task = _task(engine)
    task.router.eval()
    rows: list[ScoreRow] = []
    for _, pack in share_of_rank(packs.of_split(split), engine.rank, engine.world_size):
        batch, positions = packs.tiles(pack) if pack is not None else (packs.empty(), _NO_POSITIONS)
        features = task.vision_features(batch.pixel_values.to(engine.device))
        probability = task.router.compress_probability(features).tolist()
        labels = batch.labels_N.tolist()
        for position, p_compress, label in zip(positions, probability, labels, strict=False):
            rows.append({**position, "split": split, "p_compress": p_compress, "label": label})
    task.router.train()
    return rows


def publish(parts: Parts, state: Mapping[str, torch.Tensor], rows: Sequence[ScoreRow]) -> None:
    """Publish the router's tensors together with the scores of all ranks, sorted by key.

    They are published together because a router that is trained again scores slightly differently on CUDA.
    """
    names = [SCORES_FILE]
    if not parts.done(ROUTER_FILE):
        names.insert(0, ROUTER_FILE)
        save_file({name: t.contiguous() for name, t in state.items()}, parts.partial(ROUTER_FILE))
    ordered = sorted(rows, key=lambda row: (row["split"], row["key"], row["image"], row["tile"]))
    pq.write_table(pa.Table.from_pylist(ordered, SCORES_SCHEMA), parts.partial(SCORES_FILE))
    parts.publish(*names)
