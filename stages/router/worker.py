"""The code of one rank of the router stage: features, training, validation, then scores of calib and test
tiles."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from stages.finite import check_finite
from stages.outputs import BLANK_SPLIT, ROUTER_FILE, SCORES_FILE
from stages.parts import Parts
from stages.router.best_routers import AUC_METRIC, BestRouters
from stages.router.blank_tiles import NUM_BLANK
from stages.router.packs import BLANK_FILE, RouterPacks, RouterSettings, TilePosition
from stages.router_files import policy_mark
from stages.training.engine import Engine, init_distributed
from stages.training.engine_settings import engine_settings
from stages.training.kept.features import compute_features, open_tower
from stages.training.kept.files import KeptFiles, tensors_digest
from stages.training.kept.folders import features_folder
from stages.training.kept.outputs import KeptOutputs
from stages.training.loop import StageTask, TrainingLoop, TrainingPlan, training_plan
from stages.training.parameter_groups import parameter_groups
from stages.training.ranks.phases import phase_items
from stages.training.speed.throughput import measure_throughput
from stages.training.step import derived_seed, evaluating, share_of_rank, sum_over_ranks
from vico.model.attention_kernels import use_attention
from vico.model.internvl import VicoModel
from vico.model.router import Router
from vico.objectives.router import FEATURE_DTYPE, IGNORED, RouterTask

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


class ScoreRow(TilePosition):
    """One row of `scores.parquet`."""

    split: str
    p_compress: float
    label: int


def _started(settings: RouterSettings) -> tuple[RouterPacks, Engine, TrainingPlan]:
    """Return the packs, the engine over new routers with the frozen policy, and the plan, on this rank."""
    config = settings.config
    init_distributed(settings.train.restarts.collective_timeout_s)
    use_attention(settings.train.attention.rows, settings.train.attention.vision)
    packs = RouterPacks(settings)
    policy = open_tower(settings.policy_folder, getattr(torch, config.optimizer.dtype))
    keep_features(settings, packs, policy)
    routers = [new_router(policy, derived_seed(config.seed, "router", c)) for c in range(config.candidates)]
    task = RouterTask(routers, policy.vision_features, config.token_dropout)
    engine = Engine(
        task,
        parameter_groups(task, config.optimizer),
        engine_settings(config.optimizer, config.packs_per_step, settings.train),
    )
    return packs, engine, training_plan("router", config, packs.num_steps, settings.parts, settings.train)


def new_router(policy: VicoModel, seed: int) -> Router:
    """Return a router for the policy with random weights, in training mode."""
    policy.add_router(seed)
    router, policy.router = policy.router, None
    assert router is not None
    return router.train()


def keep_features(settings: RouterSettings, packs: RouterPacks, policy: VicoModel) -> None:
    """Let the packs read vision features from files, if these fit into the site's limit; all ranks compute
    and write those that are missing. Otherwise every step computes its features."""
    device = next(policy.base.model.vision_tower.parameters()).device
    tile_bytes = packs.settings.vision_tokens * policy.vision_width * FEATURE_DTYPE.itemsize
    num_tiles = NUM_BLANK + sum(shard.num_values for shard in packs.shard_rows.values())
    if num_tiles * tile_bytes > settings.train.memory.frozen_outputs_gb * 1e9:
        return
    digest = tensors_digest(policy.base.model.vision_tower)
    files = KeptFiles(features_folder(settings.parts), digest, FEATURE_DTYPE)
    tile_shape = packs.settings.vision_tokens, policy.vision_width
    features = KeptOutputs(files, packs.shard_rows, packs.index, tile_shape)
    batch_tiles = settings.config.tiles_per_pack

    @torch.no_grad()
    def of_blank() -> Iterator[torch.Tensor]:
        for numbers in torch.arange(NUM_BLANK).split(batch_tiles):
            yield policy.vision_features(packs.blank_pixels("train", numbers.tolist()).to(device))

    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        files.write(BLANK_FILE, NUM_BLANK, of_blank)
    compute_features(features, policy, packs.pixels, batch_tiles, settings.parts.attempt_folder)
    packs.features = features


def _task(engine: Engine) -> RouterTask:
    assert isinstance(engine.module, RouterTask)
    return engine.module


def measure_router(settings: RouterSettings) -> None:
    """Measure the speed of some updates on one rank; their results are discarded."""
    packs, engine, plan = _started(settings)
    measure_throughput(engine, packs, plan, lambda: validation(engine, packs))


def train_router(settings: RouterSettings) -> None:
    """Run the whole stage on one rank; rank 0 publishes the router and the scores of calib and test tiles."""
    config = settings.config
    packs, engine, plan = _started(settings)
    best = BestRouters(settings.parts, config.candidates, config.patience, engine.of_rank_0)

    def validate(engine: Engine, step: int) -> dict[str, float]:
        metrics = validation(engine, packs)
        aucs = [metrics[AUC_METRIC.format(candidate=c)] for c in range(config.candidates)]
        best.offer(step, aucs, engine.whole_state)
        return metrics

    step = TrainingLoop(engine, StageTask(packs, summary, validate, best.finished), plan).run()
    tensors = best.winner(step)
    router = trained_router(tensors, engine.device, getattr(torch, config.optimizer.dtype))
    folder = settings.parts.attempt_folder
    own_rows = [
        *(row for split in ("calib", "test") for row in scores(engine, router, packs, split, folder)),
        *blank_scores(engine, router, packs),
    ]
    rows_of_ranks: list[list[ScoreRow]] = [[]] * engine.world_size
    torch.distributed.all_gather_object(rows_of_ranks, own_rows)
    if engine.rank == 0:
        mark = policy_mark(settings.policy_folder)
        publish(settings.parts, tensors, mark, [row for rows in rows_of_ranks for row in rows])
    torch.distributed.barrier()


def trained_router(tensors: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> Router:
    """Return a router with the tensors `router.*`, to score with."""
    own = {name.removeprefix("router."): tensor for name, tensor in tensors.items()}
    router = Router(own["pooling_before_gating.query_token"].shape[1])
    router.load_state_dict(own)
    return router.to(device, dtype).eval()


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
    """Return cross entropy and accuracy over calibration tiles, averaged over the candidates, and the AUC of
    each candidate."""
    from sklearn.metrics import roc_auc_score

    names = ("loss", "correct", "labelled_tiles", "weight")
    sums: dict[str, float | torch.Tensor] = dict.fromkeys(names, 0.0)
    log_odds, labels = [], []
    with evaluating(_task(engine)):
        for _, pack in share_of_rank(packs.validation_packs, engine.rank, engine.world_size):
            batch = (packs.empty() if pack is None else packs.validation_batch(pack)).to(engine.device)
            loss, counts = engine(batch, with_log_odds=True)
            log_odds.append(counts.pop("log_odds_CN").cpu().numpy())
            values = {"loss": loss, "weight": batch.loss_weight, **counts}
            sums = {name: total + values[name] for name, total in sums.items()}
            labels.append(batch.labels_N.cpu().numpy())
    total = sum_over_ranks(sums, engine.device)
    tiles = max(total["labelled_tiles"], 1.0)
    by_rank = engine.of_all_ranks((np.concatenate(log_odds, axis=1), np.concatenate(labels)))
    log_odds_CN, labels_N = (np.concatenate(parts, axis=-1) for parts in zip(*by_rank, strict=True))
    labelled = labels_N != IGNORED
    return {
        "loss": total["loss"] / (total["weight"] or 1.0),
        "accuracy": total["correct"] / tiles,
        **{
            AUC_METRIC.format(candidate=c): float(roc_auc_score(labels_N[labelled] == 1, keep_N[labelled]))
            for c, keep_N in enumerate(log_odds_CN)
        },
    }


@torch.no_grad()
def scores(
    engine: Engine, router: Router, packs: RouterPacks, split: str, attempt_folder: Path
) -> list[ScoreRow]:
    """Return the tiles of this rank's share of the split, with their probability of compress.

    Their features are computed and not rounded, as where the router is used.
    """
    rows: list[ScoreRow] = []
    all_packs = packs.of_split(split)
    own = share_of_rank(all_packs, engine.rank, engine.world_size)
    unit = f"packs of {split} tiles scored"
    for _, pack in phase_items(own, len(all_packs), unit, attempt_folder, may_stop=False):
        if pack is None:
            continue
        batch, positions = packs.positioned(pack)
        features_NPv = _task(engine).vision_features(batch.tiles.to(engine.device))
        p_compress_N = router.compress_probability(features_NPv).cpu().numpy()
        dtype, setting = packs.config.optimizer.dtype, "router.optimizer.dtype"
        check_finite(positions[0]["key"], p_compress_N, "probabilities to compress", dtype, setting)
        probability = p_compress_N.tolist()
        for position, p_compress, label in zip(positions, probability, batch.labels_N.tolist(), strict=True):
            rows.append({**position, "split": split, "p_compress": p_compress, "label": label})
    return rows


@torch.no_grad()
def blank_scores(engine: Engine, router: Router, packs: RouterPacks) -> list[ScoreRow]:
    """Return this rank's share of the blank calibration tiles, with their probability of compress."""
    rows: list[ScoreRow] = []
    batches = [batch.tolist() for batch in torch.arange(NUM_BLANK).split(packs.config.tiles_per_pack)]
    for _, numbers in share_of_rank(batches, engine.rank, engine.world_size):
        if numbers is not None:
            pixels = packs.blank_pixels("calib", numbers).to(engine.device)
            probability = router.compress_probability(_task(engine).vision_features(pixels)).tolist()
            for number, p_compress in zip(numbers, probability, strict=True):
                key = f"{BLANK_SPLIT}-{number:03d}"
                position: TilePosition = {"key": key, "image": 0, "tile": 0}
                rows.append({**position, "split": BLANK_SPLIT, "p_compress": p_compress, "label": 0})
    return rows


def publish(
    parts: Parts, tensors: Mapping[str, torch.Tensor], mark: dict[str, str], rows: Sequence[ScoreRow]
) -> None:
    """Publish the router's tensors, with the mark of its policy, and the scores of all ranks, sorted by key.

    They are published together because a router that is trained again scores slightly differently on CUDA.
    """
    names = [SCORES_FILE]
    if not parts.done(ROUTER_FILE):
        names.insert(0, ROUTER_FILE)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, parts.partial(ROUTER_FILE), mark)
    ordered = sorted(rows, key=lambda row: (row["split"], row["key"], row["image"], row["tile"]))
    pq.write_table(pa.Table.from_pylist(ordered, SCORES_SCHEMA), parts.partial(SCORES_FILE))
    parts.publish(*names)
