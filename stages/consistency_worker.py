"""What one rank of the consistency stage does: models, packs of a step, the loop, the policy's folder at the
end."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.site import TrainSettings
from data_prep.index import load_index
from data_prep.packs import Pack, PackPlan, fixed_packs
from data_prep.plan_cache import cached_plan
from data_prep.reader import SampleReader
from stages.best_policy import SCORE_FILE, BestPolicy, kept
from stages.consistency import ConsistencyConfig
from stages.engine import (
    Engine,
    init_distributed,
    sharded_inference,
    whole_parameter,
)
from stages.engine_settings import engine_settings
from stages.learning_rates import check_warmup, consistency_rates, parameter_groups
from stages.optimizer_config import num_training_steps
from stages.parts import Parts
from stages.training import derived_seed, share_of_rank, sum_over_ranks, train, training_plan
from vico.checkpoints import load_model, save_model
from vico.consistency import ConsistencyTask
from vico.drop_path import add_drop_path
from vico.errors import UserError
from vico.model import VicoModel
from vico.packing import PackedBatch, packed_batch
from vico.prompt import load_prompt_format
from vico.settings import ModelSettings


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
        self._reader = SampleReader(shard_folder, self._format)
        self._plans: dict[int, PackPlan] = {}
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
        samples = [self._reader.sample(int(row)) for row in pack.rows]
        return packed_batch(samples, pack.compressed, self.settings, self.config.loss_reduction)

    def empty(self) -> PackedBatch:
        return packed_batch([], [], self.settings, self.config.loss_reduction)

    def calib_packs(self, compressed: bool) -> list[Pack]:
        """At most `validation_packs` packs of calibration samples, evenly spread, all tiles at one rate."""
        columns = self._index.columns("calib")
        if not len(columns):
            return []
        config = self.config
        packs = list(
            fixed_packs(
                columns,
                reference_tokens=config.reference_tokens_per_pack,
                tiles=config.tiles_per_pack,
                tokens_full=self.settings.tokens_full,
                compressed=compressed,
            )
        )
        return packs[:: -(-len(packs) // config.validation_packs)]


def prepared(settings: ConsistencySettings, num_workers: int) -> int:
    """Everything that can be refused before a worker starts; the number of updates."""
    config = settings.config
    if num_workers > config.packs_per_step:
        raise UserError(
            f"resources.workers={num_workers} is more than consistency.packs_per_step="
            f"{config.packs_per_step}; every rank needs a pack of its own in a step: lower "
            "resources.workers or raise packs_per_step"
        )
    packs = ConsistencyPacks(settings)
    check_warmup(config, packs.num_steps)
    calib = packs.calib_packs(compressed=False)  # a sample that fits no pack shows here, not at validation
    if config.select == "best" and not calib:
        raise UserError(
            "consistency.select=best needs calibration samples and the shards have none; raise "
            "shard.calib_share, or set consistency.select: last"
        )
    state_bytes = 16 * sum(path.stat().st_size for path in Path(settings.model_folder).glob("*.safetensors"))
    needed = state_bytes * (settings.train.keep_checkpoints + 1)
    free = shutil.disk_usage(settings.parts.folder).free
    if free < needed:
        raise UserError(
            f"{settings.parts.folder}: {free / 1e9:.1f} GB free, consistency needs up to "
            f"{needed / 1e9:.1f} GB for train.keep_checkpoints={settings.train.keep_checkpoints} and one "
            "more; free some space or choose another --storage"
        )
    return packs.num_steps


def build_engine(settings: ConsistencySettings) -> Engine:
    """Policy with a new connector and the frozen reference under one engine, on this rank's device."""
    config = settings.config
    dtype = getattr(torch, config.optimizer.dtype)
    policy = load_model(settings.model_folder, dtype).train()
    policy.router = None  # a router of an earlier training would be carried along untrained
    if policy.compressed_connector is None:
        policy.add_compressed_connector(derived_seed(config.seed, "compressed_connector"))
    if settings.train.activation_checkpointing:
        checkpoint_activations(policy)
    tower = policy.base.model.vision_tower
    tower.requires_grad_(config.train_vision)
    if config.drop_path:
        add_drop_path(tower, config.drop_path)
    reference = load_model(settings.model_folder, dtype)
    task = ConsistencyTask(
        policy, reference, settings.train.kl_chunk_rows, **reference_placement(settings.train.reference)
    )
    engine = Engine(
        task,
        parameter_groups(task, config.optimizer, consistency_rates(config, len(tower.encoder.layer))),
        engine_settings(config.optimizer, config.packs_per_step, settings.train),
    )
    task.phases = engine.phases  # one clock for the parts of a step
    return engine


