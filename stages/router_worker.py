"""What one rank of the router stage does: labelled tiles of a step, the loop, scores of calib and test tiles
at the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from cluster.site import TrainSettings
from data_prep.index import IndexColumns, load_index
from data_prep.packs import Pack, PackPlan, fixed_packs
from data_prep.reader import SampleReader
from stages.engine import Engine, init_distributed
from stages.engine_settings import check_engine_settings, engine_settings
from stages.learning_rates import parameter_groups
from stages.optimizer_config import num_training_steps
from stages.parts import Parts
from stages.router import RouterConfig
from stages.throughput import measure_throughput
from stages.training import (
    TrainingPlan,
    derived_seed,
    share_of_rank,
    sum_over_ranks,
    train,
    training_plan,
)
from vico.checkpoints import load_model
from vico.errors import UserError
from vico.prompt import load_prompt_format
from vico.routing_task import IGNORED, LabelledTiles, RouterTask
from vico.settings import ModelSettings

_UNLIMITED_TOKENS = 2**40  # the router sees tiles alone, so only their number bounds a pack


@dataclass(frozen=True)
class RouterSettings:
    """All that a rank needs, picklable: the hashed config, paths, and the site's part."""

    config: RouterConfig
    shard_folder: Path
    policy_folder: Path
    label_folder: Path
    parts: Parts
    train: TrainSettings


class TileLabels:
    """Labels by sample and tile: `of(key, tiles_per_image)` int64 [T] in prompt order, -100 where there is
    none. Arrays over all tiles, with one entry a sample beside them."""

    def __init__(self, label_folder: Path):
        columns = ["key", "image", "tile", "label"]
        table = pq.read_table(label_folder / "labels.parquet", columns=columns).sort_by("key")
        self._image, self._tile, self._label = (
            table[name].to_numpy().astype(np.int16) for name in ("image", "tile", "label")
        )
        counts = pc.value_counts(table["key"])  # in the order of the sorted keys
        self.keys: pa.Array = counts.field("values")
        ends = np.cumsum(counts.field("counts").to_numpy())
        self._spans = {
            key: (end - count, end)
            for key, count, end in zip(
                self.keys.to_pylist(), counts.field("counts").to_pylist(), ends.tolist(), strict=True
            )
        }

    def of(self, key: str, tiles_per_image: tuple[int, ...]) -> np.ndarray:
        found = [np.full(count, IGNORED, np.int64) for count in tiles_per_image]
        for place in range(*self._spans.get(key, (0, 0))):
            found[self._image[place]][self._tile[place]] = self._label[place]
        return np.concatenate(found) if found else np.zeros(0, np.int64)


class RouterPacks:
    """Labelled samples in packs of at most `tiles_per_pack` tiles, over all epochs; `of_split` measures."""

    def __init__(self, settings: RouterSettings):
        self.config = settings.config
        self._format = load_prompt_format(settings.policy_folder)
        self._index = load_index(settings.shard_folder)
        self._reader = SampleReader(
            settings.shard_folder, self._format, self._index, threads=settings.train.data_threads
        )
        self.labels = TileLabels(settings.label_folder)
        self._train = self._labelled("train")
        if not len(self._train):
            raise UserError(
                f"{settings.label_folder}: no label for any train sample; raise ratio.max_samples"
            )
        self._plans: dict[int, PackPlan] = {}
        self.num_steps = num_training_steps(
            self.config.epochs, self.config.max_steps, lambda epoch: self._plan(epoch).num_steps
        )

    @property
    def settings(self) -> ModelSettings:
        return self._format.settings

    def _labelled(self, split: str) -> IndexColumns:
        """The planning columns of the split's samples that have labels."""
        table = self._index.table(["key"], split)
        chosen = pc.is_in(table["key"], self.labels.keys.cast(table["key"].type))
        return self._index.columns(split).take(chosen.to_numpy())

    def _plan(self, epoch: int) -> PackPlan:
        if epoch not in self._plans:
            self._plans[epoch] = PackPlan(
                self._train,
                reference_tokens=_UNLIMITED_TOKENS,
                tiles=self.config.tiles_per_pack,
                packs_per_step=self.config.packs_per_step,
                seed=self.config.seed,
                epoch=epoch,
                tokens_full=self.settings.tokens_full,
                window_samples=self.config.window_samples,
                rate_unit="full",
            )
        return self._plans[epoch]

    def packs(self, step: int) -> list[Pack]:
        """The G packs of an update, counted from 0 over all epochs."""
        epoch = 0
        while step >= self._plan(epoch).num_steps:
            step -= self._plan(epoch).num_steps
            epoch += 1
        return self._plan(epoch).step(step)

    def of_split(self, split: str) -> list[Pack]:
        """Every labelled sample of a split once, in index order."""
        columns = self._labelled(split)
        if not len(columns):
            return []
        return list(
            fixed_packs(
                columns,
                reference_tokens=_UNLIMITED_TOKENS,
                tiles=self.config.tiles_per_pack,
                tokens_full=self.settings.tokens_full,
                compressed=False,
            )
        )

    @cached_property
    def validation_packs(self) -> list[Pack]:
        """At most so many packs of calibration samples, evenly spread, chosen once."""
        calib = self.of_split("calib")
        return calib[:: max(-(-len(calib) // self.config.validation_packs), 1)]

    def batch(self, pack: Pack) -> LabelledTiles:
        return self.tiles(pack)[0] if len(pack.rows) else self.empty()

    def tiles(self, pack: Pack) -> tuple[LabelledTiles, list[dict[str, Any]]]:
        """The pack's tiles with labels, and for each where it stands: key, image, tile."""
        samples = self._reader.samples(pack.rows.tolist())
        labels = np.concatenate([self.labels.of(sample.key, sample.tiles_per_image) for sample in samples])
        pixels = torch.from_numpy(np.concatenate([sample.pixels for sample in samples]))
        places = [
            {"key": sample.key, "image": image, "tile": tile}
            for sample in samples
            for image, count in enumerate(sample.tiles_per_image)
            for tile in range(count)
        ]
        return LabelledTiles(pixels, torch.from_numpy(labels), float((labels != IGNORED).sum())), places

    def empty(self) -> LabelledTiles:
        size = self.settings.tile_size
        return LabelledTiles(torch.zeros(1, 3, size, size), torch.tensor([IGNORED]), 0.0)


def prepared(settings: RouterSettings, num_workers: int) -> int:
    """Everything that can be refused before a worker starts; the number of updates."""
    config = settings.config
    if num_workers > config.packs_per_step:
        raise UserError(
            f"resources.workers={num_workers} is more than router.packs_per_step={config.packs_per_step}; "
            "lower resources.workers or raise packs_per_step"
        )
    check_engine_settings(settings.train)
    packs = RouterPacks(settings)
    packs.of_split("test")  # a sample that fits no pack shows here, not after the training
    if not packs.of_split("calib"):
        raise UserError(
            f"{settings.label_folder}: no labelled calib tiles to calibrate the threshold on; raise "
            "shard.calib_share, or name calib in ratio.splits"
        )
    return packs.num_steps


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
