"""What one rank of the consistency stage does: models, packs of a step, the loop, the policy's folder at the
end."""

import shutil
from collections.abc import Mapping
from typing import Any

import torch

from stages.consistency.best_policy import SCORE_FILE, BestPolicy
from stages.consistency.config import ConsistencyConfig
from stages.consistency.learning_rates import consistency_rates
from stages.consistency.packs import ConsistencyPacks, ConsistencySettings
from stages.training.checkpoints import best_policies
from stages.training.engine import Engine, init_distributed, sharded_inference, whole_parameter
from stages.training.engine_settings import engine_settings
from stages.training.loop import derived_seed, share_of_rank, sum_over_ranks, train, training_plan
from stages.training.parameter_groups import parameter_groups
from stages.training.throughput import measure_throughput
from vico.checkpoints import load_model
from vico.checkpoints.load import save_model
from vico.model.compiled import compile_layers
from vico.model.connectors import start_from_full
from vico.model.drop_path import add_drop_path
from vico.model.internvl import VicoModel
from vico.objectives.consistency import ConsistencyTask


def build_engine(settings: ConsistencySettings) -> Engine:
    """Policy with a new connector and the frozen reference under one engine, on this rank's device."""
    config = settings.config
    dtype = getattr(torch, config.optimizer.dtype)
    policy = load_model(settings.model_folder, dtype).train()
    policy.router = None  # a router of an earlier training would be carried along untrained
    if policy.compressed_connector is None:
        policy.add_compressed_connector(derived_seed(config.seed, "compressed_connector"))
        if config.connector_start == "full":
            start_from_full(policy.compressed_connector, policy.base.model.multi_modal_projector)
    if settings.train.activation_checkpointing:
        checkpoint_activations(policy)
    tower = policy.base.model.vision_tower
    tower.requires_grad_(config.train_vision)
    if config.drop_path:
        add_drop_path(tower, config.drop_path)
    reference = load_model(settings.model_folder, dtype)
    if settings.train.compile:
        for model in (policy, reference):
            compile_layers(model)
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
    init_distributed(settings.train.collective_timeout_s)
    packs = ConsistencyPacks(settings)
    engine = build_engine(settings)
    plan = training_plan("consistency", config, packs.num_steps, settings.parts, settings.train)
    keep = config.select == "best"
    best = BestPolicy(settings.parts, settings.model_folder, keep, engine.of_rank_0)

    def validated(engine: Engine, step: int) -> dict[str, float]:
        figures = validation(engine, packs)
        return {**figures, **best.offer(step, figures, lambda: policy_state(engine))}

    train(engine, packs, packs.empty, plan, lambda sums: summary(sums, config), validated)
    state = policy_state(engine)
    if engine.rank == 0:
        partial, chosen = settings.parts.partial("policy"), best_policies(settings.parts)
        shutil.rmtree(partial, ignore_errors=True)
        if config.select == "best" and chosen:
            shutil.copytree(chosen[-1], partial, ignore=shutil.ignore_patterns(SCORE_FILE))
        else:
            save_model(state, settings.model_folder, partial)
        settings.parts.publish("policy")
    torch.distributed.barrier()


def measure_policy(settings: ConsistencySettings) -> None:
    """Some updates of the stage on one rank, for their speed; nothing of them stays."""
    init_distributed(settings.train.collective_timeout_s)
    packs = ConsistencyPacks(settings)
    engine = build_engine(settings)
    plan = training_plan("consistency", settings.config, packs.num_steps, settings.parts, settings.train)
    measure_throughput(engine, packs, packs.empty, plan, lambda engine: validation(engine, packs))


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
    """KL per answer token on calibration samples, all tiles at the full and all at the compressed rate, and
    where they come from several sources that of each (`kl_full/SOURCE`); nothing where the split is empty."""
    task: ConsistencyTask = engine.module
    task.eval()
    found = {}
    for rate, compressed in (("full", False), ("compressed", True)):
        calib = packs.calib_packs(compressed)
        sources = {int(row): packs.source(int(row)) for pack in calib for row in pack.rows}
        sums: dict[str, Any] = {"kl_sum": 0.0, "answer_tokens": 0.0}
        for source in sorted(set(sources.values())):  # the same on every rank
            sums |= {f"kl_sum/{source}": 0.0, f"answer_tokens/{source}": 0.0}
        for _, pack in share_of_rank(calib, engine.rank, engine.world_size):
            batch = packs.empty() if pack is None else packs.batch(pack)
            _, counts = engine(batch.to(engine.device), by_sample=True)
            answers = torch.bincount(batch.sample_of_answer, minlength=len(batch.rows))
            for name in ("kl_sum", "answer_tokens"):
                sums[name] += counts[name]
            for row, kl, number in zip(batch.rows, counts["kl_S"].tolist(), answers.tolist(), strict=True):
                sums[f"kl_sum/{sources[row]}"] += kl
                sums[f"answer_tokens/{sources[row]}"] += number
        found |= kl_of_sums(sum_over_ranks(sums, engine.device), f"kl_{rate}")
    task.train()
    return found


def kl_of_sums(sums: Mapping[str, float], name: str) -> dict[str, float]:
    """`name` over all answer tokens, and `name/SOURCE` where there are several sources."""
    places = [key.removeprefix("kl_sum") for key in sums if key.startswith("kl_sum")]
    wanted = places if len(places) > 2 else places[:1]
    return {
        f"{name}{place}": sums[f"kl_sum{place}"] / sums[f"answer_tokens{place}"]
        for place in wanted
        if sums[f"answer_tokens{place}"]
    }