def checkpoint_activations(policy: VicoModel) -> None:
    """Layers of the vision tower and the language model are computed again in the backward, not kept."""
    policy.base.gradient_checkpointing_enable({"use_reentrant": False})


def reference_placement(where: str) -> dict[str, Any]:
    """How `ConsistencyTask` is to hold the reference: a copy on every rank, or spread over ranks (and host
    memory)."""
    if where == "replicated":
        return {"shard": lambda states: states.to("cuda" if torch.cuda.is_available() else "cpu")}
    return {
        "shard": lambda states: sharded_inference(states, offload=where == "cpu"),
        "whole": whole_parameter,
    }


def train_policy(settings: ConsistencySettings) -> None:
    """The whole stage on one rank; rank 0 publishes the policy's folder."""
    config = settings.config
    init_distributed()
    packs = ConsistencyPacks(settings)
    engine = build_engine(settings)
    plan = training_plan("consistency", config, packs.num_steps, settings.parts, settings.train)
    best = BestPolicy(settings.parts, settings.model_folder, keep=config.select == "best")

    def validated(engine: Engine, step: int) -> dict[str, float]:
        figures = validation(engine, packs)
        return {**figures, **best.offer(step, figures, lambda: policy_state(engine))}

    train(engine, packs, packs.empty, plan, lambda sums: summary(sums, config), validated)
    state = policy_state(engine)
    if engine.rank == 0:
        partial, chosen = settings.parts.partial("policy"), kept(settings.parts)
        shutil.rmtree(partial, ignore_errors=True)
        if config.select == "best" and chosen:
            shutil.copytree(chosen[-1], partial, ignore=shutil.ignore_patterns(SCORE_FILE))
        else:
            save_model(state, settings.model_folder, partial)
        settings.parts.publish("policy")
    torch.distributed.barrier()


def policy_state(engine: Engine) -> dict[str, torch.Tensor] | None:
    """The policy's whole tensors on rank 0, None elsewhere; call on every rank."""
    state, prefix = engine.whole_state(), "policy."
    if state is None:
        return None
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def summary(sums: Mapping[str, float], config: ConsistencyConfig) -> dict[str, float]:
    """Metrics of a step from its sums over ranks."""
    budget = config.reference_tokens_per_pack * config.packs_per_step
    return {
        "kl_per_token": sums["kl_sum"] / max(sums["answer_tokens"], 1.0),
        "answer_tokens": sums["answer_tokens"],
        "samples": sums["samples"],
        "tiles": sums["tiles"],
        "share_compressed": sums["compressed_tiles"] / max(sums["tiles"], 1.0),
        "policy_tokens": sums["policy_tokens"],
        "reference_tokens": sums["reference_tokens"],
        "packs": sums["packs"],
        "tiles_per_pack": sums["tiles"] / max(sums["packs"], 1.0),
        "tokens_per_pack": sums["reference_tokens"] / max(sums["packs"], 1.0),
        "fill_rate": sums["reference_tokens"] / budget,
    }


@torch.no_grad()
def validation(engine: Engine, packs: ConsistencyPacks) -> dict[str, float]:
    """KL per answer token on calibration samples, all tiles at the full and all at the compressed rate;
    nothing where the split is empty."""
    task: ConsistencyTask = engine.module
    task.eval()
    found = {}
    for rate, compressed in (("full", False), ("compressed", True)):
        sums: dict[str, Any] = {"kl_sum": 0.0, "answer_tokens": 0.0}
        for _, pack in share_of_rank(packs.calib_packs(compressed), engine.rank, engine.world_size):
            batch = packs.empty() if pack is None else packs.batch(pack)
            _, counts = engine(batch.to(engine.device))
            sums = {name: value + counts[name] for name, value in sums.items()}
        total = sum_over_ranks(sums, engine.device)
        if total["answer_tokens"]:
            found[f"kl_{rate}"] = total["kl_sum"] / total["answer_tokens"]
    task.train()
    return found
