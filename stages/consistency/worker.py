"""What one rank of the consistency stage does: build the models, train, validate, publish the policy's
folder."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from stages.consistency.best_policy import SCORE_FILE, BestPolicy
from stages.consistency.config import ConsistencyConfig
from stages.consistency.kept import keep_outputs
from stages.consistency.learning_rates import consistency_rates
from stages.consistency.packs import ConsistencyPacks, ConsistencySettings
from stages.outputs import POLICY_FOLDER
from stages.training.checkpoints import best_policies
from stages.training.engine import Engine, init_distributed, sharded_inference, whole_parameter
from stages.training.engine_settings import engine_settings
from stages.training.loop import StageTask, TrainingLoop, TrainingPlan, training_plan
from stages.training.parameter_groups import parameter_groups
from stages.training.speed.throughput import measure_throughput
from stages.training.step import derived_seed, evaluating, share_of_rank, sum_over_ranks
from vico.checkpoints import load_model, open_unread
from vico.checkpoints.save import save_model
from vico.model.attention_kernels import use_attention
from vico.model.compiled import compile_layers
from vico.model.connectors import start_from_full
from vico.model.drop_path import add_drop_path
from vico.model.internvl import VicoModel
from vico.model.recomputed import recompute_layers
from vico.model.unread import read_all
from vico.objectives.consistency import ConsistencyTask


def build_engine(settings: ConsistencySettings) -> Engine:
    """Return an engine over the policy, with its compressed connector, and the frozen reference, on this
    rank's device."""
    config, memory = settings.config, settings.train.memory
    use_attention(settings.train.attention.rows, settings.train.attention.vision)
    dtype = getattr(torch, config.optimizer.dtype)
    # What ZeRO-3 spreads is read while it is spread: it need not fit into one memory.
    policy = start_policy(settings, open_unread if memory.zero_stage == 3 else load_model)
    open_reference = load_model if memory.reference == "replicated" else open_unread
    reference = open_reference(settings.model_folder, dtype)
    if settings.train.compile:
        for model in (policy, reference):
            compile_layers(model)
    recompute_layers(policy, memory.activation_checkpointing)
    task = ConsistencyTask(
        policy,
        reference,
        memory.chunk_rows(on_gpus=torch.cuda.is_available()),
        learns_answers=config.target == "answers",
        **reference_placement(memory.reference),
    )
    num_vision_layers = len(policy.base.model.vision_tower.encoder.layer)
    engine = Engine(
        task,
        parameter_groups(task, config.optimizer, consistency_rates(config, num_vision_layers)),
        engine_settings(config.optimizer, config.packs_per_step, settings.train),
    )
    task.phases = engine.phases  # one clock for all phases of a step
    return engine


def start_policy(
    settings: ConsistencySettings, open_model: Callable[[Path, torch.dtype], VicoModel]
) -> VicoModel:
    """Return the policy at the start of the training, in training mode."""
    config = settings.config
    policy = open_model(settings.start_folder, getattr(torch, config.optimizer.dtype)).train()
    policy.router = None  # the router of an earlier training would stay in the policy untrained
    if policy.compressed_connector is None:
        policy.add_compressed_connector(derived_seed(config.seed, "compressed_connector"))
        assert policy.compressed_connector is not None
        if config.connector_start == "full":
            full = policy.base.model.multi_modal_projector
            read_all(full.parameters())
            start_from_full(policy.compressed_connector, full)
    tower = policy.base.model.vision_tower
    tower.requires_grad_(config.train_vision)
    if config.drop_path:
        add_drop_path(tower, config.drop_path)
    return policy


class ReferencePlacement(TypedDict, total=False):
    """The arguments of `ConsistencyTask` that place the reference."""

    shard: Callable[[nn.Module], Callable[..., torch.Tensor]]
    whole: Callable[[nn.Parameter], AbstractContextManager[None]]


def reference_placement(reference: str) -> ReferencePlacement:
    """Return how `ConsistencyTask` keeps the reference, for a value of `train.memory.reference`."""
    if reference == "replicated":
        return {"shard": lambda states: states.to("cuda" if torch.cuda.is_available() else "cpu")}
    return {
        "shard": lambda states: sharded_inference(states, offload=reference == "cpu"),
        "whole": whole_parameter,
    }


def consistency_plan(settings: ConsistencySettings, packs: ConsistencyPacks) -> TrainingPlan:
    """Return the plan of the training; a joint one has other draws than the first."""
    plan = training_plan("consistency", settings.config, packs.num_steps, settings.parts, settings.train)
    return replace(plan, seed=settings.seed)


