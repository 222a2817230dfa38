"""Settings that ask for more tiles than the model cuts a picture into. For the shard stage and its check."""

from collections.abc import Sequence
from pathlib import Path

from data_prep.records.sets import RecordSet
from stages.shard.config import ShardConfig


def tile_limit_notes(config: ShardConfig, sets: Sequence[RecordSet], model: Path) -> list[str]:
    """Return a line for each setting that asks for more tiles than the model's own limit, which holds.

    The default of `shard.max_tiles`, the limit of the published models, gives no line: nobody set it.
    """
    from vico.settings import load_settings

    limit = load_settings(model).max_tiles
    asked = {
        f"max_dynamic_patch={record_set.max_tiles} of set {record_set.name}": record_set.max_tiles
        for record_set in sets
        if record_set.max_tiles is not None
    }
    default = ShardConfig.model_fields["max_tiles"].default
    if config.max_tiles != default and any(record_set.max_tiles is None for record_set in sets):
        asked[f"shard.max_tiles={config.max_tiles}"] = config.max_tiles
    return [
        f"{setting} has no full effect: the model cuts a picture into {limit} tiles at most"
        for setting, num_tiles in asked.items()
        if num_tiles > limit
    ]
