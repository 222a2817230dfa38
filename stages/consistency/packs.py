"""The packs of the consistency stage, for training and for validation, and the checks before a worker
starts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.compute as pc
import torch

from cluster.train_settings import TrainSettings
from data_prep.draws import draw_bits
from data_prep.packs.epoch_plans import EpochPlans
from data_prep.packs.fixed_packs import fixed_packs
from data_prep.packs.pack import Pack, PackBudget
from data_prep.packs.plan import PackPlan, PlanSettings
from data_prep.packs.plan_cache import cached_plan
from data_prep.packs.rates import RateDraw
from data_prep.packs.routed import RoutedTiles
from data_prep.shards.index import load_index
from data_prep.shards.reader import SampleReader
from stages.consistency.config import ConsistencyConfig, JointConsistencyConfig
from stages.consistency.learning_rates import check_warmup
from stages.losses_policy import policy_digest
from stages.outputs import METRICS_FILE
from stages.parts import Parts
from stages.router_files import calibrated_threshold
from stages.training.engine_settings import check_engine_settings
from stages.training.kept.outputs import KeptOutputs
from stages.training.kept.shard_rows import ShardRows, rows_by_shard
from stages.training.kept_batches import KeptBatches
from vico.checkpoints.tensor_files import stored_tensors
from vico.errors import UserError
from vico.packing import PackedBatch, packed_batch, packed_texts
from vico.prompt import load_prompt_format
from vico.settings import ModelSettings

_OWN_CONNECTOR = ("compressed_connector.", "mlp2.")


@dataclass(frozen=True)
class JointInputs:
    """What a joint training has beside the first one: the policy it starts from, the output of `rates`."""

    policy_folder: Path
    rates_folder: Path

    @property
    def routed(self) -> RoutedTiles:
        """Return the router's decisions. Raises UserError if its threshold is missing."""
        return RoutedTiles(self.rates_folder / "parts", calibrated_threshold(self.rates_folder))

    def check(self) -> None:
        """Raise UserError if the rates were chosen by the router of another policy."""
        path = self.rates_folder / METRICS_FILE
        if json.loads(path.read_text(encoding="utf-8")).get("policy") != policy_digest(self.policy_folder):
            raise UserError(
                f"{path}: these rates were chosen by the router of another "
                f"policy than {self.policy_folder}; leave out inputs.adopt.joint_rates"
            )


@dataclass(frozen=True)
class ConsistencySettings:
    """All that a rank needs; can be pickled: the hashed config, paths, and the site's settings.

    `joint` is None for the first training.
    """

    config: ConsistencyConfig
    shard_folder: Path
    model_folder: Path
    parts: Parts
    train: TrainSettings
    joint: JointInputs | None = None

    @property
    def start_folder(self) -> Path:
        """The model folder that the policy starts from; the reference is always that of `model_folder`."""
        return self.model_folder if self.joint is None else self.joint.policy_folder

    @property
    def block(self) -> str:
        """The path of the stage's block in the pipeline file."""
        return "consistency" if self.joint is None else "joint.consistency"

    @property
    def seed(self) -> int:
        """The seed of order, packing, rates and dropout. A joint training has other draws than the first."""
        if self.joint is None:
            return self.config.seed
        return int(draw_bits("joint training", self.config.seed)[0]) >> 1


@dataclass(frozen=True)
class Totals:
    """How often a training reads a train sample, on average by answer tokens; tiles and answer tokens of all
    train and calib samples, each counted once."""

    passes: float
    tiles: int
    answer_tokens: int