def train_policy(settings: ConsistencySettings) -> None:
    """Run the whole stage on one rank; rank 0 publishes the policy's folder."""
    config = settings.config
    init_distributed(settings.train.restarts.collective_timeout_s)
    packs = ConsistencyPacks(settings)
    engine = build_engine(settings)
    keep_outputs(settings, packs, engine)
    plan = consistency_plan(settings, packs)
    keep = config.select == "best"
    best = BestPolicy(settings.parts, settings.model_folder, keep, engine.of_rank_0)

    def validate(engine: Engine, step: int) -> dict[str, float]:
        metrics = validation(engine, packs)
        return {**metrics, **best.offer(step, metrics, lambda: policy_state(engine))}

    task = StageTask(packs, lambda sums: summary(sums, config), validate)
    TrainingLoop(engine, task, plan).run()
    publish_policy(settings, policy_state(engine))
    torch.distributed.barrier()


def publish_policy(settings: ConsistencySettings, state: Mapping[str, torch.Tensor] | None) -> None:
    """Publish the best policy that was kept, or the last one; `state` is None except on rank 0."""
    if state is None:
        return
    partial, kept = settings.parts.partial(POLICY_FOLDER), best_policies(settings.parts)
    shutil.rmtree(partial, ignore_errors=True)
    if settings.config.select == "best" and kept:
        shutil.copytree(kept[-1], partial, ignore=shutil.ignore_patterns(SCORE_FILE))
    else:
        save_model(state, settings.model_folder, partial)
    settings.parts.publish(POLICY_FOLDER)


def measure_policy(settings: ConsistencySettings) -> None:
    """Make some updates on one rank to measure their speed; their results are discarded."""
    init_distributed(settings.train.restarts.collective_timeout_s)
    packs = ConsistencyPacks(settings)
    engine = build_engine(settings)
    keep_outputs(settings, packs, engine)
    plan = consistency_plan(settings, packs)
    measure_throughput(engine, packs, plan, lambda: validation(engine, packs))


def policy_state(engine: Engine) -> dict[str, torch.Tensor] | None:
    """Return the policy's whole tensors on rank 0, None elsewhere. Every rank must call it."""
    state, prefix = engine.whole_state(), "policy."
    if state is None:
        return None
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def summary(sums: Mapping[str, float], config: ConsistencyConfig) -> dict[str, float]:
    """Return the metrics of a step from its sums over ranks."""
    budget = config.reference_tokens_per_pack * config.packs_per_step
    loss = "kl" if config.target == "reference" else "cross_entropy"
    return {
        f"{loss}_per_token": sums["kl_sum"] / max(sums["answer_tokens"], 1.0),
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
    """Return the KL per answer token on calibration samples: `kl_full` with all tiles at the full rate,
    `kl_compressed` with all at the compressed rate.

    With several sources, `kl_full/SOURCE` and `kl_compressed/SOURCE` are those of each. Empty if there are no
    calibration samples.
    """
    metrics: dict[str, float] = {}
    with evaluating(engine.module):
        for rate, compressed in (("full", False), ("compressed", True)):
            sums = _calibration_sums(engine, packs, compressed=compressed)
            metrics |= kl_of_sums(sum_over_ranks(sums, engine.device), f"kl_{rate}")
    return metrics


def _calibration_sums(
    engine: Engine, packs: ConsistencyPacks, *, compressed: bool
) -> dict[str, float | torch.Tensor]:
    """Return this rank's `kl_sum` and `answer_tokens` over its share of the packs, in all and by source."""
    calib_packs = packs.calib_packs(compressed)
    source_of_row = {int(row): packs.source(int(row)) for pack in calib_packs for row in pack.rows}
    sums: dict[str, float | torch.Tensor] = {"kl_sum": 0.0, "answer_tokens": 0.0}
    for source in sorted(set(source_of_row.values())):  # the same on every rank
        sums |= {f"kl_sum/{source}": 0.0, f"answer_tokens/{source}": 0.0}
    for _, pack in share_of_rank(calib_packs, engine.rank, engine.world_size):
        batch = packs.empty() if pack is None else packs.calib_batch(pack, compressed=compressed)
        _, counts = engine(batch.to(engine.device), by_sample=True)
        num_answers = torch.bincount(batch.sample_of_answer, minlength=len(batch.rows)).tolist()
        for name in ("kl_sum", "answer_tokens"):
            sums[name] += counts[name]
        for row, kl, count in zip(batch.rows, counts["kl_S"].tolist(), num_answers, strict=True):
            sums[f"kl_sum/{source_of_row[row]}"] += kl
            sums[f"answer_tokens/{source_of_row[row]}"] += count
    return sums


def kl_of_sums(sums: Mapping[str, float], name: str) -> dict[str, float]:
    """Return `name`, the KL over all answer tokens, and `name/SOURCE` if there are several sources."""
    suffixes = [key.removeprefix("kl_sum") for key in sums if key.startswith("kl_sum")]
    reported = suffixes if len(suffixes) > 2 else suffixes[:1]
    return {
        f"{name}{suffix}": sums[f"kl_sum{suffix}"] / sums[f"answer_tokens{suffix}"]
        for suffix in reported
        if sums[f"answer_tokens{suffix}"]
    }
