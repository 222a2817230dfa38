"""The data of a router training: labelled tiles in packs, the same on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow.compute as pc
import torch

from cluster.train_settings import TrainSettings
from data_prep.packs.epoch_plans import EpochPlans
from data_prep.packs.fixed_packs import fixed_packs
from data_prep.packs.pack import Pack, PackBudget
from data_prep.packs.plan import PackPlan, PlanSettings
from data_prep.packs.rates import RateDraw
from data_prep.shards.index import IndexColumns, load_index
from data_prep.shards.reader import SampleReader
from stages.losses_policy import check_policy
from stages.outputs import LABELS_FILE
from stages.parts import Parts
from stages.router.blank_tiles import NUM_BLANK, blank_tiles
from stages.router.config import RouterConfig
from stages.router.tile_labels import TileLabels
from stages.training.engine_settings import check_engine_settings
from stages.training.kept.outputs import KeptOutputs
from stages.training.kept.shard_rows import ShardRows, rows_by_shard
from stages.training.kept_batches import KeptBatches
from vico.errors import UserError
from vico.objectives.router import IGNORED, TargetTiles, class_weights
from vico.prompt import load_prompt_format
from vico.settings import ModelSettings

BLANK_FILE = "blank"
"""The file with the features of the blank tiles, beside those of the shards."""
_UNLIMITED_TOKENS = 2**40  # the router sees only tiles, so only their number limits a pack


@dataclass(frozen=True)
class RouterSettings:
    """All that a rank needs: the hashed config, paths, and the site's settings. Can be pickled."""

    config: RouterConfig
    shard_folder: Path
    policy_folder: Path
    label_folder: Path
    parts: Parts
    train: TrainSettings


class TilePosition(TypedDict):
    """Where a tile is: key of the sample, number of the image, number of the tile."""

    key: str
    image: int
    tile: int