class ConsistencyPacks:
    """The packs of all epochs: `packs(step)` plans them, `batch(pack)` decodes one. `calib_packs` are for
    validation.

    `features` and `reference_states` are set by a rank that has computed them; without them a batch has
    pixels and no states.
    """

    def __init__(self, settings: ConsistencySettings):
        config, shard_folder = settings.config, settings.shard_folder
        self.config, self._shard_folder = config, shard_folder
        self._seed, self._rates = settings.seed, rate_draw(settings)
        self._cache = settings.parts.folder / "plan"  # not an output: it is built again if it is missing
        self._format = load_prompt_format(settings.model_folder)
        self.index = load_index(shard_folder)
        self._reader = SampleReader(
            shard_folder, self._format, self.index, threads=settings.train.data_threads
        )
        self.features: KeptOutputs | None = None
        self.reference_states: KeptOutputs | None = None
        self._calib: dict[bool, list[Pack]] = {}
        self._calib_batches = KeptBatches[PackedBatch]()
        self._epochs = EpochPlans(self._new_plan, config.epochs, config.max_steps)
        self.num_steps = self._epochs.num_steps

    @property
    def settings(self) -> ModelSettings:
        return self._format.settings

    def _new_plan(self, epoch: int) -> PackPlan:
        config = self.config
        settings = PlanSettings(
            self._budget(),
            packs_per_step=config.packs_per_step,
            seed=self._seed,
            epoch=epoch,
            window_samples=config.window_samples,
            rates=self._rates,
        )
        return cached_plan(self._shard_folder, "train", self._cache, settings, self.index)

    def _budget(self) -> PackBudget:
        config = self.config
        return PackBudget(config.reference_tokens_per_pack, config.tiles_per_pack, self.settings.tokens_full)

    def packs(self, step: int) -> list[Pack]:
        """Return the G packs of a step, counted from 0 over all epochs."""
        return self._epochs.packs(step)

    def batch(self, pack: Pack) -> PackedBatch:
        """Return the pack decoded."""
        return self._batch(pack.rows.tolist(), pack.compressed)

    def empty(self) -> PackedBatch:
        """Return a batch without samples."""
        return self._batch([], [])

    def _batch(self, rows: Sequence[int], compressed: Sequence[np.ndarray]) -> PackedBatch:
        settings, reduction = self.settings, self.config.loss_reduction
        if self.features is None:
            batch = packed_batch(self._reader.samples(rows), compressed, settings, reduction)
        else:
            texts, tiles = [self._reader.text(row) for row in rows], self.features.of_rows(rows)
            tiles = tiles if len(tiles) else tiles.new_zeros(1, *self.features.shape)
            batch = packed_texts(texts, tiles, compressed, settings, reduction)
        if self.reference_states is None:
            return batch
        return replace(batch, reference_hidden_AD=self.reference_states.of_rows(rows))

    def pixels(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the tiles of samples, uint8 [N, 3, S, S]."""
        return torch.from_numpy(np.concatenate([sample.pixels for sample in self._reader.samples(rows)]))

    def totals(self) -> Totals:
        """Return the totals of the samples that a training reads."""
        table = self.index.table(["split", "repeat", "num_tiles", "answer_tokens"])
        in_train = pc.equal(table["split"], "train").to_numpy()
        read = in_train | pc.equal(table["split"], "calib").to_numpy()
        tiles, answers = (table[name].to_numpy() for name in ("num_tiles", "answer_tokens"))
        epochs = self.num_steps / max(self._epochs.num_steps_of(0), 1)
        per_epoch = float(table["repeat"].to_numpy()[in_train] @ answers[in_train])
        return Totals(
            passes=epochs * per_epoch / max(int(answers[in_train].sum()), 1),
            tiles=int(tiles[read].sum()),
            answer_tokens=int(answers[read].sum()),
        )

    def kept_rows(self, column: Literal["num_tiles", "answer_tokens"]) -> dict[int, ShardRows]:
        """Return all that may be kept, by shard: the samples of train and of validations, with this column of
        the index as number of values."""
        packs = [*self.calib_packs(compressed=False), *self.calib_packs(compressed=True)]
        table = self.index.table(["split", "shard", column])
        rows, split = table["row"].to_numpy(), table["split"]
        chosen = np.isin(rows, [row for pack in packs for row in pack.rows.tolist()])
        chosen |= pc.equal(split, "train").to_numpy()
        return rows_by_shard(
            rows[chosen], table["shard"].to_numpy()[chosen], table[column].to_numpy()[chosen]
        )

    def reference_packs(self, shards: Mapping[int, ShardRows]) -> dict[int, list[Pack]]:
        """Return packs of all samples of each shard, each sample once, for the reference."""
        columns, budget = self.index.columns(), self._budget()
        return {
            number: list(fixed_packs(columns.at(shard.rows), budget, compressed=False))
            for number, shard in shards.items()
        }

    def calib_packs(self, compressed: bool) -> list[Pack]:
        """Return at most `validation_packs` packs of calibration samples, evenly spread, all tiles at one
        rate.

        They are chosen once. Only these packs are kept in memory, because the split may be large.
        """
        if compressed not in self._calib:
            num_packs = sum(1 for _ in self._all_calib_packs(compressed))
            stride = max(-(-num_packs // self.config.validation_packs), 1)
            chosen = islice(self._all_calib_packs(compressed), 0, None, stride)
            self._calib[compressed] = list(chosen)
        return self._calib[compressed]

    def calib_batch(self, pack: Pack, *, compressed: bool) -> PackedBatch:
        """Return a pack of `calib_packs(compressed)` decoded. It is kept if memory for it is left."""
        return self._calib_batches.get((compressed, pack.rows.tobytes()), lambda: self.batch(pack))

    def _all_calib_packs(self, compressed: bool) -> Iterator[Pack]:
        columns = self.index.columns("calib")
        if len(columns):
            yield from fixed_packs(columns, self._budget(), compressed=compressed)

    def source(self, row: int) -> str:
        """Return the source of a sample by its row number in the index."""
        return self.index.row(row)["source"]


def rate_draw(settings: ConsistencySettings) -> RateDraw:
    """Return how the rates of the training's tiles are chosen."""
    config, joint = settings.config, settings.joint
    if joint is None:
        return RateDraw(config.rate_unit, config.compress_share)
    assert isinstance(config, JointConsistencyConfig)
    return RateDraw(config.rate_unit, config.compress_share, joint.routed, config.random_share)


def prepared(settings: ConsistencySettings) -> ConsistencyPacks:
    """Return the packs of the training, after all checks that are possible before a worker starts.

    Raises UserError for what cannot work.
    """
    config = settings.config
    check_engine_settings(settings.train)
    if settings.joint is not None:
        settings.joint.check()
    packs = ConsistencyPacks(settings)
    check_warmup(config, packs.num_steps)
    packs.packs(0)  # rates that lack a tile fail here, not on a rank
    calib = packs.calib_packs(compressed=False)  # a sample too large for a pack fails here, not at validation
    if config.select == "best" and not calib:
        raise UserError(
            f"{settings.block}.select=best needs calibration samples and the shards have none; raise "
            f"shard.calib_share, or set {settings.block}.select: last"
        )
    check_connector_start(settings)
    return packs


def check_connector_start(settings: ConsistencySettings) -> None:
    """Raise UserError if the config chooses a start for the compressed connector but the model has its
    own."""
    if settings.joint is not None:
        return
    start = settings.config.connector_start
    names = stored_tensors(settings.model_folder)
    if start != "full" and any(name.startswith(_OWN_CONNECTOR) for name in names):
        raise UserError(
            f"consistency.connector_start={start} has no effect: {settings.model_folder} has a compressed "
            "connector of its own, which is trained further; leave connector_start out, or give a model "
            "without one"
        )
