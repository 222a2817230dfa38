"""What the consistency stage trains on and what it refuses before a worker starts: packs of every step,
decoded, and those of calibration samples."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cluster.site import TrainSettings
from data_prep.packs.plan import Pack, PackPlan, fixed_packs
from data_prep.packs.plan_cache import cached_plan
from data_prep.shards.index import load_index
from data_prep.shards.reader import SampleReader
from stages.consistency.config import ConsistencyConfig
from stages.consistency.learning_rates import check_warmup
from stages.parts import Parts
from stages.training.checkpoints import FACTS_FILE, best_policies, checkpoints
from stages.training.engine_settings import check_engine_settings
from stages.training.optimizer import num_training_steps
from vico.checkpoints.tensor_files import stored_tensors
from vico.errors import UserError
from vico.packing import PackedBatch, packed_batch
from vico.prompt import load_prompt_format
from vico.settings import ModelSettings

_OWN_CONNECTOR = ("compressed_connector.", "mlp2.")


@dataclass(frozen=True)
class ConsistencySettings:
    """All that a rank needs, picklable: the hashed config, paths, and the site's part."""

    config: ConsistencyConfig
    shard_folder: Path
    model_folder: Path
    parts: Parts
    train: TrainSettings


class ConsistencyPacks:
    """Packs of the whole training: `packs(step)` over all epochs, `batch(pack)` decoded, `calib_packs` for
    validation."""

    def __init__(self, settings: ConsistencySettings):
        config, shard_folder = settings.config, settings.shard_folder
        self.config, self._shard_folder = config, shard_folder
        self._cache = settings.parts.folder / "plan"  # not an output: built anew where it is gone
        self._format = load_prompt_format(settings.model_folder)
        self._index = load_index(shard_folder)
        self._reader = SampleReader(
            shard_folder, self._format, self._index, threads=settings.train.data_threads
        )
        self._plans: dict[int, PackPlan] = {}
        self._calib: dict[bool, list[Pack]] = {}
        self.num_steps = num_training_steps(
            config.epochs, config.max_steps, lambda epoch: self._plan(epoch).num_steps
        )

    @property
    def settings(self) -> ModelSettings:
        return self._format.settings

    def _plan(self, epoch: int) -> PackPlan:
        if epoch not in self._plans:
            self._plans[epoch] = self._new_plan(epoch)
        return self._plans[epoch]

    def _new_plan(self, epoch: int) -> PackPlan:
        config = self.config
        return cached_plan(
            self._shard_folder,
            "train",
            self._cache,
            self._index,
            reference_tokens=config.reference_tokens_per_pack,
            tiles=config.tiles_per_pack,
            packs_per_step=config.packs_per_step,
            seed=config.seed,
            epoch=epoch,
            tokens_full=self.settings.tokens_full,
            window_samples=config.window_samples,
            rate_unit=config.rate_unit,
            compress_share=config.compress_share,
        )

    def packs(self, step: int) -> list[Pack]:
        """The G packs of an update, counted from 0 over all epochs (an epoch's number of steps may differ by
        repeats)."""
        epoch = 0
        while step >= self._plan(epoch).num_steps:
            step -= self._plan(epoch).num_steps
            epoch += 1
        return self._plan(epoch).step(step)

    def batch(self, pack: Pack) -> PackedBatch:
        samples = self._reader.samples(pack.rows.tolist())
        return packed_batch(samples, pack.compressed, self.settings, self.config.loss_reduction)

    def empty(self) -> PackedBatch:
        return packed_batch([], [], self.settings, self.config.loss_reduction)

    def calib_packs(self, compressed: bool) -> list[Pack]:
        """At most `validation_packs` packs of calibration samples, evenly spread, all tiles at one rate. They
        are chosen once: the split may be large, and only these of its packs are held."""
        if compressed not in self._calib:
            num_packs = sum(1 for _ in self._all_calib_packs(compressed))
            stride = max(-(-num_packs // self.config.validation_packs), 1)
            chosen = islice(self._all_calib_packs(compressed), 0, None, stride)
            self._calib[compressed] = list(chosen)
        return self._calib[compressed]

    def _all_calib_packs(self, compressed: bool) -> Iterator[Pack]:
        columns = self._index.columns("calib")
        if len(columns):
            yield from fixed_packs(
                columns,
                reference_tokens=self.config.reference_tokens_per_pack,
                tiles=self.config.tiles_per_pack,
                tokens_full=self.settings.tokens_full,
                compressed=compressed,
            )

    def source(self, row: int) -> str:
        """The source of a sample by its row number in the index."""
        return self._index.row(row)["source"]


def prepared(settings: ConsistencySettings, num_workers: int) -> int:
    """Everything that can be refused before a worker starts; the number of updates."""
    config = settings.config
    if num_workers > config.packs_per_step:
        raise UserError(
            f"resources.workers={num_workers} is more than consistency.packs_per_step="
            f"{config.packs_per_step}; every rank needs a pack of its own in a step: lower "
            "resources.workers or raise packs_per_step"
        )
    check_engine_settings(settings.train)
    packs = ConsistencyPacks(settings)
    check_warmup(config, packs.num_steps)
    calib = packs.calib_packs(compressed=False)  # a sample that fits no pack shows here, not at validation
    if config.select == "best" and not calib:
        raise UserError(
            "consistency.select=best needs calibration samples and the shards have none; raise "
            "shard.calib_share, or set consistency.select: last"
        )
    check_connector_start(settings)
    return packs.num_steps


def check_connector_start(settings: ConsistencySettings) -> None:
    """UserError where a start of the new connector is asked for and the model brings its own."""
    start = settings.config.connector_start
    names = stored_tensors(settings.model_folder)
    if start != "full" and any(name.startswith(_OWN_CONNECTOR) for name in names):
        raise UserError(
            f"consistency.connector_start={start} has no effect: {settings.model_folder} brings a compressed "
            "connector of its own, which goes on; leave connector_start out, or give a model without one"
        )


def check_disk(settings: ConsistencySettings, num_workers: int, *, remote: bool = False) -> None:
    """UserError where the storage (`remote`: the working copy of an object store) has no room for what is to
    come: `keep_checkpoints` and the one that is written before the oldest goes, less those that are there;
    the last one's form for another number of ranks; the policy, and with `select: best` the best one and
    the one before it, less what is there."""
    item = 4 if settings.config.optimizer.dtype == "float32" else 2
    num_parameters = sum(math.prod(one.shape) for one in stored_tensors(settings.model_folder).values())
    # weights, and in float32 a master copy and two moments; a tenth more for the new connector and the rest
    checkpoint_bytes = int(1.1 * num_parameters * (item + 3 * 4))
    there = checkpoints(settings.parts)
    # an object store keeps one that is being brought there, though a newer one has taken its place
    keep = settings.train.keep_checkpoints
    most = keep + (2 if remote else 1)
    missing = max(most - len(there), 1)
    conversions = 0
    if there:
        last = json.loads((there[-1][1] / FACTS_FILE).read_text())
        conversions = 2 * (last["world_size"] != num_workers)  # and DeepSpeed's slices on the way
    policies = 3 - min(len(best_policies(settings.parts)), 2) if settings.config.select == "best" else 1
    needed = checkpoint_bytes * (missing + conversions) + int(1.1 * num_parameters * item) * policies
    free = shutil.disk_usage(settings.parts.folder).free
    if free < needed:
        raise UserError(
            f"{'work' if remote else 'storage'}={settings.parts.folder} has {free / 1e9:.1f} GB free, but "
            f"consistency needs up to {needed / 1e9:.1f} GB: {missing} more checkpoints of "
            f"{checkpoint_bytes / 1e9:.1f} GB (train.keep_checkpoints={keep} and {most - keep} more)"
            + (", the last one converted for another number of ranks" if conversions else "")
            + f", {policies} model folders; free some space or choose another "
            + ("`work` in the site" if remote else "--storage")
        )
