"""What a consistency training keeps of its frozen parts, so that later passes over the samples only read it.

Vision features of a frozen tower, and the reference's hidden states at the answers: neither depends on the
rates of the tiles. They are computed shard by shard before the first update, on all ranks.
"""

from collections.abc import Iterator
from functools import partial

import torch

from stages.consistency.disk import kept_bytes
from stages.consistency.packs import ConsistencyPacks, ConsistencySettings
from stages.training.engine import Engine
from stages.training.kept.features import compute_features, open_tower
from stages.training.kept.files import KeptFiles, tensors_digest
from stages.training.kept.folders import features_folder, states_folder
from stages.training.kept.outputs import KeptOutputs, shard_file
from stages.training.ranks.phases import phase_items
from stages.training.step import share_of_rank
from vico.objectives.consistency import ConsistencyTask
from vico.packing import PackedBatch


def keep_outputs(settings: ConsistencySettings, packs: ConsistencyPacks, engine: Engine) -> None:
    """Let the packs read what `kept_bytes` counts; compute what is missing of it. Every rank must call it."""
    task = engine.module
    assert isinstance(task, ConsistencyTask)
    num_bytes = kept_bytes(settings, packs)
    if num_bytes.features and task.one_vision_pass:
        packs.features = _features(settings, packs)
    if num_bytes.states:
        packs.reference_states = _reference_states(settings, packs, engine, task)
        task.drop_reference()


def _features(settings: ConsistencySettings, packs: ConsistencyPacks) -> KeptOutputs:
    model = open_tower(settings.model_folder, getattr(torch, settings.config.optimizer.dtype))
    digest = tensors_digest(model.base.model.vision_tower)
    files = KeptFiles(features_folder(settings.parts), digest, model.lm_head.weight.dtype)
    shape = packs.settings.vision_tokens, model.vision_width
    kept = KeptOutputs(files, packs.kept_rows("num_tiles"), packs.index, shape)
    compute_features(kept, model, packs.pixels, settings.config.tiles_per_pack, settings.parts.attempt_folder)
    return kept


def _reference_states(
    settings: ConsistencySettings, packs: ConsistencyPacks, engine: Engine, task: ConsistencyTask
) -> KeptOutputs:
    """Compute the states that are missing. All ranks run the reference equally often, because its parameters
    may be spread over them.

    Samples that run together depend on the shard alone, so a file that is written again is the same.
    """
    fingerprint = settings.parts.folder.name  # it covers the reference's weights
    dtype = getattr(torch, settings.config.optimizer.dtype)
    files = KeptFiles(states_folder(settings.parts), fingerprint, dtype)
    shards = packs.kept_rows("answer_tokens")
    kept = KeptOutputs(files, shards, packs.index, (task.policy.language_width,))
    missing = kept.missing_shards()
    own = [
        number for _, number in share_of_rank(missing, engine.rank, engine.world_size) if number is not None
    ]
    plans = packs.reference_packs({number: shards[number] for number in own})
    most_runs = max(engine.of_all_ranks(sum(len(plan) for plan in plans.values())))
    num_runs = 0

    def states(batch: PackedBatch) -> torch.Tensor:
        nonlocal num_runs
        num_runs += 1
        return task.reference_hidden(batch.to(engine.device))

    def of_packs(number: int) -> Iterator[torch.Tensor]:
        for pack in plans[number]:
            yield states(packs.batch(pack))

    unit, folder = "shards of reference states", settings.parts.attempt_folder
    for number in phase_items(own, len(missing), unit, folder, may_stop=True):
        files.write(shard_file(number), shards[number].num_values, partial(of_packs, number))
    while num_runs < most_runs:
        states(packs.empty())
    engine.barrier()
    return kept
