"""What a router training reads: labelled tiles in packs, the same on every rank."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from cluster.site import TrainSettings
from data_prep.packs.plan import Pack, PackPlan, fixed_packs
from data_prep.shards.index import IndexColumns, load_index
from data_prep.shards.reader import SampleReader
from stages.parts import Parts
from stages.router.config import RouterConfig
from stages.training.engine_settings import check_engine_settings
from stages.training.optimizer import num_training_steps
from vico.errors import UserError
from vico.objectives.router import IGNORED, LabelledTiles
from vico.prompt import load_prompt_format
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
