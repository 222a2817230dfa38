"""Settings of site and pipeline file with which a training needs less memory, cheapest first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from cluster.site import Site
from pipeline.planning.training_shape import training_shape
from stages.consistency.config import ConsistencyConfig
from vico.memory.model_sizes import ModelSizes
from vico.memory.training_memory import TrainingShape

_MOST_RANKS = 512
_SMALLEST_PACK = 2048
"""Reference tokens of the smallest pack to try."""
_FIELDS = {
    "checkpointing": "train.memory.activation_checkpointing",
    "zero_stage": "train.memory.zero_stage",
    "reference": "train.memory.reference",
    "offload": "train.memory.offload",
    "kl_chunk_rows": "train.memory.kl_chunk_rows",
    "bucket_elements": "train.deepspeed.zero_optimization.reduce_bucket_size",
}
_COSTS: Mapping[str, Mapping[Any, int]] = {
    "checkpointing": {"none": 0, "selective": 2, "full": 4},
    "zero_stage": {1: 0, 2: 1, 3: 6},
    "reference": {"replicated": 0, "sharded": 5, "cpu": 20},
    "offload": {"none": 0, "optimizer": 20, "parameters": 40},
}
"""Settings that change no result, and what they cost in time beside each other, roughly."""
_SLOW = 20
"""Costs from which on a setting moves things to host memory: more ranks and larger buckets are faster."""
_CHUNK_ROWS = (1024, 256)
_SMALL_BUCKET = 5 * 10**7


@dataclass(frozen=True)
class Limits:
    """What the rest of the pipeline file allows a training.

    `most_ranks` are the fewest packs per step of the stages with the same number of ranks. `sample_tokens`
    are those of the largest sample at the full rate, which has to fit into a pack.
    """

    most_ranks: int
    sample_tokens: int


@dataclass(frozen=True)
class Training:
    """A training to change: its config, model, the site as its stage sees it, and its names.

    `block` is its block in the pipeline file, `ranks_field` the site's field of its number of ranks.
    """

    config: ConsistencyConfig
    sizes: ModelSizes
    site: Site
    limits: Limits
    block: str
    ranks_field: str


@dataclass(frozen=True)
class Remedy:
    """Other settings, as a user writes them, and the training's shape with them."""

    settings: tuple[str, ...]
    shape: TrainingShape


@dataclass(frozen=True)
class _Pack:
    """Another pack, or the same; and another dtype, or the same."""

    config: ConsistencyConfig
    settings: tuple[str, ...]


def remedies(training: Training, shape: TrainingShape) -> Iterator[Remedy]:
    """Yield remedies for a training of this shape, those to prefer first.

    First settings of the site for the same packs, without and with host memory; then smaller packs; then
    bfloat16 in place of float32; then more devices than the site has; last, packs for which samples must be
    shorter, too.
    """
    near, far = _ranks(training, shape)
    packs, small = _packs(training)
    dtypes = [training.config, *_in_bfloat16(training.config)]
    for ranks in (near, far):
        for config in dtypes:
            for pack in packs:
                yield from _with(training, shape, _typed(training, pack, config), ranks)
    for config in dtypes:
        for pack in small:
            yield from _with(training, shape, _typed(training, pack, config), (*near, *far))


