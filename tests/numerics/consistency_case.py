"""One small consistency training, the same for every way of running it: 10 steps of 4 packs.

There are several kinds of packs: `mixed` (rates per tile, with text-only and empty packs), `tile` and `image`
(rates per tile or image), `text-N` (on N ranks, the first rank sees no picture), `moe` (as `mixed`, for the
model with experts in the folder `moe` beside MODEL).

As a program this is one rank of a DeepSpeed training, in an environment as torchrun makes it:
`python -m tests.numerics.consistency_case MODEL OUT CASE...`, a case being KIND:ZERO_STAGE:DTYPE[:VARIANT].
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cluster.train_settings import MemorySettings, TrainSettings
from stages.consistency.config import ConsistencyConfig
from stages.consistency.learning_rates import consistency_rates
from stages.consistency.worker import reference_placement
from stages.training.engine import Engine, init_distributed
from stages.training.engine_settings import engine_settings
from stages.training.optimizer import OptimizerConfig
from stages.training.parameter_groups import parameter_groups
from stages.training.step import Update, derived_seed, share_of_rank, sum_over_ranks, train_step
from vico.checkpoints import load_model
from vico.model.compiled import compile_layers, compiled_layer_types
from vico.model.internvl import VicoModel
from vico.model.recomputed import recompute_layers
from vico.objectives.consistency import ConsistencyTask
from vico.packing import EncodedSample, PackedBatch, packed_batch
from vico.prompt import PromptFormat, load_prompt_format

NUM_STEPS, PACKS_PER_STEP, SEED = 10, 4, 7
# In one process float32 alone ends 0.7e-5 from float64 at a rate of 1e-3, and half as far at 5e-4.
OPTIMIZER = OptimizerConfig(learning_rate=5e-4, weight_decay=0.05, grad_clip=1.0)
SHARPER = 4.0
CONFIG = ConsistencyConfig(seed=0, connector_lr_scale=2.0, connector_warmup_steps=2, vision_lr_decay=0.8)
RATES = consistency_rates(CONFIG, num_vision_layers=2)
MOE = "moe"
# Every key of `zero_optimization` that a site may set, with the ZeRO stages and a value at which it matters
# in this small training.
SITE_KEYS: dict[str, tuple[tuple[int, ...], object]] = {
    "allgather_bucket_size": ((1, 2), 500),
    "allgather_partitions": ((1, 2), False),
    "contiguous_gradients": ((1, 2), False),
    "memory_efficient_linear": ((3,), False),
    "overlap_comm": ((1, 2, 3), True),
    "reduce_bucket_size": ((1, 2, 3), 1000),
    "reduce_scatter": ((1, 2, 3), False),
    "stage3_allgather_sequential": ((3,), True),
    "stage3_max_live_parameters": ((3,), 1000),
    "stage3_max_reuse_distance": ((3,), 0),
    "stage3_model_persistence_threshold": ((3,), 5000),
    "stage3_param_persistence_threshold": ((3,), 1000),
    "stage3_prefetch_bucket_size": ((3,), 0),
    "stage3_use_all_reduce_for_fetch_params": ((3,), True),
    "sub_group_size": ((3,), 1000),
    "use_multi_rank_bucket_allreduce": ((1, 2), False),
    "zero_hpz_partition_size": ((3,), 2),
}


def samples(prompt_format: PromptFormat, number: int, tiles_per_image: tuple[int, ...]) -> EncodedSample:
    """Return a sample drawn from its number alone."""
    random = np.random.default_rng([SEED, number])
    question = "<image>\n" * len(tiles_per_image) + "what is written here " * int(random.integers(1, 4))
    answer = " ".join(str(value) for value in random.integers(0, 99, int(random.integers(1, 9))))
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    size = prompt_format.settings.tile_size
    pixels = random.standard_normal((sum(tiles_per_image), 3, size, size)).astype(np.float32)
    return EncodedSample(
        str(number), number, prompt_format.encode(turns, tiles_per_image), pixels, tiles_per_image
    )


def pack(prompt_format: PromptFormat, step: int, number: int, kind: str = "mixed") -> PackedBatch:
    """Return pack `number` of `step`. With `mixed`, the first pack of every third step is text-only and the
    last pack of the last step is empty."""
    random = np.random.default_rng([SEED, step, number])
    if kind == "mixed" and step == NUM_STEPS - 1 and number == PACKS_PER_STEP - 1:
        return packed_batch([], [], prompt_format.settings, "sample")
    text_ranks = int(kind.removeprefix("text-")) if kind.startswith("text-") else 0
    shapes = [((3,), (1,)), ((2, 1), ()), ((4,), (1,), (1,)), ((1,),)][int(random.integers(4))]
    if (kind == "mixed" and number == 0 and step % 3 == 0) or (text_ranks and number % text_ranks == 0):
        shapes = ((), ())
    chosen = [samples(prompt_format, 100 * step + 10 * number + i, shape) for i, shape in enumerate(shapes)]
    if kind == "image":
        rates = [np.repeat(random.random(len(shape)) < 0.5, shape) for shape in shapes]
    else:
        rates = [random.random(sample.skeleton.num_tiles) < 0.5 for sample in chosen]
    return packed_batch(chosen, rates, prompt_format.settings, "sample")


def sharp_model(model_folder: Path, dtype: torch.dtype) -> VicoModel:
    """Return the model with larger logits: those of a random model are so flat that a KL is mostly
    rounding."""
    model = load_model(model_folder, dtype)
    with torch.no_grad():
        model.base.model.language_model.norm.weight.mul_(SHARPER)
    return model


def consistency_task(
    model_folder: Path,
    dtype: torch.dtype = torch.float32,
    reference: str = "replicated",
    *,
    compiled: bool = False,
) -> ConsistencyTask:
    """Return the task of a policy with a new connector and of the reference, without dropout."""
    policy, frozen = (sharp_model(model_folder, dtype) for _ in range(2))
    if compiled:
        for model in (policy, frozen):
            compile_layers(model, "aot_eager")
    policy.add_compressed_connector(derived_seed(SEED, "compressed_connector"))
    placement = reference_placement(reference)
    return ConsistencyTask(policy, frozen, kl_chunk_rows=5, **placement)


def model_of(model_folder: Path, kind: str) -> tuple[Path, str]:
    """Return the model of a kind of training, and the kind of its packs."""
    return (model_folder.with_name(MOE), "mixed") if kind == MOE else (model_folder, kind)


def reference_run(
    model_folder: Path, kind: str = "mixed", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, dict[str, torch.Tensor]]:
    """Run the same training in one process with torch alone: AdamW on float32 weights, of which the model has
    a copy in `dtype`, with the gradients of the whole step summed in float32."""
    model_folder, kind = model_of(model_folder, kind)
    prompt_format, task = load_prompt_format(model_folder), consistency_task(model_folder, dtype).to(device)
    groups = parameter_groups(task, OPTIMIZER, RATES)
    masters = {p: p.detach().float().clone().requires_grad_() for g in groups for p in g.parameters}
    optimizer = torch.optim.AdamW(
        [{"params": [masters[p] for p in g.parameters], "weight_decay": g.weight_decay} for g in groups],
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
    )
    losses, gradients = [], {}
    for step in range(NUM_STEPS):
        packs = [pack(prompt_format, step, number, kind) for number in range(PACKS_PER_STEP)]
        weight, loss = sum(batch.loss_weight for batch in packs), 0.0
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for batch in packs:
            pack_loss = task(batch.to(device))[0] / weight
            pack_loss.backward()
            loss += pack_loss.item()
            for parameter, master in masters.items():
                if parameter.grad is not None:
                    master.grad += parameter.grad
                    parameter.grad = None
        losses.append(loss)
        if step in (0, NUM_STEPS - 1):
            gradients[step] = {name: masters[p].grad.clone() for name, p in task.named_parameters()}
        torch.nn.utils.clip_grad_norm_(masters.values(), OPTIMIZER.grad_clip)
        for group, ours in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = ours.rate.at(OPTIMIZER.learning_rate_at(step, NUM_STEPS), step)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in masters.items():
                parameter.copy_(master)
        if step == CONFIG.connector_warmup_steps - 1:
            after_warmup = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "gradients": gradients,
        "after_warmup": after_warmup,
        "state": task.state_dict(),
    }


def assert_in_effect(task: ConsistencyTask, engine: Engine, where: str, what: str) -> None:
    """Check that the variant takes effect: equal numbers would not show it."""
    zero = engine._engine.optimizer
    assert type(zero.optimizer).__name__ == ("DeepSpeedCPUAdam" if where == "offload" else "AdamW")
    if what == "parameters":
        assert {p.ds_tensor.device.type for p in task.policy.parameters()} == {"cpu"}
        assert engine._engine.zero_offload_param().device == "cpu"
    assert hasattr(task._reference[1], "ds_id") == (where == "reference")
    layers = task.policy.base.model.language_model.layers
    recomputes = where == "checkpointing" and not what.startswith("none")
    assert all(("forward" in vars(layer)) == recomputes for layer in layers)
    assert bool(compiled_layer_types(task)) == what.endswith("-compiled")
    if where == "key":
        config = engine._engine._config.zero_config.model_dump(by_alias=True)
        assert config[what] == SITE_KEYS[what][1]


def loss_without_gradients(engine: Engine, batches: Sequence[PackedBatch], weight: float) -> float:
    """Return the loss of a step as a validation or a checkpoint computes it."""
    with torch.no_grad():
        sums = [engine(batch.to(engine.device))[0] for batch in batches]
    return sum_over_ranks({"loss": torch.stack(sums).sum()}, engine.device)["loss"] / weight


def rank_run(model_folder: Path, kind: str, zero_stage: int, dtype: str, variant: str = "") -> dict | None:
    """Run the same training on this rank under DeepSpeed; return what rank 0 saw, None elsewhere.

    `variant`: `offload-optimizer`, `offload-parameters`, `reference-sharded`, `reference-cpu`,
    `reference-sharded-compiled`, `checkpointing-none|selective|full`, which may end in `-compiled`, `fused`
    (AdamW as on CUDA), or `key-KEY` with a key of `SITE_KEYS`.
    """
    init_distributed(timeout_s=1800)
    model_folder, kind = model_of(model_folder, kind)
    prompt_format = load_prompt_format(model_folder)
    where, _, what = variant.partition("-")
    setting, compiled = what.removesuffix("-compiled"), what.endswith("-compiled")
    memory = MemorySettings(
        zero_stage=zero_stage,
        offload=setting if where == "offload" else "none",
        reference=setting if where == "reference" else "replicated",
    )
    task = consistency_task(model_folder, getattr(torch, dtype), memory.reference, compiled=compiled)
    if where == "checkpointing":
        recompute_layers(task.policy.train(), setting)  # it does so only in training mode
        for part in task.policy.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    # ZeRO-3 partitions every parameter, however small: the case that fails first
    zero: dict[str, object] = {"stage3_param_persistence_threshold": 0} if zero_stage == 3 else {}
    if where == "key":
        zero[what] = SITE_KEYS[what][1]
    site = TrainSettings(memory=memory, deepspeed={"zero_optimization": zero})
    settings = engine_settings(OPTIMIZER.model_copy(update={"dtype": dtype}), PACKS_PER_STEP, site)
    settings = replace(settings, fused=settings.fused or where == "fused")
    engine = Engine(task, parameter_groups(task, OPTIMIZER, RATES), settings)
    assert_in_effect(task, engine, where, what)
    losses, gradients = [], {}
    for step in range(NUM_STEPS):
        packs = [pack(prompt_format, step, number, kind) for number in range(PACKS_PER_STEP)]
        empty = packed_batch([], [], prompt_format.settings, "sample")
        share = [
            (number, empty if batch is None else batch)
            for number, batch in share_of_rank(packs, engine.rank, engine.world_size)
        ]
        seen: dict[str, torch.Tensor] = {}
        weight = sum(batch.loss_weight for batch in packs)
        before = (
            loss_without_gradients(engine, [batch for _, batch in share], weight) if where == "key" else None
        )
        update = Update(step, OPTIMIZER.learning_rate_at(step, NUM_STEPS), SEED, "test")
        sums = train_step(
            engine,
            share,
            update,
            before_update=lambda seen=seen: seen.update(engine.whole_gradients()),
        )
        losses.append(sums["loss"])
        assert before is None or math.isclose(before, sums["loss"], rel_tol=1e-6), (before, sums["loss"])
        if step in (0, NUM_STEPS - 1):
            gradients[step] = seen
    state = engine.whole_state()
    engine.close()
    if state is None:
        return None
    return {"losses": torch.tensor(losses, dtype=torch.float64), "gradients": gradients, "state": state}


if __name__ == "__main__":
    model, out, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    for case in cases:
        wanted_kind, stage, wanted_dtype, *more = case.split(":")
        run = rank_run(Path(model), wanted_kind, int(stage), wanted_dtype, *more)
        if run is not None:
            torch.save(run, Path(out) / f"{case}.pt")
    torch.distributed.destroy_process_group()  # its threads would be there when the process ends
