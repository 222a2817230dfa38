"""The data of a router training: labelled tiles in packs, the same on every rank."""

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
from stages.router.config import RouterConfig
from stages.router.tile_labels import TileLabels
from stages.training.engine_settings import check_engine_settings
from vico.errors import UserError
from vico.objectives.router import IGNORED, LabelledTiles
from vico.prompt import load_prompt_format
from vico.settings import ModelSettings

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
    """Labelled train samples in packs over all epochs, and those of the other splits in `of_split`."""

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
                f"{settings.label_folder}: no label for any train sample; raise ratio.max_samples "
                "(samples per split)"
            )
        self._epochs = EpochPlans(self._new_plan, self.config.epochs, self.config.max_steps)
        self.num_steps = self._epochs.num_steps

    @property
    def settings(self) -> ModelSettings:
        return self._format.settings

    def _labelled(self, split: str) -> IndexColumns:
        """Return the planning columns of the split's samples that have labels."""
        table = self._index.table(["key"], split)
        chosen = pc.is_in(table["key"], self.labels.keys.cast(table["key"].type))
        return self._index.columns(split).take(chosen.to_numpy())

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

    def batch(self, pack: Pack) -> LabelledTiles:
        """Return the pack decoded, with labels."""
        return self.tiles(pack)[0] if len(pack.rows) else self.empty()

    def tiles(self, pack: Pack) -> tuple[LabelledTiles, list[TilePosition]]:
        """Return the tiles of a pack that is not empty, with labels, and the position of each."""
        samples = self._reader.samples(pack.rows.tolist())
        labels = np.concatenate([self.labels.of(sample.key, sample.tiles_per_image) for sample in samples])
        pixels = torch.from_numpy(np.concatenate([sample.pixels for sample in samples]))
        positions: list[TilePosition] = [
            {"key": sample.key, "image": image, "tile": tile}
            for sample in samples
            for image, count in enumerate(sample.tiles_per_image)
            for tile in range(count)
        ]
        num_labels = float((labels != IGNORED).sum())
        return LabelledTiles(pixels, torch.from_numpy(labels), num_labels), positions

    def empty(self) -> LabelledTiles:
        """Return one tile of zeros without a label."""
        size = self.settings.tile_size
        return LabelledTiles(torch.zeros(1, 3, size, size, dtype=torch.uint8), torch.tensor([IGNORED]), 0.0)


def prepared(settings: RouterSettings) -> int:
    """Return the number of updates, after all checks that are possible before a worker starts.

    Raises UserError for what cannot work.
    """
    check_engine_settings(settings.train)
    check_policy(settings.label_folder / LABELS_FILE, settings.policy_folder, "label")
    packs = RouterPacks(settings)
    packs.of_split("test")  # a sample too large for a pack fails here, not after the training
    if not packs.of_split("calib"):
        raise UserError(
            f"{settings.label_folder}: no labelled calib tiles to calibrate the threshold on; raise "
            "shard.calib_share, or add calib to ratio.splits"
        )
    return packs.num_steps