class RouterPacks:
    """Labelled train samples in packs over all epochs, and those of the other splits in `of_split`.

    `features` are set by a rank that has computed them; without them a batch has pixels.
    """

    def __init__(self, settings: RouterSettings):
        config = self.config = settings.config
        self._format = load_prompt_format(settings.policy_folder)
        self.index = load_index(settings.shard_folder)
        self._reader = SampleReader(
            settings.shard_folder, self._format, self.index, threads=settings.train.data_threads
        )
        self.features: KeptOutputs | None = None
        soft = config.targets == "soft"
        self.labels = TileLabels(settings.label_folder, config.soft_spread if soft else None)
        self._validation_batches = KeptBatches[TargetTiles]()
        self._train = self._labelled("train")
        if not len(self._train):
            raise UserError(
                f"{settings.label_folder}: no label for any train sample; raise ratio.max_samples "
                "(samples per split)"
            )
        self._epochs = EpochPlans(self._new_plan, config.epochs, config.max_steps)
        self.num_steps = self._epochs.num_steps

    @property
    def settings(self) -> ModelSettings:
        return self._format.settings

    def _labelled(self, split: str) -> IndexColumns:
        """Return the planning columns of the split's samples that have labels."""
        table = self.index.table(["key"], split)
        chosen = pc.is_in(table["key"], self.labels.keys.cast(table["key"].type))
        return self.index.columns(split).take(chosen.to_numpy())

    def _new_plan(self, epoch: int) -> PackPlan:
        settings = PlanSettings(
            self._budget(),
            packs_per_step=self.config.packs_per_step,
            seed=self.config.seed,
            epoch=epoch,
            window_samples=self.config.window_samples,
            rates=RateDraw("full"),
        )
        return PackPlan(self._train, settings)

    def _budget(self) -> PackBudget:
        return PackBudget(_UNLIMITED_TOKENS, self.config.tiles_per_pack, self.settings.tokens_full)

    def packs(self, step: int) -> list[Pack]:
        """Return the G packs of a step, counted from 0 over all epochs."""
        return self._epochs.packs(step)

    def of_split(self, split: str) -> list[Pack]:
        """Return packs with every labelled sample of a split once, in index order."""
        columns = self._labelled(split)
        if not len(columns):
            return []
        return list(fixed_packs(columns, self._budget(), compressed=False))

    @cached_property
    def validation_packs(self) -> list[Pack]:
        """At most `config.validation_packs` packs of calibration samples, evenly spread, chosen once."""
        calib = self.of_split("calib")
        return calib[:: max(-(-len(calib) // self.config.validation_packs), 1)]

    def check_validation(self) -> None:
        """Raise UserError unless the tiles of a validation have both labels, which an AUC needs."""
        labels_N = np.concatenate([self._labels(pack)[0] for pack in self.validation_packs])
        num_keep, num_compress = int((labels_N == 1).sum()), int((labels_N == 0).sum())
        if not num_keep or not num_compress:
            raise UserError(
                f"the calib tiles of a validation have {num_keep} labels keep and {num_compress} compress, "
                "and the best router is chosen by how it ranks both; raise shard.calib_share or "
                f"router.validation_packs ({self.config.validation_packs})"
            )

    @cached_property
    def shard_rows(self) -> dict[int, ShardRows]:
        """The labelled train and calib samples by shard: those whose features are kept."""
        splits = [self._train, self._labelled("calib")]
        names = ("rows", "shard", "num_tiles")
        return rows_by_shard(*(np.concatenate([getattr(split, name) for split in splits]) for name in names))

    @cached_property
    def _weights(self) -> tuple[float, float]:
        """The weights of (compress, keep); the blank tiles, which are compress, count, too."""
        if self.config.class_weights == "none":
            return 1.0, 1.0
        keys, repeat_S = self.index.table(["key"], "train")["key"], self.index.columns("train").repeat
        compress, keep = self.labels.totals(keys.to_pylist(), repeat_S)
        return class_weights(
            compress + self.config.blank_share * self._train.repeat @ self._train.num_tiles, keep
        )

    def batch(self, pack: Pack) -> TargetTiles:
        """Return the pack with targets, and with its blank tiles."""
        if not len(pack.rows):
            return self.empty()
        batch = self.measured(pack)
        numbers = self._blank_numbers(pack)
        tiles = [batch.tiles, self._blank(numbers)] if len(numbers) else [batch.tiles]
        blank_weights = torch.full((len(numbers),), self._weights[0])
        weights_N = torch.cat([batch.weights_N, blank_weights])
        return TargetTiles(
            torch.cat(tiles),
            torch.cat([batch.targets_N, torch.zeros(len(numbers))]),
            weights_N,
            torch.cat([batch.labels_N, torch.full((len(numbers),), IGNORED)]),
            float(weights_N.sum()),
        )

    def measured(self, pack: Pack) -> TargetTiles:
        """Return a pack of train or calib samples with targets, without blank tiles."""
        return self._with_targets(pack, self._tiles(pack))

    def validation_batch(self, pack: Pack) -> TargetTiles:
        """Return `measured`; without kept features, the pictures are decoded once, as far as memory is set
        aside for them."""
        if self.features is not None:
            return self.measured(pack)
        return self._validation_batches.get(pack.rows.tobytes(), lambda: self.measured(pack))

    def _with_targets(self, pack: Pack, tiles: torch.Tensor) -> TargetTiles:
        labels_N, targets_N = self._labels(pack)
        of_compress, of_keep = self._weights
        weights_N = np.where(labels_N == IGNORED, 0, of_compress + (of_keep - of_compress) * targets_N)
        return TargetTiles(
            tiles,
            torch.from_numpy(targets_N),
            torch.from_numpy(weights_N.astype(np.float32)),
            torch.from_numpy(labels_N),
            float(weights_N.sum()),
        )

    def _labels(self, pack: Pack) -> tuple[np.ndarray, np.ndarray]:
        """Return labels int64 [N] and targets float32 [N] of a pack's tiles."""
        indexed = [self.index.row(int(row), ("key", "tiles")) for row in pack.rows]
        by_sample = [self.labels.of(sample["key"], tuple(sample["tiles"])) for sample in indexed]
        labels, targets = zip(*by_sample, strict=True)
        return np.concatenate(labels), np.concatenate(targets)

    def _tiles(self, pack: Pack) -> torch.Tensor:
        """Return the tiles of a pack's samples: their features if they are kept, else their pixels."""
        if self.features is None:
            return self.pixels(pack.rows.tolist())
        return self.features.of_rows(pack.rows.tolist())

    def pixels(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the tiles of samples, uint8 [N, 3, S, S]."""
        return torch.from_numpy(np.concatenate([sample.pixels for sample in self._reader.samples(rows)]))

    def blank_pixels(self, split: str, numbers: list[int]) -> torch.Tensor:
        """Return blank tiles of train or calib, uint8 [N, 3, S, S]."""
        return torch.from_numpy(blank_tiles(self.config.seed, split, numbers, self.settings.tile_size))

    def _blank_numbers(self, pack: Pack) -> list[int]:
        """Draw the blank tiles of a pack, by seed and the pack's samples."""
        random = np.random.default_rng([self.config.seed, len(pack.rows), *pack.rows.tolist()])
        count = int(self.config.blank_share * pack.num_tiles + random.random())
        return random.integers(0, NUM_BLANK, count).tolist()

    def _blank(self, numbers: list[int]) -> torch.Tensor:
        if self.features is None:
            return self.blank_pixels("train", numbers)
        return self.features.files.read(BLANK_FILE, numbers)

    def positioned(self, pack: Pack) -> tuple[TargetTiles, list[TilePosition]]:
        """Return the pixels of a pack that is not empty, with labels, and the position of each tile."""
        batch = self._with_targets(pack, self.pixels(pack.rows.tolist()))
        positions: list[TilePosition] = [
            {"key": indexed["key"], "image": image, "tile": tile}
            for indexed in (self.index.row(int(row), ("key", "tiles")) for row in pack.rows)
            for image, count in enumerate(indexed["tiles"])
            for tile in range(count)
        ]
        return batch, positions

    def empty(self) -> TargetTiles:
        """Return one tile of zeros without weight."""
        size = self.settings.tile_size
        zeros = torch.zeros(1)
        return TargetTiles(
            torch.zeros(1, 3, size, size, dtype=torch.uint8), zeros, zeros, torch.tensor([IGNORED]), 0.0
        )


def prepared(settings: RouterSettings) -> int:
    """Return the largest number of updates, after all checks that are possible before a worker starts.

    Raises UserError for what cannot work.
    """
    check_engine_settings(settings.train)
    check_policy(settings.label_folder / LABELS_FILE, settings.policy_folder, "label")
    packs = RouterPacks(settings)
    packs.labels.check_both_labels()
    packs.of_split("test")  # a sample too large for a pack fails here, not after the training
    if not packs.of_split("calib"):
        raise UserError(
            f"{settings.label_folder}: no labelled calib tiles to calibrate the threshold on; raise "
            "shard.calib_share, or add calib to ratio.splits"
        )
    packs.check_validation()
    return packs.num_steps