def _with(
    training: Training, shape: TrainingShape, pack: _Pack, many_ranks: Sequence[int]
) -> Iterator[Remedy]:
    """Yield the remedies with one pack: fast settings with every number of ranks, then slow ones."""
    machines = _machines(shape)
    of_pack = training_shape(pack.config, training.sizes, training.site)
    fast = [changes for cost, changes in machines if cost < _SLOW]
    slow = [changes for cost, changes in machines if cost >= _SLOW]
    choices = [*product(many_ranks, fast), *((ranks, changes) for changes in slow for ranks in many_ranks)]
    for ranks, changes in choices:
        settings = (*_ranks_settings(training, ranks), *_shown(changes, shape), *pack.settings)
        if settings:
            packs = -(-pack.config.packs_per_step // ranks)
            yield Remedy(settings, replace(_changed(of_pack, changes), num_ranks=ranks, packs_per_rank=packs))


def _machines(shape: TrainingShape) -> list[tuple[int, dict[str, Any]]]:
    """Return (cost, settings of the site) that need no more memory than those of the shape, cheapest
    first."""
    now = {name: costs[getattr(shape, name)] for name, costs in _COSTS.items()}
    choices = [
        [value for value, cost in costs.items() if cost >= now[name]] for name, costs in _COSTS.items()
    ]
    buffers = _buffers(shape)
    machines = []
    for (more, sizes), values in product(buffers, product(*choices)):
        changes = dict(zip(_COSTS, values, strict=True))
        if changes["offload"] != "parameters" or changes["zero_stage"] == 3:
            cost = more + sum(_COSTS[name][value] - now[name] for name, value in changes.items())
            machines.append((cost, {**changes, **sizes}))
    return sorted(machines, key=lambda machine: machine[0])


def _buffers(shape: TrainingShape) -> list[tuple[int, dict[str, int]]]:
    """Return (cost, sizes of buffers): the present ones, and smaller ones."""
    rows = [shape.kl_chunk_rows, *(rows for rows in _CHUNK_ROWS if rows < shape.kl_chunk_rows)]
    bucket = shape.exchange.bucket_elements
    buckets = [bucket, *([_SMALL_BUCKET] if bucket > _SMALL_BUCKET else [])]
    return [
        (number + 2 * (elements != bucket), {"kl_chunk_rows": chunk, "bucket_elements": elements})
        for elements in buckets
        for number, chunk in enumerate(rows)
    ]


def _changed(shape: TrainingShape, changes: Mapping[str, Any]) -> TrainingShape:
    memory = {name: value for name, value in changes.items() if name != "bucket_elements"}
    exchange = replace(shape.exchange, bucket_elements=changes["bucket_elements"])
    return replace(shape, **memory, exchange=exchange)


def _shown(changes: Mapping[str, Any], shape: TrainingShape) -> list[str]:
    now = {**vars(shape), "bucket_elements": shape.exchange.bucket_elements}
    return [f"{_FIELDS[name]}: {value}" for name, value in changes.items() if now[name] != value]


def _ranks(training: Training, shape: TrainingShape) -> tuple[list[int], list[int]]:
    """Return numbers of ranks that the site's nodes take, the present one first, and larger ones."""
    most = min(training.limits.most_ranks, _MOST_RANKS)
    here = training.site.most_processes
    here = shape.num_ranks if here is None else max(min(here, most), shape.num_ranks)
    doubled = [shape.num_ranks * 2**power for power in range(10)]
    near = sorted({ranks for ranks in doubled if ranks <= here} | {here})
    return near, [ranks for ranks in doubled if here < ranks <= most]


def _ranks_settings(training: Training, ranks: int) -> list[str]:
    site = training.site
    if ranks == site.resources.workers:
        return []
    settings = [f"{training.ranks_field}: {ranks}"]
    here = site.most_processes
    if here is not None and ranks > here:
        group = next((g for g in site.nodes if site.resources.nodes in (None, g.name)), None)
        if group is None:
            settings.append(f"ray.num_cpus: {ranks * site.resources.threads_per_worker}")
        else:
            settings.append(f"count of {group.name} in nodes: {-(-ranks * group.count // here)}")
    return settings


def _packs(training: Training) -> tuple[list[_Pack], list[_Pack]]:
    """Return the present pack and smaller ones that every sample fits into, and still smaller ones."""
    config, full = training.config, training.sizes.full_tokens
    packs = [_Pack(config, ())]
    small: list[_Pack] = []
    sample_tokens = min(training.limits.sample_tokens, config.reference_tokens_per_pack)
    parts = 2
    while config.reference_tokens_per_pack // parts >= _SMALLEST_PACK:
        tokens = max(config.reference_tokens_per_pack // parts, sample_tokens)
        tiles = max(config.tiles_per_pack // parts, min(config.tiles_per_pack, sample_tokens // full), 1)
        packs.append(_smaller(training, tiles, tokens, parts))
        if tokens == sample_tokens:
            break
        parts *= 2
    while (tokens := config.reference_tokens_per_pack // parts) >= _SMALLEST_PACK:
        tiles = max(min(config.tiles_per_pack, tokens // full), 1)
        pack = _smaller(training, tiles, tokens, parts)
        small.append(replace(pack, settings=(*pack.settings, f"shard.max_tokens: {tokens}")))
        parts *= 2
    return packs, small


def _smaller(training: Training, tiles: int, tokens: int, parts: int) -> _Pack:
    block, config = training.block, training.config
    changes = {
        "tiles_per_pack": tiles,
        "reference_tokens_per_pack": tokens,
        "packs_per_step": config.packs_per_step * parts,
    }
    changes = {name: value for name, value in changes.items() if getattr(config, name) != value}
    settings = [f"{block}.{name}: {value}" for name, value in changes.items()]
    settings[-1] += " for the same update"
    return _Pack(config.model_copy(update=changes), tuple(settings))


def _in_bfloat16(config: ConsistencyConfig) -> list[ConsistencyConfig]:
    if config.optimizer.dtype == "bfloat16":
        return []
    optimizer = config.optimizer.model_copy(update={"dtype": "bfloat16"})
    return [config.model_copy(update={"optimizer": optimizer})]


def _typed(training: Training, pack: _Pack, config: ConsistencyConfig) -> _Pack:
    """Return the pack with the dtype of `config`."""
    if config.optimizer == pack.config.optimizer:
        return pack
    typed = pack.config.model_copy(update={"optimizer": config.optimizer})
    return _Pack(typed, (f"{training.block}.optimizer.dtype: bfloat16", *pack.settings))
